"""Triton kernels of codecs/subsample.py: the drawn elements are picked out of the registers.

A span's eight lanes are K times as long as those of the group drawn from it: a lane [ROWS, WIDTH]
is reshaped to [ROWS, WIDTH/K, K], whose last axis, the blocks, a thread holds or shares with a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs.levels import Levels
from fxcompress.kernels.triton import Launch, rotation
from fxcompress.kernels.triton.common import (
    coded_mask,
    group_sizes,
    hash_bits,
    lane_masks,
    lane_offsets,
    launches,
    load_codes,
    load_lanes,
    store_codes,
    store_float,
    stream_keys,
    tile_start,
)

DRAWN = 256  # elements of a group


@triton.jit
def chosen(offsets, first, k_a, k_b, K: tl.constexpr):
    """Whether each element of a lane's blocks is the drawn one: int1[ROWS, blocks, K]."""
    hashes = hash_bits(first.to(tl.uint32) + offsets.to(tl.uint32), k_b, k_a)
    at = (hashes.to(tl.uint64) * K >> 32).to(tl.int32)
    return at[:, :, None] == tl.arange(0, K)[None, None, :]


@triton.jit
def pick(lane, drawn):
    """The drawn element of each block, fp32[ROWS, blocks]: a sum of bits, all but one of them 0."""
    blocks = tl.reshape(lane, drawn.shape).to(tl.int32, bitcast=True)
    return tl.sum(tl.where(drawn, blocks, 0), 2).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def encode_kernel(
    x,
    codes,
    scales,
    means,
    key,
    numel,
    stream,
    first,
    LEVELS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    n = rotation.padded_sizes((size + K - 1) // K, FAST)
    eighth = n // 8
    inside = lane_masks(size, eighth * K, WIDTH, FAST)
    lanes = load_lanes(x + start, lane_offsets(eighth * K, GROUP, WIDTH), inside, 0)
    lanes = [lane.to(tl.float32) for lane in lanes]
    lanes, mean, unit, finite = rotation.centre(lanes, inside, size, True)

    offsets = lane_offsets(eighth, GROUP // K, WIDTH // K)
    coded = coded_mask(size, eighth, WIDTH // K, FAST)
    groups, at = start // GROUP + tl.arange(0, ROWS)[:, None], start // K
    lanes = [
        pick(lanes[lane], chosen(offsets[lane], at, k_a, k_b, K))
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    word = (at >> 5).to(tl.uint32)
    lanes, scale = rotation.code(
        *(lanes, unit, finite, n, 1.0 * K, offsets, word, groups, coded, k_a, k_b),
        *(LEVELS, THRESHOLDS, True),
    )
    store_codes(codes + at // 8, lanes, eighth, coded, GROUP // K, 1)
    tl.store(scales + groups, scale, size > 0)
    mean = tl.where(finite, mean.to(tl.int16, bitcast=True), 0x7FC0)
    tl.store(means + groups, mean.to(tl.int16), size > 0)


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def decode_kernel(
    codes,
    scales,
    means,
    x,
    key,
    numel,
    stream,
    first,
    LIMIT: tl.constexpr,
    LEVELS: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    eighth = rotation.padded_sizes((size + K - 1) // K, FAST) // 8
    offsets = lane_offsets(eighth, GROUP // K, WIDTH // K)
    coded = coded_mask(size, eighth, WIDTH // K, FAST)
    groups, at = start // GROUP + tl.arange(0, ROWS)[:, None], start // K
    scale = tl.load(scales + groups, size > 0, other=0)
    mean = (tl.load(means + groups, size > 0, other=0).to(tl.int32) << 16).to(
        tl.float32, bitcast=True
    )
    lanes = load_codes(codes + at // 8, eighth, coded, GROUP // K, 1)
    lanes = rotation.decode(lanes, scale, offsets, (at >> 5).to(tl.uint32), coded, k_a, k_b, LEVELS)
    out, inside = lane_offsets(eighth * K, GROUP, WIDTH), lane_masks(size, eighth * K, WIDTH, FAST)
    for lane in tl.static_range(8):
        drawn = chosen(offsets[lane], at, k_a, k_b, K)
        value = tl.where(drawn, (lanes[lane] + mean)[:, :, None], mean[:, :, None])
        value = tl.reshape(value, (ROWS, WIDTH))
        store_float(x + start + out[lane], value, inside[lane], LIMIT)


def encode(
    x: Tensor, sections: Sequence[Tensor], table: Levels, block: int, key: Tensor, stream: int
) -> list[Launch]:
    """What writes the payload's sections (codes, scales, means) from a contiguous x."""
    codes, *metadata = sections
    scales, means = (section.view(torch.int16) for section in metadata)
    given = (x, codes, scales, means, key, x.numel(), stream & rng.MASK)
    group = DRAWN * block
    constants: dict[str, Any] = {"LEVELS": table.levels, "THRESHOLDS": table.thresholds, "K": block}
    return launches(encode_kernel, x, group, *given, **constants)


def decode(
    sections: Sequence[Tensor], x: Tensor, table: Levels, block: int, key: Tensor, stream: int
) -> list[Launch]:
    """What fills a contiguous x from the payload's sections."""
    codes, *metadata = sections
    scales, means = (section.view(torch.int16) for section in metadata)
    given = (codes, scales, means, x, key, x.numel(), stream & rng.MASK)
    group = DRAWN * block
    constants: dict[str, Any] = {
        "LIMIT": torch.finfo(x.dtype).max,
        "LEVELS": table.levels,
        "K": block,
    }
    return launches(decode_kernel, x, group, *given, **constants)
