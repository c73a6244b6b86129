"""Triton kernels of codecs/cast.py: every format by integers, also where the GPU has no such type.

Of a format with M bits of mantissa and a bias of the exponent B, the code of an fp32 number within
its range is its bits, cut to M of mantissa, less the difference of the biases. Subnormals are read
off a sum with a power of two, whose spacing in fp32 is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.kernels.triton import Launch
from fxcompress.kernels.triton.common import (
    ceil_bf16,
    hash_bits,
    launches,
    load_lanes,
    store_float,
    stream_keys,
    tile,
)

# Of each format: bits of mantissa, bias of the exponent, code of NaN, width in bits.
FORMATS = {
    torch.bfloat16: (7, 127, 0x7FC0, 16),
    torch.float16: (10, 15, 0x7E00, 16),
    torch.float8_e4m3fn: (3, 7, 0x7F, 8),
    torch.float8_e5m2: (2, 15, 0x7F, 8),
}
INTEGERS = {2: torch.int16, 1: torch.uint8}
GROUP = 256  # where there is no scale


@triton.constexpr_function
def power_of_two(exponent):
    """2^exponent."""
    return 2.0**exponent


@triton.jit
def nearest(magnitude, M: tl.constexpr, BIAS: tl.constexpr):
    """The code, without its sign, nearest to |y|; ties to even."""
    DROPPED: tl.constexpr = 23 - M
    bits = magnitude.to(tl.int32, bitcast=True)
    odd = (bits >> DROPPED) & 1
    code = ((bits + (1 << (DROPPED - 1)) - 1 + odd) >> DROPPED) - ((127 - BIAS) << M)
    if BIAS < 127:
        spaced: tl.constexpr = power_of_two(1 - BIAS - M + 23)
        small = (magnitude + spaced).to(tl.int32, bitcast=True) & 0x7FFFFF
        code = tl.where(magnitude < power_of_two(1 - BIAS), small, code)
    return code


@triton.jit
def stochastic(magnitude, noise, M: tl.constexpr, BIAS: tl.constexpr):
    """A code, without its sign, one of the two next to |y|, by 32 random bits."""
    DROPPED: tl.constexpr = 23 - M
    smallest: tl.constexpr = power_of_two(1 - BIAS)
    below = magnitude < smallest
    shifted = (magnitude + tl.where(below, smallest, 0.0)).to(tl.int32, bitcast=True)
    code = (shifted + (noise >> (32 - DROPPED)).to(tl.int32)) >> DROPPED
    return code - ((127 - BIAS) << M) - below.to(tl.int32) * (1 << M)


@triton.jit
def finite_magnitude(value):
    """(|x| or 0 where it is not finite, whether it is)."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    finite = bits < 0x7F800000
    return tl.where(finite, bits, 0).to(tl.float32, bitcast=True), finite


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def encode_kernel(
    x,
    numbers,
    scales,
    key,
    numel,
    stream,
    first,
    M: tl.constexpr,
    BIAS: tl.constexpr,
    NAN: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, size, _, offsets, inside, _ = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_lanes(x + start, offsets, inside, 0)
    lanes = [lane.to(tl.float32) for lane in lanes]
    if BIAS < 127:
        most = tl.zeros((ROWS, WIDTH), tl.float32)
        for lane in tl.static_range(8):
            most = tl.maximum(most, finite_magnitude(lanes[lane])[0])
        exact = tl.math.div_rn(tl.max(most, 1, keep_dims=True), LARGEST)
        scale = ceil_bf16(tl.maximum(exact, 2.0**-126))
        groups = start // GROUP + tl.arange(0, ROWS)[:, None]
        tl.store(scales + groups, scale.to(tl.int16), size > 0)
        scale = (scale << 16).to(tl.float32, bitcast=True)
    if STOCHASTIC:
        k_a, k_b = stream_keys(key, stream)
    for lane in tl.static_range(8):
        magnitude, finite = finite_magnitude(lanes[lane])
        if BIAS < 127:
            magnitude = tl.minimum(tl.math.div_rn(magnitude, scale), LARGEST)
        if STOCHASTIC:
            noise = hash_bits((start + offsets[lane]).to(tl.uint32), k_a, k_b)
            code = stochastic(magnitude, noise, M, BIAS)
        else:
            code = nearest(magnitude, M, BIAS)
        sign = (lanes[lane].to(tl.int32, bitcast=True) >> 31) & (1 << (BITS - 1))
        code = tl.where(finite, code | sign, NAN)
        tl.store(numbers + start + offsets[lane], code.to(numbers.dtype.element_ty), inside[lane])
    if not FAST and BITS == 8:  # numbers end at an odd byte: all programs clear the one after it
        end = numel.to(tl.int64)
        tl.store(numbers + end, (end * 0).to(tl.uint8), end % 2 == 1)


@triton.jit(do_not_specialize=["numel", "first"])
def decode_kernel(
    numbers,
    scales,
    x,
    numel,
    first,
    LIMIT: tl.constexpr,
    M: tl.constexpr,
    BIAS: tl.constexpr,
    NAN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, size, _, offsets, inside, _ = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_lanes(numbers + start, offsets, inside, 0)
    lanes = [lane.to(tl.int32) for lane in lanes]
    if BIAS < 127:
        groups = start // GROUP + tl.arange(0, ROWS)[:, None]
        scale = tl.load(scales + groups, size > 0, other=0).to(tl.int32) << 16
        scale = scale.to(tl.float32, bitcast=True)
    for lane in tl.static_range(8):
        code = lanes[lane] & ((1 << (BITS - 1)) - 1)
        value = (code << (23 - M)).to(tl.float32, bitcast=True)
        if BIAS < 127:
            value = value * power_of_two(127 - BIAS) * scale  # both products are exact
            value = tl.where(code == NAN, float("nan"), value)
        sign = (lanes[lane] << (32 - BITS)) & -0x80000000
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        store_float(x + start + offsets[lane], value, inside[lane], LIMIT)


def encode(
    x: Tensor, sections: Sequence[Tensor], group: int, key: Tensor | None, stream: int
) -> list[Launch]:
    """What writes the payload's sections (numbers and, but for bf16, scales) of a contiguous x.

    key: None rounds to nearest.
    """
    numbers, scales, constants = _operands(sections)
    kept = numbers if key is None else key
    given = (x, numbers, scales, kept, x.numel(), stream & rng.MASK)
    constants |= {"LARGEST": torch.finfo(sections[0].dtype).max, "STOCHASTIC": key is not None}
    return launches(encode_kernel, x, group, *given, **constants)


def decode(sections: Sequence[Tensor], x: Tensor, group: int) -> list[Launch]:
    """What fills a contiguous x from the payload's sections."""
    numbers, scales, constants = _operands(sections)
    constants["LIMIT"] = torch.finfo(x.dtype).max
    return launches(decode_kernel, x, group, numbers, scales, x, x.numel(), **constants)


def _operands(sections: Sequence[Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    numbers, *scales = sections
    mantissa, bias, nan, bits = FORMATS[numbers.dtype]
    integers = numbers.view(INTEGERS[numbers.element_size()])
    kept = scales[0].view(torch.int16) if scales else integers
    return integers, kept, {"M": mantissa, "BIAS": bias, "NAN": nan, "BITS": bits}
