"""`fxcompress bench accuracy`: equal starts, paired gaps, and what is drawn of them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fxcompress.tools import bench_accuracy, cli, plots
from fxcompress.tools.bench_accuracy import Run

FACTORY = """
import torch
from torch import nn

def factory(batch, size):
    layers = [nn.Sequential(nn.Linear(size, size), nn.GELU()) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(size, 1))
    x = torch.randn(batch, size)
    return model, (x,), lambda output: (output - x.sin().sum(1, keepdim=True)).square().mean()
"""


def run_of(policy: str, seed: int, loss: float) -> Run:
    return Run(policy, seed, (loss,) * 3, loss, None, 1.0, 4.0, 0.1)


def test_gaps_are_between_runs_of_one_seed() -> None:
    """Seeds differ by more than policies do: only paired do the gaps say something."""
    runs = [run_of("a", s, 10.0 * s) for s in range(3)]
    runs += [run_of("b", s, 10.0 * s + 0.1 * s) for s in range(3)]
    base, row = bench_accuracy.summary(runs, ["a", "b"])
    assert base["gap"] == 0
    assert row["gap"] == pytest.approx(0.1)
    assert row["gap se"] == pytest.approx(0.1 / 3**0.5)
    assert row["± se"] > 5
    assert row["ratio"] == 4


def test_the_cosine_falls_to_zero() -> None:
    arguments = Namespace(schedule="cosine", warm_steps=10, steps=110)
    shares = [bench_accuracy._share_of_rate(arguments, step) for step in range(10, 110)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[50] == pytest.approx(0.5)
    assert 0 < shares[-1] < 1e-3


def test_policies_that_differ_in_bits_are_one_line() -> None:
    names = ["rotate2", "rotate4", "rotate(bits=2,scale=lsq)", "auto@12", "actnn-l3", "aq-1.0"]
    families = ["rotate", "rotate", "rotate(scale=lsq)", "auto", "actnn-l3", "aq-1.0"]
    assert [plots._family(name) for name in names] == families
    biased = ["rotate(bits=2,scale=lsq)", "transform(bits=2,unbiased=False)", "average(beta=1)"]
    assert all(plots._is_biased(name) for name in biased)
    assert not any(plots._is_biased(name) for name in ("rotate2", "rotate(bits=2)", "auto@12"))


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "model.py").write_text(FACTORY)
    command = f"bench accuracy {tmp_path}/model.py:factory --batch 256 --size 32 --steps 8"
    command += f" --warm-steps 2 --seeds 1 --policies inductor,uniform4 --plot {tmp_path}/a.png"
    torch._dynamo.reset()
    assert cli.main([*command.split(), "--schedule", "cosine", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, coded = last["policies"]
    assert plain["ratio"] == 1
    assert coded["peak MB"] < plain["peak MB"]
    assert coded["ratio"] > 4
    assert coded["validation loss"] == pytest.approx(plain["validation loss"], rel=0.1)
    assert coded["validation loss"] != plain["validation loss"]
    assert (tmp_path / "a.png").stat().st_size > 0
