"""Triton kernels of codecs/mixture.py: one run over the buckets of each resolution.

The buckets at one resolution are listed; a program reads its rows from wherever they are and writes
their codes one after the other. One pass: every bucket is read once, by the kernel of its width.
The list takes a sort of one hash a bucket before, as the definition draws exactly k of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.kernels.triton import Launch
from fxcompress.kernels.triton.common import (
    ceil_bf16,
    coded_mask,
    group_sizes,
    hash_bits,
    lane_masks,
    lane_offsets,
    largest,
    launches,
    load_codes,
    load_lanes,
    mix,
    store_codes,
    store_float,
    stream_keys,
    tile_start,
)
from fxcompress.kernels.triton.magnitude import relative_norm

_HASHED = 1024  # buckets a program


@triton.jit(do_not_specialize=["count", "stream"])
def hash_kernel(out, key, count, stream, SIZE: tl.constexpr):
    """What buckets are ranked by, int64; apart from the noise of the elements."""
    k_a, k_b = stream_keys(key, stream)
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    found = hash_bits(index.to(tl.uint32), mix(k_a ^ 0xC2B2AE35), mix(k_b ^ 0xC2B2AE35))
    tl.store(out + index, found.to(tl.int64), index < count)


@triton.jit
def rows_of(buckets, start, size, GROUP: tl.constexpr):
    """int64[ROWS, 1]: the buckets of a tile of the list."""
    row = start // GROUP + tl.arange(0, size.shape[0])[:, None]
    return tl.load(buckets + row, size > 0, other=0)


@triton.jit
def draw(x, r, regular, index, k_a, k_b, LEVELS: tl.constexpr):
    """Codes as int32, LEVELS and up for a positive x: fixed point with 22 bits, noise, cut off."""
    fixed = tl.minimum((tl.abs(x) * r).to(tl.int32), LEVELS << 22)
    noise = (hash_bits(index.to(tl.uint32), k_a, k_b) >> 10).to(tl.int32)
    q = tl.where(regular, (fixed + noise) >> 22, 0)
    return LEVELS + tl.where(x < 0, -q, q)


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def encode_kernel(
    x,
    codes,
    scales,
    buckets,
    key,
    numel,
    stream,
    first,
    LEVELS: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    bucket = rows_of(buckets, start, size, GROUP)
    eighth = (size + 7) // 8
    inside = lane_masks(size, eighth, WIDTH, FAST)
    offsets = [bucket * GROUP + column for column in lane_offsets(eighth, 0, WIDTH)]
    lanes = load_lanes(x, offsets, inside, 0)
    lanes = [lane.to(tl.float32) for lane in lanes]
    most, finite = largest(lanes)
    regular = finite & (most > 0)
    exact = most * relative_norm(lanes, most, regular) if EUCLIDEAN else most
    scale = tl.minimum(ceil_bf16(tl.maximum(exact, 2.0**-96)), 0x7F7F)
    scale = tl.where(finite, tl.where(most > 0, scale, 0), 0x7FC0)
    tl.store(scales + bucket, scale.to(tl.int16), size > 0)
    safe = tl.where(regular, scale << 16, 0x3F800000).to(tl.float32, bitcast=True)
    r = tl.math.div_rn(LEVELS * 4194304.0, safe)
    drawn = [
        draw(lanes[lane], r, regular, offsets[lane], k_a, k_b, LEVELS)
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    drawn = [tl.where(inside[lane], drawn[lane], 0) for lane in (0, 1, 2, 3, 4, 5, 6, 7)]
    coded = coded_mask(size, eighth, WIDTH, FAST)
    store_codes(codes + start // 8 * BITS, drawn, eighth, coded, GROUP, BITS)


@triton.jit(do_not_specialize=["numel", "first"])
def decode_kernel(
    codes,
    scales,
    buckets,
    x,
    numel,
    first,
    LIMIT: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    bucket = rows_of(buckets, start, size, GROUP)
    eighth = (size + 7) // 8
    offsets, inside = lane_offsets(eighth, 0, WIDTH), lane_masks(size, eighth, WIDTH, FAST)
    coded = coded_mask(size, eighth, WIDTH, FAST)
    lanes = load_codes(codes + start // 8 * BITS, eighth, coded, GROUP, BITS)
    scale = tl.load(scales + bucket, size > 0, other=0).to(tl.int32) << 16
    scale = scale.to(tl.float32, bitcast=True)
    for lane in tl.static_range(8):
        share = tl.math.div_rn((lanes[lane] - LEVELS).to(tl.float32), 1.0 * LEVELS)
        store_float(x + bucket * GROUP + offsets[lane], share * scale, inside[lane], LIMIT)


def hashes(out: Tensor, key: Tensor, stream: int) -> list[Launch]:
    """What fills int64[buckets] with what they are ranked by."""
    programs = -(-out.numel() // _HASHED)
    given = (out, key, out.numel(), stream & rng.MASK)
    return [Launch(hash_kernel, programs, 4, given, {"SIZE": _HASHED})] if programs else []


def encode(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    buckets: Tensor,
    numel: int,
    levels: int,
    euclidean: bool,
    group: int,
    key: Tensor,
    stream: int,
) -> list[Launch]:
    """What writes codes and scales of the listed buckets, `numel` elements, of a contiguous x."""
    given = (x, codes, scales.view(torch.int16), buckets, key, numel, stream & rng.MASK)
    constants = {"LEVELS": levels, "BITS": (2 * levels).bit_length(), "EUCLIDEAN": euclidean}
    return launches(encode_kernel, x, group, *given, numel=numel, **constants)


def decode(
    sections: Sequence[Tensor], buckets: Tensor, x: Tensor, numel: int, levels: int, group: int
) -> list[Launch]:
    """What fills the listed buckets of a contiguous x from (codes, scales)."""
    codes, scales = sections
    given = (codes, scales.view(torch.int16), buckets, x, numel)
    constants = {"LEVELS": levels, "BITS": (2 * levels).bit_length()}
    limit = torch.finfo(x.dtype).max
    return launches(decode_kernel, x, group, *given, numel=numel, LIMIT=limit, **constants)
