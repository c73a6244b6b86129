"""C++ kernels of cast and magnitude equal the references, bit for bit."""

from __future__ import annotations

import math
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
