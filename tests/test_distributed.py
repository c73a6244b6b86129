"""PyTorch's engines for several processes: gloo on the CPU, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxcompress.agree import agreed

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(processes: int, parts: str, tmp_path: Path) -> list[dict[str, Any]]:
    """What each rank found. Ranks have caches of their own, so that each measures for itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(WORKER), parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def check(ranks: list[dict[str, Any]]) -> None:
    """What must hold on any number of ranks."""
    for found in ranks:
        ddp, fsdp, tp = found.get("ddp"), found.get("fsdp"), found.get("tp")
        if ddp:
            assert ddp["lossless"] < 1e-5
            assert 1e-4 < ddp["uniform4"] < 0.3
            # Cut at the buckets, and all of the pieces are counted.
            assert ddp["graphs"] > 1
            assert ddp["counted"][0] == ddp["counted"][1]
        if fsdp:
            assert fsdp["lossless"] < 1e-5
            assert 1e-4 < fsdp["uniform4"] < 0.3
        if tp:
            assert tp["lossless"] < 1e-5
            assert tp["uniform8"] < 0.05
        if "peak" in found:
            measured, allowed, plain = found["peak"]
            assert measured <= allowed < plain
    assert len({found["plan"] for found in ranks if "plan" in found}) <= 1
    assert len({found["fsdp"]["plan"] for found in ranks if "fsdp" in found}) <= 1
    noises = [found["noise"] for found in ranks if "noise" in found]
    assert len(set(noises)) == len(noises)


def test_two_processes(tmp_path: Path) -> None:
    check(launch(2, "ddp,noise", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_engine(processes: int, tmp_path: Path) -> None:
    check(launch(processes, "ddp,noise,fsdp,tp,plan,peak", tmp_path))


def test_the_first_to_publish_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agreed("alone", "mine") == "mine"
    store = torch.distributed.HashStore()
    monkeypatch.setattr("fxcompress.torch_private.job_store", lambda: store)
    assert agreed("graph", "first") == "first"
    assert agreed("graph", "second") == "first"
    assert agreed("another", "second") == "second"
