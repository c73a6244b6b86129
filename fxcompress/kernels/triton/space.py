"""Triton kernels over blocks of neighbours in space (codecs/blocks.py): means, extremes, look-ups.

A plane is one channel of one sample; channels run fastest in memory (channels-last, tokens) or
slowest within a sample. Blocks are taken in tiles that read memory as it lies: [P, BH, BW, V] with
V channels, or [P, BH, V/BW, BW] with V neighbours of a row. Whole tiles of whole blocks take the
fast path, ragged edges the masked one.

What belongs to planes cannot be had in the pass that uses it: a plane's extremes are known after
all of it was read, and its elements are spread over the whole sample where channels run fastest. So
extremes are a pass of their own (atomic minima and maxima of integers, in whatever order), fused
with that of the means. The pass after it looks up what each element needs: small tables that the
L1 cache holds, for more bytes asked for, not moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.codecs import blocks
from fxcompress.kernels.triton import Launch, warp_size
from fxcompress.kernels.triton.affine import grid, ordered
from fxcompress.kernels.triton.common import nearest_bf16

_TILE = 4096  # elements a program, at most
_ROWS = 1024  # grids a program
_THREADS = 128
_LANE = 32  # elements of a lane of 256
_MOST = 1 << 31  # elements of a sample, and means: numbers of 32 bits


@dataclass(frozen=True)
class Space:
    """Blocks of neighbours of a tensor, samples first.

    Attributes:
        samples, channels: sizes; planes: their product.
        lead, height, wide: sizes of the positions; blocks lie in the last two.
        sides: of a block along those two.
        cells: means along those two.
        is_last: channels run fastest.
        is_stretched: a position reads the mean nearest to it, not that of its block.
    """

    samples: int
    channels: int
    lead: int
    height: int
    wide: int
    sides: tuple[int, int]
    cells: tuple[int, int]
    is_last: bool
    is_stretched: bool

    @property
    def planes(self) -> int:
        return self.samples * self.channels

    @property
    def is_whole(self) -> bool:
        """No block is ragged."""
        return self.height % self.sides[0] == 0 and self.wide % self.sides[1] == 0

    @property
    def arguments(self) -> tuple[int, ...]:
        """As `lookup` takes them."""
        size = self.channels * self.lead * self.height * self.wide
        return (size, self.channels, self.height, self.wide, *self.cells)

    @property
    def fastest(self) -> int:
        """Size of the axis that runs fastest in memory."""
        return self.channels if self.is_last else self.wide

    @property
    def constants(self) -> dict[str, Any]:
        """As `lookup` takes them."""
        sides = {"BH": self.sides[0], "BW": self.sides[1]}
        kind = {"LAST": self.is_last, "STRETCHED": self.is_stretched}
        return {**sides, **kind, "RUN": min(_power_of_two_in(self.fastest), _LANE)}


def space(
    shape: Sequence[int], channels: int, sides: Sequence[int], *, floor: bool = False
) -> Space | None:
    """Where the blocks of a contiguous tensor are; None where the kernels cannot say.

    Args:
        shape, channels: see :func:`fxcompress.codecs.blocks.layout`.
        sides: of blocks over the last position axes.
        floor: see :func:`fxcompress.codecs.blocks.pooled`.
    """
    laid, axis = blocks.layout(shape, channels)
    positions = [*laid[1:axis], *laid[axis + 1 :]]
    size = 1
    for length in laid[1:]:
        size *= length
    is_first = axis == 1 or laid[axis] == 1
    if not size or size >= _MOST or not (is_first or axis == len(laid) - 1):
        return None
    *_, cells_h, cells_w = [1, *blocks.pooled(laid, axis, sides, floor=floor)[2:]]
    wide = positions[-1]
    height = positions[-2] if len(sides) > 1 else 1
    lead = size // laid[axis] // (height * wide)
    if len(sides) == 1:
        cells_h = 1
    found = Space(
        samples=laid[0],
        channels=laid[axis],
        lead=lead,
        height=height,
        wide=wide,
        sides=(sides[0] if len(sides) > 1 else 1, sides[-1]),
        cells=(cells_h, cells_w),
        is_last=not is_first,
        is_stretched=False,
    )
    if found.planes * lead * cells_h * cells_w >= _MOST:
        return None
    if floor and not found.is_whole:
        return Space(**{**found.__dict__, "is_stretched": True})
    return found


@triton.jit
def lookup(
    start,
    lane,
    eighth,
    size,
    channels,
    height,
    wide,
    cells_h,
    cells_w,
    BH: tl.constexpr,
    BW: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHED: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(plane, mean), int32[ROWS, WIDTH/RUN, 1 to RUN], of a lane's elements; `spread` shows them.

    RUN: elements that follow each other in a row of memory's fastest axis.
    """
    ROWS: tl.constexpr = eighth.shape[0]
    row = tl.arange(0, ROWS)[:, None] * GROUP + lane * eighth
    offset = row + tl.arange(0, WIDTH // RUN)[None, :] * RUN
    rest = (start % size + offset).to(tl.uint32)
    lead = size // channels // (height * wide)
    first = (start // size).to(tl.int32)
    area = (lead * cells_h * cells_w).to(tl.int32)
    size, channels = size.to(tl.uint32), channels.to(tl.uint32)
    height, wide = height.to(tl.uint32), wide.to(tl.uint32)
    positions = size // channels
    sample = first + (rest // size).to(tl.int32)
    rest %= size
    if LAST:
        position, channel = rest // channels, rest % channels
    else:
        channel, position = rest // positions, rest % positions
    plane = sample * channels.to(tl.int32) + channel.to(tl.int32)
    line, w = position // wide, (position % wide)[:, :, None]
    h = line % height
    h = h * cells_h.to(tl.uint32) // height if STRETCHED else h // BH
    line = (plane * lead.to(tl.int32) + (line // height).to(tl.int32)) * cells_h.to(tl.int32)
    line = ((line + h.to(tl.int32)) * cells_w.to(tl.int32))[:, :, None]
    plane, along = plane[:, :, None], tl.arange(0, RUN)[None, None, :]
    if LAST:
        plane = tl.multiple_of(plane, (1, 1, RUN)) + along
        line += along * area
    elif STRETCHED:
        w += along.to(tl.uint32)
    elif RUN > BW:
        w += (tl.arange(0, RUN // BW) * BW)[None, None, :].to(tl.uint32)
    w = w * cells_w.to(tl.uint32) // wide if STRETCHED else w // BW
    return plane, line + w.to(tl.int32)


@triton.jit
def spread(value, RUN: tl.constexpr):
    """[ROWS, runs, n] as [ROWS, runs * RUN]: each of n for its share of a run."""
    ROWS: tl.constexpr = value.shape[0]
    RUNS: tl.constexpr = value.shape[1]
    N: tl.constexpr = value.shape[2]
    if N < RUN:
        value = tl.broadcast_to(value[:, :, :, None], (ROWS, RUNS, N, RUN // N))
    return tl.reshape(value, (ROWS, RUNS * RUN))


@triton.jit
def load_spread(table, at, inside, RUN: tl.constexpr, FAST: tl.constexpr):
    """What a lane's elements have in a table; runs of one where not FAST."""
    if FAST:
        return spread(tl.load(table + at), RUN)
    else:
        return spread(tl.load(table + at, inside[:, :, None], other=0), RUN)


@triton.jit
def as_low(value):
    """Means as fp32, of bf16's bits or fp32; 0 where they are not finite."""
    bits = value.to(tl.int32) << 16 if value.dtype == tl.int16 else value
    bits = bits.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def halves(y, AXIS: tl.constexpr):
    """The sum over an axis of [A, B, C, D]: its halves added until one is left."""
    A: tl.constexpr = y.shape[0]
    B: tl.constexpr = y.shape[1]
    C: tl.constexpr = y.shape[2]
    D: tl.constexpr = y.shape[3]
    LENGTH: tl.constexpr = y.shape[AXIS]
    for log2 in tl.static_range(4):
        if (1 << log2) < LENGTH:
            if AXIS == 1:
                y = tl.sum(tl.reshape(y, (A, 2, LENGTH >> (log2 + 1), C, D)), 1)
            elif AXIS == 2:
                y = tl.sum(tl.reshape(y, (A, B, 2, LENGTH >> (log2 + 1), D)), 2)
            else:
                y = tl.sum(tl.reshape(y, (A, B, C, 2, LENGTH >> (log2 + 1))), 3)
    return y


@triton.jit(do_not_specialize=["size", "channels", "height", "wide", "cells_h", "cells_w", "first"])
def survey_kernel(
    x,
    low,
    ends,
    size,
    channels,
    height,
    wide,
    cells_h,
    cells_w,
    planes,
    units,
    first,
    BH: tl.constexpr,
    BW: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHED: tl.constexpr,
    MEANS: tl.constexpr,
    RAW: tl.constexpr,
    ENDS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    FAST: tl.constexpr,
):
    """MEANS: write them (RAW: as they are, else kept finite, and in bf16 if `low` is).

    ENDS: the least and the greatest of x less its mean (`low` where not MEANS) in each plane, as
    integers in the total order: int32[2, planes].
    """
    lead = size // channels // (height * wide)
    fast = channels if LAST else wide  # the length of memory's fastest axis
    if FAST:
        fast = fast // V * V  # so that the compiler knows
    chunks = (fast + V - 1) // V
    down = (height + BH - 1) // BH
    K: tl.constexpr = 1 if LAST else V // BW
    program = first + tl.program_id(0)
    column = (program % chunks) * V
    unit = (program // chunks).to(tl.int64) * P + tl.arange(0, P)
    if LAST:
        across = (wide + BW - 1) // BW
        cw, row = unit % across, unit // across
        ch, line = row % down, row // down  # of samples and leading positions
        plane_of_line = line // lead * channels
    else:
        cw = unit * 0
        ch, line = unit % down, unit // down  # of planes and leading positions
        plane_of_line = line // lead
    h = ch[:, None] * BH + tl.arange(0, BH)[None, :]
    base = line[:, None] * height + h
    if LAST:
        w = cw[:, None] * BW + tl.arange(0, BW)[None, :]
        c = column + tl.arange(0, V)
        at = ((base * wide)[:, :, None] + w[:, None, :]) * fast
        at = at[:, :, :, None] + c[None, None, None, :]
        w4, h4, c4 = w[:, None, :, None], h[:, :, None, None], c[None, None, None, :]
    else:
        w = (column + tl.arange(0, V))[None, None, None, :]
        at = (base * fast)[:, :, None, None] + w
        w4, h4, c4 = w, h[:, :, None, None], 0
    real = (unit < units)[:, None, None, None]
    inside = real & (h4 < height) & (w4 < wide) & (c4 < channels)
    y = tl.load(x + at) if FAST else tl.load(x + at, inside, other=0)
    y = y.to(tl.float32)
    if LAST:
        plane = plane_of_line[:, None] + c[None, :]
        cell_w = cw[:, None] + c[None, :] * 0
        there = (unit < units)[:, None] & (c < channels)[None, :]
    else:
        plane = plane_of_line[:, None] + tl.arange(0, K)[None, :] * 0
        cell_w = column // BW + tl.arange(0, K)[None, :] + ch[:, None] * 0
        there = (unit < units)[:, None] & (cell_w * BW < wide)
    if LAST:
        in_plane = plane * lead + (line % lead)[:, None]
    else:
        in_plane = line[:, None] + tl.arange(0, K)[None, :] * 0
    if MEANS:
        mean = y * (1.0 / (BH * BW))
        if not LAST:
            mean = tl.reshape(mean, (P, BH, K, BW))
        mean = halves(halves(mean, 2 if LAST else 3), 1)
        mean = tl.reshape(mean, plane.shape)
        if not FAST:
            here_h = tl.minimum(height - ch * BH, BH)[:, None].to(tl.float32)
            here_w = tl.minimum(wide - cell_w * BW, BW).to(tl.float32)
            mean = tl.math.div_rn(mean, here_h * (here_w * (1.0 / (BH * BW))))
        cell = (in_plane * cells_h + ch[:, None]) * cells_w + cell_w
        written = there
        if STRETCHED:  # only whole blocks have means
            written &= (ch[:, None] < cells_h) & (cell_w < cells_w)
        if not RAW:
            finite = (mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
            limit: tl.constexpr = 3.3895313892515355e38  # bf16's largest
            mean = tl.where(finite, tl.minimum(tl.maximum(mean, -limit), limit), 0.0)
        if low.dtype.element_ty == tl.int16:
            bits = nearest_bf16(mean)
            mean = (bits << 16).to(tl.float32, bitcast=True)
            bits = bits.to(tl.int16)
        else:
            bits = mean
        if FAST:
            tl.store(low + cell, bits)
        else:
            tl.store(low + cell, bits, written)
    if ENDS:
        if MEANS:
            if LAST:
                low_here = mean[:, None, None, :]
            else:
                low_here = tl.broadcast_to(mean[:, :, None], (P, K, BW))
                low_here = tl.reshape(low_here, (P, V))[:, None, None, :]
        else:
            if STRETCHED:
                below, right = h4 * cells_h // height, w4 * cells_w // wide
            else:
                below, right = h4 // BH, w4 // BW
            own = in_plane[:, None, None, :] if LAST else line[:, None, None, None]
            cell = (own * cells_h + below) * cells_w + right
            if FAST:
                low_here = as_low(tl.load(low + cell))
            else:
                low_here = as_low(tl.load(low + cell, inside, other=0))
        order = ordered((y - low_here).to(tl.int32, bitcast=True))
        if FAST:
            lowest, highest = order, order
        else:
            lowest = tl.where(inside, order, 0x7FFFFFFF)
            highest = tl.where(inside, order, -0x80000000)
        if LAST:
            lowest, highest = tl.min(tl.min(lowest, 2), 1), tl.max(tl.max(highest, 2), 1)
        else:
            lowest, highest = tl.min(tl.min(lowest, 3), 1), tl.max(tl.max(highest, 3), 1)
            lowest, highest = tl.min(lowest, 1, keep_dims=True), tl.max(highest, 1, keep_dims=True)
            plane, there = plane_of_line[:, None], (unit < units)[:, None]
        tl.atomic_min(ends + plane, lowest, there, sem="relaxed")
        tl.atomic_max(ends + planes + plane, highest, there, sem="relaxed")


@triton.jit(do_not_specialize=["count", "per_row"])
def grid_kernel(
    ends, tops, steps, minima, rates, count, per_row, BITS: tl.constexpr, SIZE: tl.constexpr
):
    """The grids of `count` extremes int32[2, count]: (lo, step) in bf16, and 2^22/step or 0.

    BITS: of all; 0 where row i has `tops[i // per_row]` of them.
    """
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    real = row < count
    lowest = tl.load(ends + row, real, other=0)
    highest = tl.load(ends + count + row, real, other=0)
    if BITS:
        last = tl.full((SIZE,), (1 << BITS) - 1, tl.int32)
    else:
        last = (1 << tl.load(tops + row // per_row, real, other=1).to(tl.int32)) - 1
    last = last.to(tl.float32)
    lo, step, regular = grid(lowest, highest, last, tl.math.div_rn(1.0, last))
    r = tl.where(regular, tl.math.div_rn(4194304.0, tl.where(regular, step, 1.0)), 0.0)
    tl.store(steps + row, (step.to(tl.int32, bitcast=True) >> 16).to(tl.int16), real)
    tl.store(minima + row, (lo.to(tl.int32, bitcast=True) >> 16).to(tl.int16), real)
    tl.store(rates + row, r, real)


def survey(
    x: Tensor, low: Tensor, ends: Tensor | None, where: Space, *, means: bool, raw: bool = False
) -> list[Launch]:
    """What writes means (fp32, or bf16 as int16) or, from given ones, extremes, or both.

    ends: int32[2, planes] as :func:`no_ends` makes them; None where they are not wanted.
    """
    bh, bw = where.sides
    vector, fastest = 16 // x.element_size(), where.fastest
    regular = where.is_whole and fastest % max(vector, 1 if where.is_last else bw) == 0
    most = max(min(64, _TILE // (bh * bw if where.is_last else bh)), 1)
    if not where.is_last:
        most = max(most, bw)
    width = triton.next_power_of_2(fastest)
    if regular:
        width = _power_of_two_in(fastest)
    width = min(width, most) if where.is_last else max(min(width, most), bw)
    rows = max(_TILE // (width * bh * (bw if where.is_last else 1)), 1)
    lines = where.samples * where.lead * (1 if where.is_last else where.channels)
    units = lines * -(-where.height // bh) * (-(-where.wide // bw) if where.is_last else 1)
    chunks = -(-fastest // width)
    constants = {
        **{k: v for k, v in where.constants.items() if k != "RUN"},
        "MEANS": means,
        "RAW": raw,
        "ENDS": ends is not None,
        "P": rows,
        "V": width,
    }
    given = (x, low, low if ends is None else ends, *where.arguments, where.planes, units)
    whole = units // rows if regular else 0
    found = []
    for first, count, fast in ((0, whole, True), (whole, -(-units // rows) - whole, False)):
        if count:
            arguments = (*given, first * chunks)
            kind = {**constants, "FAST": fast}
            warps = _THREADS // warp_size()
            found.append(Launch(survey_kernel, count * chunks, warps, arguments, kind))
    return found


def _power_of_two_in(size: int) -> int:
    """The largest power of two that divides it."""
    return size & -size


def no_ends(count: int, device: torch.device) -> Tensor:
    """int32[2, count]: the extremes of nothing."""
    ends = torch.full((2, count), 0x7FFFFFFF, dtype=torch.int32, device=device)
    ends[1].fill_(-0x80000000)
    return ends


def grids(
    ends: Tensor,
    steps: Tensor,
    minima: Tensor,
    rates: Tensor,
    bits: int | Tensor,
    per_row: int = 1,
) -> list[Launch]:
    """What writes the grids of extremes int32[2, count]; `bits` of each `per_row` of them."""
    count = ends.shape[1]
    fixed, tops = (bits, ends) if isinstance(bits, int) else (0, bits)
    steps, minima = steps.view(torch.int16), minima.view(torch.int16)
    given = (ends, tops, steps, minima, rates, count, per_row)
    constants = {"BITS": fixed, "SIZE": _ROWS}
    return [Launch(grid_kernel, -(-count // _ROWS), 4, given, constants)] if count else []
