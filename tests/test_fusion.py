"""Loops that a call stands between are joined where this takes no memory, and only there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config

import fxcompress
from fxcompress import fusion
from fxcompress.fusion import Buffer, Loops, takes_memory
from fxcompress.tools import memory

MB = 1 << 20


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loops(place: int, writes: int, *reads: Buffer) -> Loops:
    return Loops(frozenset({place}), {"out": writes}, {str(i): b for i, b in enumerate(reads)})


def buffer(born: int | None, *readers: int, size: int = MB) -> Buffer:
    return Buffer(size, born, frozenset(readers))


WEIGHT = buffer(None, 3, 9, size=1 << 10)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (loops(9, MB, buffer(1, 3, 9)), False),  # what they share dies with the later
        (loops(9, MB, buffer(1, 3, 9, 12)), True),  # or is read again beyond
        (loops(9, MB, buffer(-1, 9)), False),  # saved, for this alone
        (loops(9, MB, buffer(None, 9)), True),  # a parameter never dies
        (loops(9, MB, WEIGHT, buffer(8, 9)), True),  # what is not there yet makes up for nothing
        (loops(9, 0, WEIGHT, buffer(8, 9, 12)), True),  # and would wait for its other readers
        (loops(9, 1 << 10, WEIGHT, buffer(8, 9)), False),  # too little to care
    ],
)
def test_what_takes_memory(later: Loops, expected: bool) -> None:
    assert takes_memory(loops(3, MB, WEIGHT), later) is expected


class Wide(nn.Module):
    """Narrow, wide, narrow, as in an EfficientNet: it is worth while to repeat what is wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.norm = nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.narrow = nn.Conv2d(64, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(nn.functional.silu(self.norm(self.expand(x)))).square().mean()


REPEATED = {"match": "expand", "representation": "recompute"}


def test_factors_wait_for_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SiLU is computed again for the convolution behind it; its gradient is needed later."""
    model, x = Wide(), torch.randn(8, 8, 32, 32)
    wide = 8 * x.nbytes

    def peak() -> tuple[int, int]:
        torch._dynamo.reset()
        backend = fxcompress.backend(policy="lossless", min_bytes=0, overrides=[REPEATED])
        compiled = torch.compile(model, backend=backend)

        def step() -> None:
            compiled(x).backward()

        with config.patch(force_disable_caches=True):
            step()
        plan = backend.plan()
        assert {t.representation for t in plan.tensors if t.storage_bytes == wide} == {"recompute"}
        return memory.measure_step(step, model.parameters()).peak_bytes, plan.planned_peak_bytes

    found, planned = peak()
    assert abs(found - planned) < 0.1 * wide
    monkeypatch.setattr(fusion, "SMALLEST", 1 << 40)
    assert found < peak()[0] - 0.5 * wide
