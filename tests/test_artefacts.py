"""What compiled graphs leave behind for people: the dump folder, the structured trace, the log."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.plan import Plan

GRAPHS = [f"{when}_{side}.py" for when in ("after", "before") for side in ("backward", "forward")]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(**settings: object) -> object:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    compiled = torch.compile(model, backend=fxcompress.backend(inner="aot_eager", **settings))
    compiled(torch.randn(256, 64)).sum().backward()
    return compiled


def test_dump_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_DUMP_DIR", str(tmp_path / "dumps"))
    compiled = step(policy="uniform4")
    (folder,) = (tmp_path / "dumps").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [*GRAPHS, "plan.json", "plan.txt"]
    plan = fxcompress.explain(compiled)
    made = Plan.load(folder / "plan.json")  # before its output was seen to be let go of
    assert made == dataclasses.replace(plan, planned_peak_bytes=made.planned_peak_bytes)
    assert made.planned_peak_bytes - plan.planned_peak_bytes == 256 * 64 * 4
    assert folder.name == plan.key()
    texts = {p.name: p.read_text() for p in folder.iterdir()}
    assert "fxcompress.encode" in texts["after_forward.py"]
    assert "fxcompress.decode" in texts["after_backward.py"]
    assert "fxcompress" not in texts["before_forward.py"] + texts["before_backward.py"]
    assert "uniform4" in texts["plan.txt"]


def test_a_graph_left_alone_leaves_no_after(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_DUMP_DIR", str(tmp_path))
    step(budget_mb=4000)
    (folder,) = tmp_path.iterdir()
    names = {p.name for p in folder.iterdir()}
    assert names == {"before_forward.py", "before_backward.py", "plan.json", "plan.txt"}


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FXCOMPRESS_DUMP_DIR", str(blocked))
    plan = fxcompress.explain(step(policy="uniform4"))
    assert any(t.representation.startswith("affine") for t in plan.tensors)
    assert "FXCOMPRESS_DUMP_DIR" in caplog.text


def test_dumping_changes_no_plan(tmp_path: Path, monkeypatch):
    plain = fxcompress.explain(step(policy="uniform2"))
    monkeypatch.setenv("FXCOMPRESS_DUMP_DIR", str(tmp_path))
    torch._dynamo.reset()
    assert fxcompress.explain(step(policy="uniform2")) == plain


def test_the_plan_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="fxcompress"):
        step(policy="uniform4")
    assert "policy uniform4" in caplog.text


SCRIPT = """
import torch, fxcompress
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
backend = fxcompress.backend(policy="uniform4", inner="aot_eager")
torch.compile(model, backend=backend)(torch.randn(256, 64)).sum().backward()
"""


def test_trace_and_torch_logs(tmp_path: Path):
    """As users turn them on: by variables, in a process of their own."""
    variables = {"TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "fxcompress"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "policy uniform4" in done.stderr
    (trace,) = tmp_path.glob("*.log")
    lines = trace.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"fxcompress_plan"' in line)
    payload = []
    for line in lines[at + 1 :]:
        if not line.startswith("\t"):
            break
        payload.append(line[1:])
    assert json.loads("\n".join(payload))["policy"] == "uniform4"
