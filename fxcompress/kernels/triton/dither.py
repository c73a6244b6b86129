"""Triton kernel of codecs/dither.py, which encodes as affine does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.kernels.triton import Launch
from fxcompress.kernels.triton.affine import load_grid
from fxcompress.kernels.triton.common import (
    hash_bits,
    launches,
    load_codes,
    store_float,
    stream_keys,
    tile,
)
from fxcompress.kernels.triton.fused import clear_masked


@triton.jit
def noise(index, step, k_a, k_b):
    """The noise that drew the codes of these elements, as it is subtracted."""
    drawn = hash_bits(index.to(tl.uint32), k_a, k_b) >> 17
    return (0x7FFF - 2 * drawn.to(tl.int32)).to(tl.float32) * (step * 2.0**-16)


@triton.jit(do_not_specialize=["numel", "stream", "first"])
def decode_kernel(
    codes,
    steps,
    minima,
    x,
    key,
    mask,
    numel,
    stream,
    first,
    MASKED: tl.constexpr,
    LIMIT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    start, size, eighth, offsets, inside, coded = tile(numel, first, GROUP, ROWS, WIDTH, FAST)
    lanes = load_codes(codes + start // 8 * BITS, eighth, coded, GROUP, BITS)
    step, lo = load_grid(steps, minima, start // GROUP, size)
    lanes = [
        lo + lanes[lane].to(tl.float32) * step + noise(start + offsets[lane], step, k_a, k_b)
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
    if MASKED:
        lanes = clear_masked(lanes, mask, start, size, offsets, inside, GROUP, FAST)
    for lane in tl.static_range(8):
        store_float(x + start + offsets[lane], lanes[lane], inside[lane], LIMIT)


def decode(
    sections: Sequence[Tensor],
    x: Tensor,
    bits: int,
    group: int,
    key: Tensor,
    stream: int,
    mask: Tensor | None = None,
) -> list[Launch]:
    """What fills a contiguous x from the payload's sections (codes, steps, minima), with 0 where
    the mask is set."""
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (codes, steps, minima, x, key, mask, x.numel(), stream & rng.MASK)
    limit, masked = torch.finfo(x.dtype).max, mask is not None
    return launches(decode_kernel, x, group, *given, MASKED=masked, LIMIT=limit, BITS=bits)
