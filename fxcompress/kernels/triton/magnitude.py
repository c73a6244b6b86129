"""Triton kernels of codecs/magnitude.py, with a bf16 step."""

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
    hash_bits,
    largest,
    launches,
    load_codes,
    load_lanes,
    store_codes,
    store_float,
    stream_keys,
    tile,
)


@triton.jit
def relative_norm(lanes, most, regular):
    """|x|_2 / max|x| of each group, by a sum of integers; 1 where it is not regular."""
    safe = tl.where(regular, most, 1.0)
    total = tl.zeros(lanes[0].shape, tl.int64)
    for lane in tl.static_range(8):
        share = (tl.math.div_rn(tl.abs(lanes[lane]), safe) * 32768.0).to(tl.int32)
        total += (share * share).to(tl.int64)
    norm = tl.math.sqrt_rn(tl.sum(total, 1, keep_dims=True).to(tl.float32)) * 2.0**-15
    return tl.where(regular, norm, 1.0)


@triton.jit(do_not_specialize=["numel", "first", "stream"])
def encode_kernel(
    x,
    codes,
    steps,
    key,
    numel,
    stream,
    first,
    LEVELS: tl.constexpr,
    SHARE: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start, size, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_lanes(x + start, offsets, inside, 0)
    lanes = [lane.to(tl.float32) for lane in lanes]
    most, finite = largest(lanes)
    exact = most * SHARE
    if EUCLIDEAN:
        exact *= relative_norm(lanes, most, finite & (most > 0))
    step = ceil_bf16(tl.maximum(exact, 2.0**-100))
    regular = finite & (step < 0x7F80)
    step = tl.where(regular, step, 0x7FC0)
    groups = start // GROUP + tl.arange(0, ROWS)[:, None]
    tl.store(steps + groups, step.to(tl.int16), size > 0)
    r = tl.math.div_rn(
        4194304.0, tl.where(regular, step << 16, 0x3F800000).to(tl.float32, bitcast=True)
    )
    drawn = [
        draw(lanes[lane], r, regular & inside[lane], start + offsets[lane], k_a, k_b, LEVELS)
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    store_codes(codes + start // 8 * BITS, drawn, eighth, coded, GROUP, BITS)
    if not FAST:  # where the codes end at an odd byte, all programs clear the one after it
        end = (numel.to(tl.int64) + 7) // 8 * BITS
        tl.store(codes + end, (end * 0).to(tl.uint8), end % 2 == 1)


@triton.jit
def draw(x, r, regular, index, k_a, k_b, LEVELS: tl.constexpr):
    """Codes as int32: fixed point with 22 fractional bits plus noise, cut off. Irregular: 0."""
    limit: tl.constexpr = LEVELS * 4194304.0
    scaled = tl.minimum(tl.maximum(tl.where(regular, x * r, 0.0), -limit), limit)
    noise = (hash_bits(index.to(tl.uint32), k_a, k_b) >> 10).to(tl.int32)
    return tl.where(regular, ((tl.floor(scaled).to(tl.int32) + noise) >> 22) + LEVELS, 0)


@triton.jit(do_not_specialize=["numel", "first"])
def decode_kernel(
    codes,
    steps,
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
    start, size, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_codes(codes + start // 8 * BITS, eighth, coded, GROUP, BITS)
    groups = start // GROUP + tl.arange(0, ROWS)[:, None]
    step = (tl.load(steps + groups, size > 0, other=0).to(tl.int32) << 16).to(
        tl.float32, bitcast=True
    )
    for lane in tl.static_range(8):
        value = (lanes[lane] - LEVELS).to(tl.float32) * step
        store_float(x + start + offsets[lane], value, inside[lane], LIMIT)


def encode(
    x: Tensor,
    sections: Sequence[Tensor],
    levels: int,
    euclidean: bool,
    group: int,
    key: Tensor,
    stream: int,
) -> list[Launch]:
    """What writes the payload's sections (codes, steps) from a contiguous x."""
    codes, steps = sections
    given = (x, codes, steps.view(torch.int16), key, x.numel(), stream & rng.MASK)
    constants = {"LEVELS": levels, "BITS": (2 * levels).bit_length()}
    share = 1.0 / levels
    return launches(encode_kernel, x, group, *given, SHARE=share, EUCLIDEAN=euclidean, **constants)


def decode(sections: Sequence[Tensor], x: Tensor, levels: int, group: int) -> list[Launch]:
    """What fills a contiguous x from the payload's sections."""
    codes, steps = sections
    given = (codes, steps.view(torch.int16), x, x.numel())
    constants = {"LEVELS": levels, "BITS": (2 * levels).bit_length()}
    limit = torch.finfo(x.dtype).max
    return launches(decode_kernel, x, group, *given, LIMIT=limit, **constants)
