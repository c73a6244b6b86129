"""Triton kernels of codecs/sign.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.triton import Launch
from fxcompress.kernels.triton.common import (
    largest,
    launches,
    load_codes,
    load_lanes,
    nearest_bf16,
    round_to_int,
    store_codes,
    store_float,
    tile,
)


@triton.jit(do_not_specialize=["numel", "first"])
def encode_kernel(
    x,
    codes,
    scales,
    numel,
    first,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, size, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_lanes(x + start, offsets, inside, 0)
    lanes = [lane.to(tl.float32) for lane in lanes]
    signs = [(lane > 0).to(tl.int32) for lane in lanes]
    store_codes(codes + start // 8, signs, eighth, coded, GROUP, 1)
    if SCALED:
        most, finite = largest(lanes)
        safe = tl.where(finite & (most > 0), most, 1.0)
        total = tl.zeros((ROWS, WIDTH), tl.int32)
        for lane in tl.static_range(8):
            share = tl.math.div_rn(tl.abs(lanes[lane]), safe)
            total += tl.where(finite, round_to_int(share * 32768.0), 0)
        total = tl.sum(total, 1, keep_dims=True).to(tl.float32)
        mean = most * tl.math.div_rn(total, tl.maximum(size, 1).to(tl.float32) * 32768.0)
        mean = tl.where(finite, nearest_bf16(mean), 0x7FC0)
        groups = start // GROUP + tl.arange(0, ROWS)[:, None]
        tl.store(scales + groups, mean.to(tl.int16), size > 0)
        if not FAST:  # where the codes end at an odd byte, all programs clear the one after it
            end = (numel.to(tl.int64) + 7) // 8
            tl.store(codes + end, (end * 0).to(tl.uint8), end % 2 == 1)


@triton.jit(do_not_specialize=["numel", "first"])
def decode_kernel(
    codes,
    scales,
    x,
    numel,
    first,
    LIMIT: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, size, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_codes(codes + start // 8, eighth, coded, GROUP, 1)
    scale = tl.full((ROWS, 1), 1.0, tl.float32)
    if SCALED:
        groups = start // GROUP + tl.arange(0, ROWS)[:, None]
        scale = tl.load(scales + groups, size > 0, other=0).to(tl.int32) << 16
        scale = scale.to(tl.float32, bitcast=True)
    for lane in tl.static_range(8):
        value = (lanes[lane] * 2 - 1).to(tl.float32) * scale
        store_float(x + start + offsets[lane], value, inside[lane], LIMIT)


def encode(x: Tensor, sections: Sequence[Tensor], group: int) -> list[Launch]:
    """What writes the payload's sections (codes and, where scaled, scales) of a contiguous x."""
    codes, *scales = sections
    given = (x, codes, _bits(scales, codes), x.numel())
    return launches(encode_kernel, x, group, *given, SCALED=bool(scales))


def decode(sections: Sequence[Tensor], x: Tensor, group: int) -> list[Launch]:
    """What fills a contiguous x from the payload's sections."""
    codes, *scales = sections
    given = (codes, _bits(scales, codes), x, x.numel())
    limit = torch.finfo(x.dtype).max
    return launches(decode_kernel, x, group, *given, LIMIT=limit, SCALED=bool(scales))


def _bits(scales: Sequence[Tensor], unused: Tensor) -> Tensor:
    return scales[0].view(torch.int16) if scales else unused
