"""The layer-wise study: each tensor alone, predicted beside measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress.record import Recorder, Recording, record
from fxcompress.tools import cli, study

FACTORY = """
import torch
from torch import nn

def factory(batch, size):
    layers = [nn.Sequential(nn.Linear(size, size), nn.GELU()) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(size, 1))
    return model, (torch.randn(batch, size),), lambda output: output.square().mean()
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "made.py"
    path.write_text(FACTORY)
    return f"{path}:factory"


@pytest.fixture(scope="module")
def recordings() -> tuple[Recording, ...]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(64, 1))

    def step(recorder: Recorder) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=recorder)
        compiled(torch.randn(256, 64)).square().mean().backward()

    return record(step, 16384)


def test_measured_as_predicted_and_the_sum_as_the_whole(recordings):
    *rows, whole = study.study(recordings, "affine(bits=4)", seeds=8)
    assert len(rows) == 3  # the GELU inputs; their outputs are rebuilt from them
    for row in (*rows, whole):
        assert row.measured == pytest.approx(row.predicted, rel=0.25)
        assert row.bytes_after < row.bytes_before / 7
    assert whole.predicted == pytest.approx(sum(r.predicted for r in rows))
    assert whole.tensors == 3


def test_fewer_bits_more_error(recordings):
    six, four = (
        study.study(recordings, f"affine(bits={bits})", seeds=4)[-1].measured for bits in (6, 4)
    )
    assert four / six == pytest.approx((63 / 15) ** 2, rel=0.2)  # steps in proportion, squared


def test_modules(recordings):
    rows = study.study(recordings, "affine(bits=4)", depth=1, seeds=2)
    assert [row.name for row in rows] == ["0", "1", "2", study.ALL]


def test_command(factory: str, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "study.png"
    arguments = ["study", factory, "--batch", "256", "--warm-steps", "2", "--seeds", "2"]
    assert cli.main([*arguments, "--format", "json", "-o", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["codec"] == "affine(bits=4)"
    assert [row["tensors"] for row in found["rows"]] == [1, 1, 1, 3]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "99"], "bits"),
        (["--codec", "nothing(1)"], "unknown codec"),
        (["--seeds", "1"], "--seeds"),
    ],
)
def test_errors_come_before_the_work(arguments, message, factory: str, capsys):
    assert cli.main(["study", factory, *arguments]) == 2
    assert message in capsys.readouterr().err
