"""Triton kernels of codecs/average.py along storage: means of runs of A, coded as affine does.

A lane of x [ROWS, WIDTH] is reshaped to [ROWS, WIDTH/A, A], whose last axis, the runs, a thread
holds or shares with a few.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    load_codes,
    load_lanes,
    pieces,
    store_codes,
    store_float,
    stream_keys,
    tile_start,
)

BITS = 2  # of a mean


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


def encode(
    x: Tensor, sections: Sequence[Tensor], run: int, group: int, key: Tensor, stream: int
) -> list[Launch]:
    """What writes the payload's sections (codes, steps, minima) from a contiguous x.

    run: elements that share a mean; group: means that share a grid.
    """
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (x, codes, steps, minima, key, x.numel(), stream & rng.MASK)
    return [
        piece.launch(encode_kernel, *given, A=run, BITS=BITS, GROUP=group * run)
        for piece in pieces(x.numel(), group * run, x.element_size())
    ]


def decode(sections: Sequence[Tensor], x: Tensor, run: int, group: int) -> list[Launch]:
    """What fills a contiguous x from the payload's sections."""
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (codes, steps, minima, x, x.numel())
    constants = {"LIMIT": torch.finfo(x.dtype).max, "A": run, "BITS": BITS}
    return [
        piece.launch(decode_kernel, *given, **constants, GROUP=group * run)
        for piece in pieces(x.numel(), group * run, x.element_size())
    ]
