"""What benchmarks share: parts that outlive an interruption, rounds in turn."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from fxcompress.errors import FxCompressError
from fxcompress.tools import cli, harness
from fxcompress.tools.harness import Spread

FACTORY = """
import torch
from torch import nn

def factory(batch, size):
    layers = [nn.Sequential(nn.Linear(size, size), nn.GELU()) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(size, 1))
    return model, (torch.randn(batch, size),), lambda output: output.square().mean()
"""


def results(path: Path, **arguments: object) -> harness.Results:
    return harness.results(Namespace(output=path, **arguments), *arguments)


def test_parts_outlive_an_interruption(tmp_path: Path):
    path, calls = tmp_path / "kept.json", []

    def work(name: str) -> Spread:
        calls.append(name)
        if name == "b" and calls.count("b") == 1:
            raise KeyboardInterrupt
        return Spread(1.0, 0.5, 2.0)

    first = results(path, model="m", data=Path("here"))
    kept = first.part("a", work, "a")
    with pytest.raises(KeyboardInterrupt):
        first.part("b", work, "b")
    second = results(path, model="m", data=Path("here"))
    assert second.part("a", work, "a") == kept == {"median": 1.0, "low": 0.5, "high": 2.0}
    second.part("b", work, "b")
    assert calls == ["a", "b", "b"]
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_other_arguments_are_refused(tmp_path: Path):
    path = tmp_path / "kept.json"
    results(path, batch=4).part("a", int)
    with pytest.raises(FxCompressError, match="batch 4, now 8"):
        results(path, batch=8)
    for text in ("", "[]", '{"about": 1, "parts": 2}', '{"policies": {}}'):
        path.write_text(text)
        with pytest.raises(FxCompressError, match="holds no results"):
            results(path, batch=4)


def test_a_folder_that_is_missing(tmp_path: Path):
    with pytest.raises(FxCompressError, match="cannot write"):
        results(tmp_path / "missing" / "kept.json").part("a", int)


def test_calls_take_turns_and_the_warm_up_is_left_out(tmp_path: Path):
    order: list[str] = []

    def timed(name: str, seconds: list[float]):
        def call() -> float:
            order.append(name)
            return seconds.pop(0)

        return call

    calls = {"a": timed("a", [9.0, 1.0, 2.0]), "b": timed("b", [9.0, 3.0, 4.0])}
    done = results(tmp_path / "kept.json")
    assert harness.interleaved(calls, 2, done=done) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert order == ["a", "b"] * 3
    kept = results(tmp_path / "kept.json")
    assert harness.interleaved(calls, 2, done=kept) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert order == ["a", "b"] * 3  # nothing was timed again, nor warmed up


def test_policies_are_told_apart_outside_parentheses():
    found = harness.split_policies("uniform2, rotate(bits=2,scale=lsq),,uniform2,auto@12")
    assert found == ["uniform2", "rotate(bits=2,scale=lsq)", "auto@12"]


@pytest.mark.parametrize(
    "bench",
    [
        ["noise", "--policies", "uniform4,uniform2", "--warm-steps", "1", "--seeds", "2"],
        ["budget", "--inner", "aot_eager", "--shares", "0.01"],
        ["zeros", "--warm-steps", "1"],
    ],
    ids=lambda bench: bench[0],
)
def test_a_finished_benchmark_is_printed_again(bench, tmp_path: Path, capsys, monkeypatch):
    made, kept = tmp_path / "made.py", tmp_path / "kept.json"
    made.write_text(FACTORY)
    spec = [bench[0], f"{made}:factory", *bench[1:], "--batch", "256", "--size", "64"]
    command = ["bench", *spec, "--output", str(kept), "--json"]
    code = cli.main(command)
    first = capsys.readouterr()
    before = kept.read_bytes()
    # All it could do again is to compile.
    monkeypatch.setattr("torch.compile", lambda *args, **options: 1 / 0)
    assert cli.main(command) == code
    assert capsys.readouterr().out == first.out
    assert kept.read_bytes() == before
    found = json.loads(first.out.splitlines()[-1])
    assert found["machine"] == harness.machine()
    assert found["seed"] == 0
