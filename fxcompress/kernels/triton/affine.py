"""Triton kernels of codecs/affine.py: one read of the tensor, one write of the payload."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.kernels.prologue import Prologue
from fxcompress.kernels.triton import Launch
from fxcompress.kernels.triton.common import (
    hash_bits,
    launches,
    load_codes,
    store_codes,
    store_float,
    stream_keys,
    tile,
)
from fxcompress.kernels.triton.fused import clear_masked, operands, prepared_lanes


@triton.jit
def ordered(bits):
    """int32 that compares as the total order of the floats with these bits; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def grid(lowest, highest, last, share):
    """(lo, step, whether it is regular) of groups, from their extremes in the total order.

    last: their highest code; share: one over it.
    """
    low, high = ordered(lowest), ordered(highest)
    infinity: tl.constexpr = 0x7F800000
    finite = ((low & 0x7FFFFFFF) < infinity) & ((high & 0x7FFFFFFF) < infinity)
    lo = ((low + tl.where(low < 0, 0xFFFF, 0)) & -0x10000).to(tl.float32, bitcast=True)
    top = high.to(tl.float32, bitcast=True)
    exact = tl.maximum((top - lo) * share, 2.0**-100)
    step = ((exact.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    step = tl.where(top > lo, step, 0.0)
    limit = (step * last).to(tl.int32, bitcast=True)
    finite &= (limit & 0x7FFFFFFF) < infinity
    nan = tl.full(step.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(finite, lo, 0.0), tl.where(finite, step, nan), finite & (step > 0)


@triton.jit
def quantize(x, lo, r, regular, index, k_a, k_b, last, NEAREST: tl.constexpr):
    """Codes, as int32: fixed point with 22 fractional bits plus noise, cut off. Irregular: 0."""
    fixed = tl.minimum(((x - lo) * r).to(tl.int32), last << 22)
    noise = 1 << 21
    if not NEAREST:
        noise = (hash_bits(index.to(tl.uint32), k_a, k_b) >> 10).to(tl.int32)
    return tl.where(regular, (fixed + noise) >> 22, 0)


@triton.jit
def code(
    lanes, inside, offsets, start, k_a, k_b, BITS: tl.constexpr, NEAREST: tl.constexpr = False
):
    """(codes, step, lo) of groups of fp32 lanes, whose elements are numbered from `start` on."""
    lowest = tl.full(lanes[0].shape, 0x7FFFFFFF, tl.int32)
    highest = tl.full(lanes[0].shape, -0x80000000, tl.int32)
    for lane in tl.static_range(8):
        order = ordered(lanes[lane].to(tl.int32, bitcast=True))
        lowest = tl.minimum(lowest, tl.where(inside[lane], order, 0x7FFFFFFF))
        highest = tl.maximum(highest, tl.where(inside[lane], order, -0x80000000))
    lowest, highest = tl.min(lowest, 1, keep_dims=True), tl.max(highest, 1, keep_dims=True)
    last: tl.constexpr = (1 << BITS) - 1
    lo, step, regular = grid(lowest, highest, last, 1.0 / last)
    r = tl.math.div_rn(4194304.0, tl.where(regular, step, 1.0))
    drawn = [
        quantize(
            *(lanes[lane], lo, r, regular & inside[lane], start + offsets[lane], k_a, k_b),
            *(last, NEAREST),
        )
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    return drawn, step, lo


@triton.jit
def store_grid(steps, minima, first, size, step, lo):
    """Write (step, lo) of the groups of a tile, the first of which is `first`."""
    groups = first + tl.arange(0, size.shape[0])[:, None]
    tl.store(steps + groups, (step.to(tl.int32, bitcast=True) >> 16).to(tl.int16), size > 0)
    tl.store(minima + groups, (lo.to(tl.int32, bitcast=True) >> 16).to(tl.int16), size > 0)


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def encode_kernel(
    x,
    codes,
    steps,
    minima,
    key,
    fill,
    mask,
    mean,
    rstd,
    channels,
    inner,
    numel,
    stream,
    first,
    BEFORE: tl.constexpr,
    BITS: tl.constexpr,
    NEAREST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    if NEAREST:
        k_a, k_b = 0, 0
    else:
        k_a, k_b = stream_keys(key, stream)
    start, size, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = prepared_lanes(
        *(x, start, size, offsets, inside, fill, mask, mean, rstd, channels, inner),
        *(BEFORE, GROUP, FAST),
    )
    drawn, step, lo = code(lanes, inside, offsets, start, k_a, k_b, BITS, NEAREST)
    store_codes(codes + start // 8 * BITS, drawn, eighth, coded, GROUP, BITS)
    store_grid(steps, minima, start // GROUP, size, step, lo)
    if not FAST:  # where the codes end at an odd byte, all programs clear the one after it
        end = (numel.to(tl.int64) + 7) // 8 * BITS
        tl.store(codes + end, (end * 0).to(tl.uint8), end % 2 == 1)


@triton.jit
def load_grid(steps, minima, first, size):
    """(step, lo) of the groups of a tile, the first of which is `first`."""
    groups = first + tl.arange(0, size.shape[0])[:, None]
    step = tl.load(steps + groups, size > 0, other=0).to(tl.int32) << 16
    lo = tl.load(minima + groups, size > 0, other=0).to(tl.int32) << 16
    return step.to(tl.float32, bitcast=True), lo.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["numel", "first"])
def decode_kernel(
    codes,
    steps,
    minima,
    x,
    mask,
    numel,
    first,
    MASKED: tl.constexpr,
    LIMIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, size, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_codes(codes + start // 8 * BITS, eighth, coded, GROUP, BITS)
    step, lo = load_grid(steps, minima, start // GROUP, size)
    lanes = [lo + lane.to(tl.float32) * step for lane in lanes]
    if MASKED:
        lanes = clear_masked(lanes, mask, start, size, offsets, inside, GROUP, FAST)
    for lane in tl.static_range(8):
        store_float(x + start + offsets[lane], lanes[lane], inside[lane], LIMIT)


def encode(
    x: Tensor,
    sections: Sequence[Tensor],
    bits: int,
    group: int,
    key: Tensor | None,
    stream: int,
    before: Prologue | None = None,
) -> list[Launch]:
    """What writes the payload's sections (codes, steps, minima) of a contiguous x.

    key: None rounds to nearest.
    """
    kind, others = operands(before)
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (x, codes, steps, minima, key, *others, x.numel(), stream & rng.MASK)
    nearest = key is None
    return launches(encode_kernel, x, group, *given, BEFORE=kind, BITS=bits, NEAREST=nearest)


def decode(
    sections: Sequence[Tensor], x: Tensor, bits: int, group: int, mask: Tensor | None = None
) -> list[Launch]:
    """What fills a contiguous x from the payload's sections, with 0 where the mask is set."""
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (codes, steps, minima, x, mask, x.numel())
    limit, masked = torch.finfo(x.dtype).max, mask is not None
    return launches(decode_kernel, x, group, *given, MASKED=masked, LIMIT=limit, BITS=bits)
