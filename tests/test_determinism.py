"""Same seed, same bits: in runs, processes, deterministic mode, and after a resume."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress import rng

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    rng.manual_seed(None)
    yield
    torch._dynamo.reset()
    rng.manual_seed(None)


class Net(nn.Module):
    """Random numbers of the model's own beside those of the compression."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.first(x)), 0.2, self.training)
        return self.head(F.silu(self.second(x)))


class Run:
    """A training whose data come from PyTorch's own random stream."""

    def __init__(self, torch_seed: int, **settings: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(torch_seed)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        made = fxcompress.backend(
            **{"policy": "uniform2", **settings}, inner="aot_eager", min_bytes=0
        )
        self.compiled = torch.compile(self.model, backend=made)

    def train(self, steps: int, rows: int = 32) -> Tensor:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.compiled(torch.randn(rows, 16)).square().mean().backward()
            self.optimizer.step()
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        states = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "noise": fxcompress.noise.state_dict(),
            "torch": torch.get_rng_state(),
        }
        torch.save(states, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, *, noise_first: bool) -> None:
        states = torch.load(file, weights_only=True)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        loads = [
            lambda: fxcompress.noise.load_state_dict(states["noise"]),
            lambda: torch.set_rng_state(states["torch"]),
        ]
        for load in loads if noise_first else reversed(loads):
            load()


def test_the_same_run_twice() -> None:
    first = Run(3).train(4)
    fxcompress.manual_seed(None)
    assert torch.equal(Run(3).train(4), first)
    assert not torch.equal(Run(4).train(4), first)


@pytest.mark.parametrize("noise_first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"seed": 9}], ids=["torch's seed", "own seed"])
def test_resume_continues_the_noise(settings: dict[str, Any], noise_first: bool) -> None:
    """In a process with another seed, whichever of the two random states is loaded first."""
    run = Run(3, **settings)
    run.train(3)
    checkpoint = run.save()
    expected = run.train(3)
    fxcompress.manual_seed(None)
    other = Run(77, **settings)
    other.load(checkpoint, noise_first=noise_first)  # before anything is compiled
    assert torch.equal(other.train(3), expected)


def test_resume_by_name() -> None:
    """``backend="fxcompress"`` reads its seed when it compiles, after the checkpoint was loaded."""

    def run(steps: int) -> list[int]:
        torch._dynamo.reset()
        options = {"policy": "uniform2", "seed": 5, "inner": "aot_eager", "min_bytes": 0}
        compiled = torch.compile(nn.Linear(64, 64), backend="fxcompress", options=options)
        for _ in range(steps):
            compiled(torch.randn(8, 64)).square().sum().backward()
        return rng.next_key(CPU).tolist()

    run(2)
    checkpoint = fxcompress.noise.state_dict()
    expected = run(2)
    fxcompress.manual_seed(None)
    fxcompress.noise.load_state_dict(checkpoint)
    assert run(2) == expected


def test_a_compile_in_mid_training_does_not_restart_the_noise() -> None:
    run = Run(3, seed=5)
    run.train(2)
    before = rng.get_state()["counters"]["cpu"]
    run.train(2, rows=48)  # another shape: compiled anew
    assert rng.get_state()["counters"]["cpu"] == before + 2


def test_seeding_after_a_load_starts_anew() -> None:
    torch.manual_seed(3)
    rng.next_key(CPU)
    state = rng.get_state()
    fxcompress.noise.load_state_dict(state)
    torch.manual_seed(4)
    assert rng.next_key(CPU)[1] == 0
    fxcompress.noise.load_state_dict(state)
    assert rng.next_key(CPU)[1] == 1
    torch.manual_seed(3)  # after a step: the user's own doing
    assert rng.next_key(CPU)[1] == 0


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [1, 2],
        {"explicit_seed": None, "seed": "7", "counters": {}},
        {"explicit_seed": 0.5, "seed": 7, "counters": {}},
        {"explicit_seed": None, "seed": 7, "counters": {"cpu": "many"}},
        {"explicit_seed": None, "seed": 7, "counters": [3]},
    ],
    ids=str,
)
def test_no_state_of_the_noise(state: Any) -> None:
    before = rng.get_state()
    with pytest.raises(fxcompress.FxCompressError, match=r"noise\.state_dict"):
        fxcompress.noise.load_state_dict(state)
    assert rng.get_state() == before


@pytest.mark.parametrize(
    "policy", ["uniform4", "dither3", "rotate2", "subsample(rate=0.25)", "transform2", "aq-1.5"]
)
def test_deterministic_algorithms(policy: str) -> None:
    """Nothing of ours is refused, and uninitialised memory, filled with NaN there, is not read."""

    def one() -> Tensor:
        rng.manual_seed(None)
        return Run(3, policy=policy).train(2, 512)

    expected = one()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(one(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


SCRIPT = """
import hashlib
from test_determinism import Run
run = Run(3, policy="transform2")
print("RESULT", hashlib.sha256(run.train(3, 512).numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_processes_agree(tmp_path: Path) -> None:
    """The other one measures, plans and trains by itself, with an empty cache and another hash seed
    of Python's. Without a compiler, which is quicker: the reference has the same bits."""

    def process(hash_seed: str) -> str:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("FXCOMPRESS_", "TORCH"))}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={
                **keep,
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / hash_seed),
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": str(Path(__file__).parent),
                "CXX": "/nonexistent/c++",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))

    run = Run(3, policy="transform2")
    here = hashlib.sha256(run.train(3, 512).numpy().tobytes()).hexdigest()
    assert {"transform"} <= {
        t.representation.partition("(")[0] for t in fxcompress.explain(run.compiled).tensors
    }
    assert process("1") == f"RESULT {here}"


def test_state_is_plain_data() -> None:
    rng.next_key(CPU)
    state = fxcompress.noise.state_dict()
    assert json.loads(json.dumps(state)) == state
