"""Triton kernels without a GPU: equal to the references under Triton's interpreter, and compiled.

Triton reads TRITON_INTERPRET when a kernel is defined, so the tests that interpret are run in a
process of their own, by `test_kernels_equal_references`. To run one by hand:
TRITON_INTERPRET=1 pytest tests/test_triton.py
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_checks import FLOATS, step_key
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs import Affine, Bits, Codec
from fxcompress.kernels import triton as kernels

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETING, reason="compiles")

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
STREAM = 3
# A whole tile and a tail; groups for the masked path; less than a group; nothing.
CASES = ((256, 4096 + 3 * 256 + 77), (64, 8192), (1000, 2100), (24, 100), (8, 77), (256, 0))


def test_kernels_equal_references() -> None:
    if INTERPRETING:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take CPU tensors, and casts to bf16 round to nearest even, as on every GPU.

    The interpreter truncates.
    """
    if INTERPRETING:
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_convert_float", _cast)
        monkeypatch.setattr(kernels, "takes", lambda x, group: True)


def _cast(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    numbers = torch.from_numpy(values.copy())
    if str(source) == "bf16":
        return numbers.view(torch.bfloat16).float().numpy()
    return numbers.to(torch.bfloat16).view(torch.int16).numpy().view("uint16")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Same bits, except that one NaN is as good as another."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and same_bits(
        a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
    )


def awkward(size: int, dtype: torch.dtype) -> Tensor:
    """Stretches of 128 elements of every awkward kind, in turn."""
    x, kinds = torch.randn(size), torch.arange(size) // 128 % 9
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.where(kinds == 1, 0.1, x)  # constant, not a bf16 number
    x = torch.where(kinds == 2, -0.0, x)
    x = torch.where(kinds == 3, x * tiny / 100, x)  # denormal
    x = torch.where(kinds == 4, x * largest / 20, x)  # huge
    x = torch.where(kinds == 5, x.sign() * largest, x)  # a grid that overflows fp32
    x = torch.where(kinds == 6, x.clamp(min=0), x).to(dtype)
    x[(kinds == 7) & (torch.arange(size) % 128 == 100)] = math.nan
    x[(kinds == 8) & (torch.arange(size) % 128 == 0)] = -math.inf
    return x


def check(c: Codec, x: Tensor) -> None:
    """The kernels give the reference's payload, and from it the reference's tensor."""
    key = step_key()
    keys = rng.stream_keys(key, STREAM)
    expected = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
    c.encode_reference(x, expected, keys)
    payload = torch.full_like(expected, 0xAB)
    assert c.encode_kernel(x, payload, key, STREAM)
    assert torch.equal(payload, expected), c
    decoded, found = torch.empty_like(x), torch.empty_like(x)
    c.decode_reference(expected, decoded, keys)
    assert c.decode_kernel(expected, found, key, STREAM)
    assert same_numbers(found, decoded), c


@interpreted
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_affine(bits: int, dtype: torch.dtype) -> None:
    group, size = CASES[bits % len(CASES)]
    check(Affine(bits, group), awkward(size, dtype))
    check(Affine(bits, 256), awkward(777 + bits, dtype))


@interpreted
@pytest.mark.parametrize("dtype", INTEGERS)
def test_bits(dtype: torch.dtype) -> None:
    for bits, low in ((1, 0),) if dtype == torch.bool else ((1, 3), (3, -2), (8, 0)):
        for size in (300, 16384 + 77):
            check(Bits(bits, low), torch.randint(0, 2 if low else 256, (size,)).to(dtype))


@interpreted
def test_keys_of_every_size() -> None:

    x = torch.randn(300)
    for key in ([-1, 0], [-(1 << 63), (1 << 63) - 1], [1 << 40, 1 << 33]):
        for stream in (0, 1, 16, (1 << 32) - 1):
            c, words = Affine(2), torch.tensor(key)
            expected = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
            c.encode_reference(x, expected, rng.stream_keys(words, stream))
            assert torch.equal(c.encode(x, words, stream), expected)
