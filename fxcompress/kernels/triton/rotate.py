"""Triton kernels of codecs/rotate.py: rotation.py between one read and one write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs.levels import Levels
from fxcompress.kernels.prologue import Prologue
from fxcompress.kernels.triton import Launch, rotation
from fxcompress.kernels.triton.common import (
    coded_mask,
    group_sizes,
    lane_masks,
    lane_offsets,
    launches,
    load_codes,
    store_codes,
    store_float,
    stream_keys,
    tile_start,
)
from fxcompress.kernels.triton.fused import clear_masked, operands, prepared_lanes


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def encode_kernel(
    x,
    codes,
    scales,
    means,
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
    LEVELS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    EDEN: tl.constexpr,
    CENTRED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    n = rotation.padded_sizes(size, FAST)
    eighth = n // 8
    offsets, inside = lane_offsets(eighth, GROUP, WIDTH), lane_masks(size, eighth, WIDTH, FAST)
    coded = coded_mask(size, eighth, WIDTH, FAST)
    groups = start // GROUP + tl.arange(0, ROWS)[:, None]
    word = (start >> 5).to(tl.uint32)

    lanes = prepared_lanes(
        *(x, start, size, offsets, inside, fill, mask, mean, rstd, channels, inner),
        *(BEFORE, GROUP, FAST),
    )
    lanes, centre, unit, finite = rotation.centre(lanes, inside, size, CENTRED)
    if CENTRED:
        tl.store(means + groups, centre, size > 0)
    lanes, scale = rotation.code(
        *(lanes, unit, finite, n, 1.0, offsets, word, groups, coded, k_a, k_b),
        *(LEVELS, THRESHOLDS, EDEN),
    )
    store_codes(codes + start // 8 * BITS, lanes, eighth, coded, GROUP, BITS)
    tl.store(scales + groups, scale, size > 0)


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def decode_kernel(
    codes,
    scales,
    means,
    x,
    key,
    mask,
    numel,
    stream,
    first,
    MASKED: tl.constexpr,
    LIMIT: tl.constexpr,
    LEVELS: tl.constexpr,
    CENTRED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    eighth = rotation.padded_sizes(size, FAST) // 8
    offsets, inside = lane_offsets(eighth, GROUP, WIDTH), lane_masks(size, eighth, WIDTH, FAST)
    coded = coded_mask(size, eighth, WIDTH, FAST)
    groups = start // GROUP + tl.arange(0, ROWS)[:, None]
    scale = tl.load(scales + groups, size > 0, other=0)
    lanes = load_codes(codes + start // 8 * BITS, eighth, coded, GROUP, BITS)
    word = (start >> 5).to(tl.uint32)
    lanes = rotation.decode(lanes, scale, offsets, word, coded, k_a, k_b, LEVELS)
    if CENTRED:
        mean = tl.load(means + groups, size > 0, other=0).to(tl.float32)
        lanes = [lane + mean for lane in lanes]
    if MASKED:
        lanes = clear_masked(lanes, mask, start, size, offsets, inside, GROUP, FAST, True)
    for lane in tl.static_range(8):
        store_float(x + start + offsets[lane], lanes[lane], inside[lane], LIMIT)


def encode(
    x: Tensor,
    sections: Sequence[Tensor],
    table: Levels,
    bits: int,
    group: int,
    eden: bool,
    key: Tensor,
    stream: int,
    before: Prologue | None = None,
) -> list[Launch]:
    """What writes the payload's sections (codes, scales and, where centred, means) of x."""
    codes, scales, *means = sections
    kind, others = operands(before)
    given = (x, codes, scales.view(torch.int16), (means or [scales])[0], key, *others, x.numel())
    return launches(
        encode_kernel,
        x,
        group,
        *given,
        stream & rng.MASK,
        BEFORE=kind,
        LEVELS=table.levels,
        THRESHOLDS=table.thresholds,
        EDEN=eden,
        CENTRED=bool(means),
        BITS=bits,
    )


def decode(
    sections: Sequence[Tensor],
    x: Tensor,
    table: Levels,
    bits: int,
    group: int,
    key: Tensor,
    stream: int,
    mask: Tensor | None = None,
) -> list[Launch]:
    """What fills a contiguous x from the payload's sections, with 0 where the mask is set."""
    codes, scales, *means = sections
    given = (codes, scales.view(torch.int16), (means or [scales])[0], x, key, mask, x.numel())
    return launches(
        decode_kernel,
        x,
        group,
        *given,
        stream & rng.MASK,
        MASKED=mask is not None,
        LIMIT=torch.finfo(x.dtype).max,
        LEVELS=table.levels,
        CENTRED=bool(means),
        BITS=bits,
    )
