"""What Triton kernels do to a tile that they have read, or are to write: see codecs/fused.py.

Masks have groups of 256, as the codecs that are fused. Statistics of channels are looked up by each
element, a few bytes that come from caches.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fxcompress.kernels.prologue import Filled, Prologue, Standardised
from fxcompress.kernels.triton.common import (
    coded_mask,
    lane_masks,
    lane_offsets,
    load_codes,
    load_lanes,
    store_codes,
)


def operands(before: Prologue | None) -> tuple[str, tuple[Any, ...]]:
    """BEFORE and (fill, mask, mean, rstd, channels, inner) of an encoder."""
    if isinstance(before, Filled):
        return "filled", (before.fill, before.mask, None, None, 0, 0)
    if isinstance(before, Standardised):
        units = (before.mean, before.rstd, before.mean.numel(), before.inner)
        return "standardised", (None, None, *units)
    return "nothing", (None, None, None, None, 0, 0)


@triton.jit
def prepared_lanes(
    x,
    start,
    size,
    offsets,
    inside,
    fill,
    mask,
    mean,
    rstd,
    channels,
    inner,
    BEFORE: tl.constexpr,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
):
    """A tile's lanes as fp32, after what is done before: 0 where there is nothing."""
    lanes = load_lanes(x + start, offsets, inside, 0)
    lanes = [lane.to(tl.float32) for lane in lanes]
    if BEFORE == "filled":
        zeros = zero_lanes(lanes, inside)
        store_mask(mask, x, start, size, zeros, GROUP, FAST)
        value = tl.load(fill).to(tl.float32)
        lanes = [tl.where(zeros[lane], value, lanes[lane]) for lane in (0, 1, 2, 3, 4, 5, 6, 7)]
    if BEFORE == "standardised":
        lanes = [
            standardise(
                lanes[lane], start, offsets[lane], inside[lane], mean, rstd, channels, inner
            )
            for lane in (0, 1, 2, 3, 4, 5, 6, 7)
        ]
    return lanes


@triton.jit
def zero_lanes(lanes, inside):
    """Which elements a mask has set."""
    return [(lanes[lane] <= 0) & inside[lane] for lane in (0, 1, 2, 3, 4, 5, 6, 7)]


@triton.jit
def store_mask(mask, x, start, size, zeros, GROUP: tl.constexpr, FAST: tl.constexpr):
    """Pack a tile of a mask. Lanes of a short group, which its codec may pad, are read again."""
    WIDTH: tl.constexpr = zeros[0].shape[1]
    eighth = (size + 7) // 8
    if not FAST:
        offsets, inside = lane_offsets(eighth, GROUP, WIDTH), lane_masks(size, eighth, WIDTH, FAST)
        lanes = load_lanes(x + start, offsets, inside, 0)
        zeros = zero_lanes([lane.to(tl.float32) for lane in lanes], inside)
    flags = [zero.to(tl.int32) for zero in zeros]
    store_codes(mask + start // 8, flags, eighth, coded_mask(size, eighth, WIDTH, FAST), GROUP, 1)


@triton.jit
def mask_bits(mask, offset, inside, eighth, GROUP: tl.constexpr):
    """Bit by bit, for elements in any lanes. mask: where the bytes of the first group are."""
    row, length = tl.arange(0, offset.shape[0])[:, None], tl.maximum(eighth, 1)
    # Not offset - row * GROUP: Triton 3.6's LLVM then reads the codes of two lanes elsewhere.
    at = offset % GROUP
    byte = tl.load(mask + row * (GROUP // 8) + at % length, inside, other=0).to(tl.int32)
    return ((byte >> (at // length)) & 1) != 0


@triton.jit
def clear_masked(
    lanes,
    mask,
    start,
    size,
    offsets,
    inside,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
    PADDED: tl.constexpr = False,
):
    """Lanes, 0 where the mask is set.

    PADDED: those of a short group are not its eighths, as the lanes of its mask are.
    """
    eighth = (size + 7) // 8
    if FAST or not PADDED:
        coded = coded_mask(size, eighth, inside[0].shape[1], FAST)
        flags = load_codes(mask + start // 8, eighth, coded, GROUP, 1)
        zeros = [flag != 0 for flag in flags]
    else:
        zeros = [
            mask_bits(mask + start // 8, offsets[lane], inside[lane], eighth, GROUP)
            for lane in (0, 1, 2, 3, 4, 5, 6, 7)
        ]
    return [tl.where(zeros[lane], 0.0, lanes[lane]) for lane in (0, 1, 2, 3, 4, 5, 6, 7)]


@triton.jit
def standardise(lane, start, offset, inside, mean, rstd, channels, inner):
    """(x - mean) * rstd of the elements `offset` after `start`."""
    first, into = (start // inner) % channels, start % inner
    channel = (first.to(tl.int32) + (into.to(tl.int32) + offset) // inner) % channels
    found = tl.load(mean + channel, inside, other=0), tl.load(rstd + channel, inside, other=0)
    return tl.where(inside, (lane - found[0]) * found[1], 0.0)
