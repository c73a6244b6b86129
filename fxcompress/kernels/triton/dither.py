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


@triton.jit(do_not_specialize=["numel", "stream", "first"])
def decode_kernel(
    codes,
    steps,
    minima,
    x,
    key,
    numel,
    stream,
    first,
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
    for lane in tl.static_range(8):
        noise = hash_bits((start + offsets[lane]).to(tl.uint32), k_a, k_b) >> 17
        centred = (0x7FFF - 2 * noise.to(tl.int32)).to(tl.float32)
        value = lo + lanes[lane].to(tl.float32) * step + centred * (step * 2.0**-16)
        store_float(x + start + offsets[lane], value, inside[lane], LIMIT)


def decode(
    sections: Sequence[Tensor], x: Tensor, bits: int, group: int, key: Tensor, stream: int
) -> list[Launch]:
    """What fills a contiguous x from the payload's sections (codes, steps, minima)."""
    codes, *metadata = sections
    steps, minima = (section.view(torch.int16) for section in metadata)
    given = (codes, steps, minima, x, key, x.numel(), stream & rng.MASK)
    limit = torch.finfo(x.dtype).max
    return launches(decode_kernel, x, group, *given, LIMIT=limit, BITS=bits)
