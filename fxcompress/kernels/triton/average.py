"""Triton kernels of codecs/average.py: means of runs of A, coded as affine does, in one pass.

A lane of x [ROWS, WIDTH] is reshaped to [ROWS, WIDTH/A, A], whose last axis, the runs, a thread
holds or shares with a few. Where one mean is all that a group has, the lanes are added up first.

Means of blocks in space are a pass of their own (space.py), for a group of them runs through one
channel where memory runs through all; affine codes them. Decoding is one pass: each element looks
its code up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.kernels.triton import Launch, affine
from fxcompress.kernels.triton.common import (
    coded_mask,
    group_sizes,
    lane_masks,
    lane_offsets,
    launches,
    load_codes,
    load_lanes,
    nearest_bf16,
    store_codes,
    store_float,
    stream_keys,
    tile,
    tile_start,
)
from fxcompress.kernels.triton.space import Space, lookup, spread

BITS = 2  # of a mean
GROUP = 256  # elements that a row of the spatial decoder takes
_SIZES = ["size", "channels", "height", "wide", "cells_h", "cells_w"]


@triton.jit
def pool(lane, count, A: tl.constexpr, FAST: tl.constexpr):
    """Mean of each run, fp32[ROWS, runs], halves of it added until one is left."""
    ROWS: tl.constexpr = lane.shape[0]
    RUNS: tl.constexpr = lane.shape[1] // A
    y = tl.reshape(lane * (1.0 / A), (ROWS, RUNS, A))
    for log2 in tl.static_range(4):
        if (1 << log2) < A:
            y = tl.sum(tl.reshape(y, (ROWS, RUNS, 2, A >> (log2 + 1))), 2)
    y = tl.reshape(y, (ROWS, RUNS))
    return y if FAST else tl.math.div_rn(y, count.to(tl.float32) * (1.0 / A))


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def encode_kernel(
    x,
    codes,
    steps,
    minima,
    key,
    numel,
    stream,
    first,
    A: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    runs = (size + A - 1) // A
    eighth = (runs + 7) // 8
    lanes = load_lanes(
        *(x + start, lane_offsets(eighth * A, GROUP, WIDTH)),
        *(lane_masks(size, eighth * A, WIDTH, FAST), 0),
    )
    at = lane_offsets(eighth, 0, WIDTH // A)
    means = [
        pool(lanes[lane].to(tl.float32), tl.minimum(tl.maximum(size - A * at[lane], 1), A), A, FAST)
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    inside = lane_masks(runs, eighth, WIDTH // A, FAST)
    offsets = lane_offsets(eighth, GROUP // A, WIDTH // A)
    drawn, step, lo = affine.code(means, inside, offsets, start // A, k_a, k_b, BITS)
    coded = coded_mask(size, eighth, WIDTH // A, FAST)
    store_codes(codes + start // A // 8 * BITS, drawn, eighth, coded, GROUP // A, BITS)
    affine.store_grid(steps, minima, start // GROUP, size, step, lo)


@triton.jit(do_not_specialize=["numel", "first"])
def decode_kernel(
    codes,
    steps,
    minima,
    x,
    numel,
    first,
    LIMIT: tl.constexpr,
    A: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    eighth = ((size + A - 1) // A + 7) // 8
    coded = coded_mask(size, eighth, WIDTH // A, FAST)
    lanes = load_codes(codes + start // A // 8 * BITS, eighth, coded, GROUP // A, BITS)
    step, lo = affine.load_grid(steps, minima, start // GROUP, size)
    out, inside = lane_offsets(eighth * A, GROUP, WIDTH), lane_masks(size, eighth * A, WIDTH, FAST)
    for lane in tl.static_range(8):
        mean = lo + lanes[lane].to(tl.float32) * step
        value = tl.broadcast_to(mean[:, :, None], (ROWS, WIDTH // A, A))
        value = tl.reshape(value, (ROWS, WIDTH))
        store_float(x + start + out[lane], value, inside[lane], LIMIT)


@triton.jit(do_not_specialize=["numel", "first"])
def mean_kernel(
    x,
    means,
    numel,
    first,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """The bf16 mean of each group, its halves added until one element is left."""
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    row, column = tl.arange(0, ROWS)[:, None] * GROUP, tl.arange(0, WIDTH)[None, :]
    scale: tl.constexpr = 1.0 / (8 * WIDTH)
    if FAST:
        lanes = [tl.load(x + start + row + k * WIDTH + column) for k in (0, 1, 2, 3, 4, 5, 6, 7)]
    else:
        lanes = [
            tl.load(x + start + row + k * WIDTH + column, k * WIDTH + column < size, other=0)
            for k in (0, 1, 2, 3, 4, 5, 6, 7)
        ]
    lanes = [lane.to(tl.float32) * scale for lane in lanes]
    lanes = [lanes[k] + lanes[k + 4] for k in (0, 1, 2, 3)]
    y = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
    for log2 in tl.static_range(12):
        if (2 << log2) <= WIDTH:
            y = tl.sum(tl.reshape(y, (ROWS, 2, WIDTH >> (log2 + 1))), 1)
    y = tl.reshape(y, (ROWS, 1))
    if not FAST:
        y = tl.math.div_rn(y, tl.maximum(size, 1).to(tl.float32) * scale)
    finite = (y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    limit: tl.constexpr = 3.3895313892515355e38  # bf16's largest
    bits = nearest_bf16(tl.minimum(tl.maximum(y, -limit), limit))
    groups = start // GROUP + tl.arange(0, ROWS)[:, None]
    tl.store(means + groups, tl.where(finite, bits, 0x7FC0).to(tl.int16), size > 0)


@triton.jit(do_not_specialize=["numel", "first"])
def fill_kernel(
    means,
    x,
    numel,
    first,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """Each group filled with its mean."""
    start, size, _, offsets, inside, _ = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    groups = start // GROUP + tl.arange(0, ROWS)[:, None]
    mean = (tl.load(means + groups, size > 0, other=0).to(tl.int32) << 16).to(
        tl.float32, bitcast=True
    )
    for lane in tl.static_range(8):
        value = tl.broadcast_to(mean, (ROWS, WIDTH))
        store_float(x + start + offsets[lane], value, inside[lane], LIMIT)


@triton.jit(do_not_specialize=["numel", "count", "first", *_SIZES])
def spread_kernel(
    codes,
    steps,
    minima,
    x,
    size,
    channels,
    height,
    wide,
    cells_h,
    cells_w,
    count,
    numel,
    first,
    LIMIT: tl.constexpr,
    MEANS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHED: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """Each element its mean, one of `count`, MEANS of which share a grid."""
    start, _, eighth, offsets, inside, _ = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    R: tl.constexpr = RUN if FAST else 1
    for lane in tl.static_range(8):
        _, mean = lookup(
            *(start, lane, eighth, size, channels, height, wide, cells_h, cells_w),
            *(BH, BW, LAST, STRETCHED, R, GROUP, WIDTH),
        )
        value = decoded(mean, codes, steps, minima, count, inside[lane], MEANS, FAST)
        store_float(x + start + offsets[lane], spread(value, R), inside[lane], LIMIT)


@triton.jit
def decoded(mean, codes, steps, minima, count, inside, MEANS: tl.constexpr, FAST: tl.constexpr):
    """The means of these numbers."""
    mask = tl.full(mean.shape, 1, tl.int1) if FAST else inside[:, :, None]
    group, within = mean // MEANS, mean % MEANS
    # Planar: code k of a group is in byte k % period, period = ceil(codes/8) * 2.
    period = (tl.minimum(count.to(tl.int32) - group * MEANS, MEANS) + 7) // 8 * 2
    turn = (within >= period).to(tl.int32) + (within >= 2 * period) + (within >= 3 * period)
    byte = codes + (group * (MEANS // 4) + within - turn * period)
    code = (tl.load(byte, mask, other=0).to(tl.int32) >> (turn * 2)) & 3
    step = tl.load(steps + group, mask, other=0).to(tl.int32) << 16
    lo = tl.load(minima + group, mask, other=0).to(tl.int32) << 16
    value = code.to(tl.float32) * step.to(tl.float32, bitcast=True)
    return lo.to(tl.float32, bitcast=True) + value


def means(x: Tensor, found: Tensor, group: int) -> list[Launch]:
    """What writes the mean of each group of a contiguous x, bf16."""
    return launches(mean_kernel, x, group, x, found.view(torch.int16), x.numel())


def fill(found: Tensor, x: Tensor, group: int) -> list[Launch]:
    """What fills a contiguous x with the bf16 means of its groups."""
    limit = torch.finfo(x.dtype).max
    return launches(fill_kernel, x, group, found.view(torch.int16), x, x.numel(), LIMIT=limit)


def fill_space(sections: Sequence[Tensor], x: Tensor, where: Space, group: int) -> list[Launch]:
    """What fills a contiguous x from the payload's sections; `group` of its means share a grid."""
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    count = where.planes * where.lead * where.cells[0] * where.cells[1]
    given = (codes, steps, minima, x, *where.arguments, count, x.numel())
    constants = {**where.constants, "LIMIT": torch.finfo(x.dtype).max, "MEANS": group}
    return launches(spread_kernel, x, GROUP, *given, **constants)


def encode(
    x: Tensor, sections: Sequence[Tensor], run: int, group: int, key: Tensor, stream: int
) -> list[Launch]:
    """What writes the payload's sections (codes, steps, minima) from a contiguous x.

    run: elements that share a mean; group: means that share a grid.
    """
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (x, codes, steps, minima, key, x.numel(), stream & rng.MASK)
    return launches(encode_kernel, x, group * run, *given, A=run, BITS=BITS)


def decode(sections: Sequence[Tensor], x: Tensor, run: int, group: int) -> list[Launch]:
    """What fills a contiguous x from the payload's sections."""
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (codes, steps, minima, x, x.numel())
    constants: dict[str, Any] = {"LIMIT": torch.finfo(x.dtype).max, "A": run, "BITS": BITS}
    return launches(decode_kernel, x, group * run, *given, **constants)
