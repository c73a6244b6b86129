"""C++ kernels of cast and magnitude equal the references, bit for bit."""

from __future__ import annotations

import ctypes
import math
import os
import signal
from concurrent.futures import Future
from itertools import product

import pytest
import torch
from codec_checks import FLOATS, extreme, step_key

from fxcompress import rng
from fxcompress.codecs import Cast, Codec, Magnitude
from fxcompress.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

CASTS = [
    *(Cast("bf16", rounding) for rounding in ("nearest", "stochastic")),
    *(
        Cast(format, rounding, group)
        for format, rounding, group in product(
            ("fp16", "e4m3", "e5m2"), ("nearest", "stochastic"), (1, 256)
        )
    ),
]
MAGNITUDES = [Magnitude(n, b, norm) for n, b, norm in product((1, 5, 127), (8, 512), ("max", "l2"))]


@pytest.mark.parametrize("c", [*CASTS, *MAGNITUDES], ids=str)
def test_kernel_equals_reference(c: Codec) -> None:
    torch.manual_seed(0)
    key, keys = step_key(), rng.stream_keys(step_key(), 3)
    spread = torch.randn(777) * (6 * torch.randn(777)).exp2()  # of many sizes
    spread[100], spread[500] = math.nan, -math.inf
    parallel = torch.randn((1 << 16) + 77)
    for dtype in FLOATS:
        cases = (spread, parallel, torch.ones(0))
        for x in (*(case.to(dtype) for case in cases), *extreme((333,), dtype)):
            payload = torch.zeros(c.payload_bytes(x.shape, dtype), dtype=torch.uint8)
            c.encode_reference(x, payload, keys)
            found = torch.full_like(payload, 0xAB)
            assert c.encode_kernel(x, found, key, 3)
            assert torch.equal(found, payload)
            expected, decoded = torch.empty_like(x), torch.empty_like(x)
            c.decode_reference(payload, expected, keys)
            assert c.decode_kernel(payload, decoded, key, 3)
            assert torch.equal(decoded.isnan(), expected.isnan())
            integers = torch.int32 if dtype == torch.float32 else torch.int16
            kept = [t.nan_to_num(0.0).view(integers) for t in (decoded, expected)]
            assert torch.equal(*kept)


def test_a_forked_process_waits_for_no_thread_of_its_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiling is waited for in threads, which a fork leaves behind."""
    unit = next(unit for unit in cpu._UNITS if "affine" in unit)
    cpu._forget()
    never: Future[ctypes.CDLL | None] = Future()
    monkeypatch.setattr(cpu, "_load", lambda unit: never.result())
    assert not cpu._begun(unit).done()
    monkeypatch.undo()
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends one that waits
        os._exit(0 if cpu.available("affine") else 1)
    never.set_result(None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    cpu._forget()
