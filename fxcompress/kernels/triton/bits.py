"""Triton kernels of codecs/bits.py: only the low byte of an item can tell its code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.triton import Launch
from fxcompress.kernels.triton.common import (
    launches,
    load_codes,
    load_lanes,
    store_codes,
    tile,
)

GROUP = 256


@triton.jit(do_not_specialize=["numel", "first", "low"])
def encode_kernel(
    x,
    codes,
    numel,
    low,
    first,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, _, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    low = low.to(x.dtype.element_ty)
    lanes = load_lanes(x + start, offsets, inside, low)
    lanes = [(lane - low).to(tl.int32) for lane in lanes]
    store_codes(codes + start // 8 * BITS, lanes, eighth, coded, GROUP, BITS)


@triton.jit(do_not_specialize=["numel", "first", "low"])
def decode_kernel(
    codes,
    x,
    numel,
    low,
    first,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    start, _, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_codes(codes + start // 8 * BITS, eighth, coded, GROUP, BITS)
    for lane in tl.static_range(8):
        value = lanes[lane].to(x.dtype.element_ty) + low.to(x.dtype.element_ty)
        tl.store(x + start + offsets[lane], value, inside[lane])


def encode(x: Tensor, codes: Tensor, bits: int, low: int) -> list[Launch]:
    """What packs a contiguous x."""
    x = _bytes(x)
    return launches(encode_kernel, x, GROUP, x, codes, x.numel(), low, BITS=bits)


def decode(codes: Tensor, x: Tensor, bits: int, low: int) -> list[Launch]:
    """What fills a contiguous x."""
    x = _bytes(x)
    return launches(decode_kernel, x, GROUP, codes, x, x.numel(), low, BITS=bits)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x
