"""The curve and the largest batch on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fxcompress.tools import cli

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


def test_pareto(factory: str, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.svg"
    arguments = ["pareto", factory, "--batch", "2048", "--points", "4"]
    chosen = ["--policies", "lossless,uniform8,uniform4", "--format", "json", "-o", str(plot)]
    assert cli.main([*arguments, *chosen]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    curve = [row for row in rows if row["policy"] == "auto"]
    peaks, noise = [r["peak_mb"] for r in curve], [r["variance"] for r in curve]
    assert peaks == sorted(peaks)
    assert noise[0] > noise[-1] == 0  # between them the planner trades noise for time as well
    lossless, eight, four = (row for row in rows if row["policy"] != "auto")
    assert lossless["variance"] == 0
    # Steps in proportion, squared: 255 against 15.
    assert four["variance"] / eight["variance"] == pytest.approx(17**2, rel=0.05)
    assert "uniform4" in plot.read_text()


def test_max_batch_is_the_last_that_can_be_planned(factory: str, capsys):
    arguments = ["--budget-mb", "1", "--policy", "uniform4"]
    assert cli.main(["max-batch", factory, *arguments]) == 0
    found = int(re.match(r"(\d+) samples fit", capsys.readouterr().out)[1])
    plan = ["plan", factory, *arguments, "--batch"]
    assert cli.main([*plan, str(found)]) == 0
    assert cli.main([*plan, str(found + 1)]) == 2


@pytest.mark.parametrize(
    "arguments", [["pareto", "--points", "1"], ["pareto", "--policies", "nothing"]]
)
def test_errors_come_before_the_work(arguments, factory: str, capsys):
    assert cli.main([arguments[0], factory, *arguments[1:]]) == 2
    assert capsys.readouterr().out == ""
