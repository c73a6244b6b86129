"""Triton kernels of codecs/frequency.py: the pass over storage that draws or decodes codes.

What it looks up (means of blocks, grids of planes) comes from space.py: a pass before it in
encoding, none in decoding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.kernels.triton import Launch
from fxcompress.kernels.triton.affine import quantize
from fxcompress.kernels.triton.common import (
    launches,
    load_codes,
    load_lanes,
    store_codes,
    store_float,
    stream_keys,
    tile,
)
from fxcompress.kernels.triton.space import Space, as_low, load_spread, lookup

GROUP = 256  # codes that are packed together
_SIZES = ["size", "channels", "height", "wide", "cells_h", "cells_w"]


@triton.jit(do_not_specialize=["numel", "first", "stream", *_SIZES])
def encode_kernel(
    x,
    codes,
    low,
    minima,
    rates,
    key,
    size,
    channels,
    height,
    wide,
    cells_h,
    cells_w,
    numel,
    stream,
    first,
    BH: tl.constexpr,
    BW: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHED: tl.constexpr,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start, _, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_lanes(x + start, offsets, inside, 0)
    drawn = [
        draw(
            *(lanes[lane], inside[lane], low, minima, rates, start, offsets[lane], k_a, k_b),
            *(lane, eighth, size, channels, height, wide, cells_h, cells_w),
            *(BH, BW, LAST, STRETCHED, RUN if FAST else 1, BITS, GROUP, FAST),
        )
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    store_codes(codes + start // 8 * BITS, drawn, eighth, coded, GROUP, BITS)


@triton.jit
def draw(
    x,
    inside,
    low,
    minima,
    rates,
    start,
    offset,
    k_a,
    k_b,
    lane,
    eighth,
    size,
    channels,
    height,
    wide,
    cells_h,
    cells_w,
    BH: tl.constexpr,
    BW: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHED: tl.constexpr,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
):
    """The codes of the residuals of one lane."""
    plane, cell = lookup(
        *(start, lane, eighth, size, channels, height, wide, cells_h, cells_w),
        *(BH, BW, LAST, STRETCHED, RUN, GROUP, x.shape[1]),
    )
    r = load_spread(rates, plane, inside, RUN, FAST)
    lo = load_spread(minima, plane, inside, RUN, FAST).to(tl.int32) << 16
    residual = x.to(tl.float32) - as_low(load_spread(low, cell, inside, RUN, FAST))
    return quantize(
        *(residual, lo.to(tl.float32, bitcast=True), r, r > 0, start + offset, k_a, k_b),
        *((1 << BITS) - 1, False),
    )


@triton.jit(do_not_specialize=["numel", "first", *_SIZES])
def decode_kernel(
    codes,
    low,
    steps,
    minima,
    x,
    size,
    channels,
    height,
    wide,
    cells_h,
    cells_w,
    numel,
    first,
    LIMIT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHED: tl.constexpr,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, _, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_codes(codes + start // 8 * BITS, eighth, coded, GROUP, BITS)
    R: tl.constexpr = RUN if FAST else 1
    for lane in tl.static_range(8):
        plane, cell = lookup(
            *(start, lane, eighth, size, channels, height, wide, cells_h, cells_w),
            *(BH, BW, LAST, STRETCHED, R, GROUP, WIDTH),
        )
        step = load_spread(steps, plane, inside[lane], R, FAST).to(tl.int32) << 16
        lo = load_spread(minima, plane, inside[lane], R, FAST).to(tl.int32) << 16
        fine = lanes[lane].to(tl.float32) * step.to(tl.float32, bitcast=True)
        fine = lo.to(tl.float32, bitcast=True) + fine
        value = as_low(load_spread(low, cell, inside[lane], R, FAST)) + fine
        store_float(x + start + offsets[lane], value, inside[lane], LIMIT)


def encode(
    x: Tensor,
    codes: Tensor,
    low: Tensor,
    minima: Tensor,
    rates: Tensor,
    where: Space,
    bits: int,
    key: Tensor,
    stream: int,
) -> list[Launch]:
    """What writes the codes of a contiguous x, from its means and the grids of its planes.

    low: means, fp32 or bf16 as int16; minima: bf16 as int16[planes]; rates: see `space.grids`.
    """
    given = (x, codes, low, minima, rates, key, *where.arguments, x.numel(), stream & rng.MASK)
    return launches(encode_kernel, x, GROUP, *given, **where.constants, BITS=bits)


def decode(
    codes: Tensor,
    low: Tensor,
    steps: Tensor,
    minima: Tensor,
    x: Tensor,
    where: Space,
    bits: int,
) -> list[Launch]:
    """What fills a contiguous x; see `encode`."""
    given = (codes, low, steps, minima, x, *where.arguments, x.numel())
    limit = torch.finfo(x.dtype).max
    return launches(decode_kernel, x, GROUP, *given, **where.constants, LIMIT=limit, BITS=bits)
