"""Random graphs: lossless is exact bit for bit, a lossy policy leaves the forward alone.

More of them: ``FXCOMPRESS_FUZZ_EXAMPLES=1000 pytest tests/test_fuzz.py``; these are other ones each
time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from fuzz_programs import Program, programs
from hypothesis import HealthCheck, given, reject, settings
from side_by_side import SideBySide

import fxcompress
from fxcompress.settings import make

EXAMPLES = int(os.environ.get("FXCOMPRESS_FUZZ_EXAMPLES", "0"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
    fxcompress.manual_seed(None)


def check(program: Program) -> None:
    """Train the program for a step; ``SideBySide`` compares, and raises."""
    exact, lossy = (make(policy=p, min_bytes=0, group=8) for p in ("lossless", "uniform4"))
    torch._dynamo.reset()
    torch.manual_seed(2)
    backend = SideBySide(exact, lossy)
    arguments = program.arguments()
    try:
        outputs = torch.compile(program.function(), backend=backend)(*arguments)
        trained = [y for y in outputs if y.requires_grad]
        generator = torch.Generator().manual_seed(3)
        tangents = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in trained]
        torch.autograd.backward(trained, tangents)
    except Exception:
        if _can_be_trained(program):
            raise
        reject()


def _can_be_trained(program: Program) -> bool:
    """Without us: some write to what autograd wants to see again, or hit a bug of PyTorch's."""
    torch._dynamo.reset()
    backend = fxcompress.backend(policy="inductor", inner="aot_eager")
    try:
        outputs = torch.compile(program.function(), backend=backend)(*program.arguments())
        sum(y.abs().sum() for y in outputs if y.requires_grad).backward()
    except Exception:
        return False
    return True


HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(
    max_examples=EXAMPLES or 30,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[*HEALTH, HealthCheck.function_scoped_fixture],
)
@given(programs())
def test_random_graphs(program: Program) -> None:
    check(program)
