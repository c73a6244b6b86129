"""Triton kernels of codecs/adaptive.py: two passes over x, since bits follow from all ranges.

The first finds each group's extremes; a sort of a few numbers a sample then shares the bits out, on
the device; the second draws codes and writes them plane by plane. A sample's planes are planar over
all of it, so a program takes columns of the eight lanes of one sample, whose number of bits bounds
its loop over planes: none is touched that is not there.

FAST: samples of whole groups (first pass), lanes of a multiple of 16 (second). Masks then change
every 16 elements at most, and accesses are wide.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress import rng
from fxcompress.kernels.triton import Launch, warp_size
from fxcompress.kernels.triton.affine import ordered, quantize
from fxcompress.kernels.triton.common import store_float, stream_keys

_WARPS = 4
_TILE = 4096  # elements a program of the first pass


@triton.jit(do_not_specialize=["size", "groups", "count"])
def ends_kernel(
    x,
    ends,
    size,
    groups,
    count,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """The extremes int32[2, count] of all groups, as integers in the total order."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    if FAST:
        inside = (group < count)[:, None] & (column < WIDTH)
        at = group[:, None] * GROUP + column
    else:
        inner = (group % groups * GROUP)[:, None] + column
        inside = (group < count)[:, None] & (column < GROUP) & (inner < size)
        at = (group // groups * size)[:, None] + inner
    order = ordered(tl.load(x + at, inside, other=0).to(tl.float32).to(tl.int32, bitcast=True))
    lowest = tl.min(tl.where(inside, order, 0x7FFFFFFF), 1)
    highest = tl.max(tl.where(inside, order, -0x80000000), 1)
    tl.store(ends + group, lowest, group < count)
    tl.store(ends + count + group, highest, group < count)


@triton.jit
def columns(size, WIDTH: tl.constexpr, FAST: tl.constexpr):
    """(sample, columns of its lanes that this program takes, length of a lane, its elements)."""
    eighth = (size + 7) // 8
    sample = tl.program_id(0) // ((eighth + WIDTH - 1) // WIDTH)
    column = tl.program_id(0) % ((eighth + WIDTH - 1) // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    if FAST:  # so that the compiler knows
        eighth = eighth // 16 * 16
        size = eighth * 8
    return sample.to(tl.int64), column, eighth, size


@triton.jit
def first_of_runs(size, WIDTH: tl.constexpr, RUN: tl.constexpr):
    """The first column of each run of elements in one group."""
    eighth = (size + 7) // 8
    tile = tl.program_id(0) % ((eighth + WIDTH - 1) // WIDTH)
    return tile * WIDTH + tl.arange(0, WIDTH // RUN) * RUN


@triton.jit
def transposed(bits):
    """Byte i of the eight in an int64 becomes bit i of each of them (Warren, Hacker's Delight)."""
    bits = bits.to(tl.uint64, bitcast=True)
    t = (bits ^ (bits >> 7)) & 0x00AA00AA00AA00AA
    bits ^= t ^ (t << 7)
    t = (bits ^ (bits >> 14)) & 0x0000CCCC0000CCCC
    bits ^= t ^ (t << 14)
    t = (bits ^ (bits >> 28)) & 0x00000000F0F0F0F0
    return bits ^ t ^ (t << 28)


@triton.jit
def of_run(table, run, size, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """What runs of elements, the first of which are `run`, have in a table of groups."""
    found = tl.load(table + run // GROUP, run < size, other=0)[:, None]
    RUN: tl.constexpr = WIDTH // run.shape[0]
    return tl.reshape(tl.broadcast_to(found, (WIDTH // RUN, RUN)), (WIDTH,))


@triton.jit
def draw(
    x,
    base,
    at,
    inside,
    run,
    size,
    group,
    minima,
    rates,
    k_a,
    k_b,
    last,
    GROUP: tl.constexpr,
):
    """The codes of one lane; 0 past the end."""
    y = tl.load(x + base + at, inside, other=0).to(tl.float32)
    r = of_run(rates + group, run, size, GROUP, y.shape[0])
    lo = of_run(minima + group, run, size, GROUP, y.shape[0]).to(tl.int32) << 16
    lo = lo.to(tl.float32, bitcast=True)
    return quantize(y, lo, r, r > 0, base + at, k_a, k_b, last, False)


@triton.jit(do_not_specialize=["size", "groups", "stream"])
def encode_kernel(
    x,
    planes,
    bits,
    stops,
    minima,
    rates,
    key,
    size,
    groups,
    stream,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    FAST: tl.constexpr,
):
    k_a, k_b = stream_keys(key, stream)
    sample, column, eighth, size = columns(size, WIDTH, FAST)
    width = tl.load(bits + sample).to(tl.int32)
    start = planes + (tl.load(stops + sample) - width) * eighth + column
    last, coded = (1 << width) - 1, column < eighth
    runs = first_of_runs(size, WIDTH, RUN)
    matrix = tl.zeros((WIDTH,), tl.uint64)
    for lane in tl.static_range(8):
        at = lane * eighth + column
        codes = draw(
            *(x, sample * size, at, coded & (at < size)),
            *(lane * eighth + runs, size, sample * groups, minima, rates),
            *(k_a, k_b, last, GROUP),
        )
        matrix |= codes.to(tl.uint64) << (8 * lane)
    matrix = transposed(matrix)
    for bit in range(width):
        plane = matrix >> tl.cast(8 * bit, tl.uint64)
        tl.store(start + bit * eighth.to(tl.int64), plane.to(tl.uint8), coded)


@triton.jit(do_not_specialize=["size", "groups"])
def decode_kernel(
    planes,
    bits,
    stops,
    steps,
    minima,
    x,
    size,
    groups,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    FAST: tl.constexpr,
):
    sample, column, eighth, size = columns(size, WIDTH, FAST)
    width = tl.load(bits + sample).to(tl.int32)
    start = planes + (tl.load(stops + sample) - width) * eighth + column
    coded = column < eighth
    matrix = tl.zeros((WIDTH,), tl.uint64)
    for bit in range(width):
        plane = tl.load(start + bit * eighth.to(tl.int64), coded, other=0)
        matrix |= plane.to(tl.uint64) << tl.cast(8 * bit, tl.uint64)
    matrix = transposed(matrix)
    runs = first_of_runs(size, WIDTH, RUN)
    for lane in tl.static_range(8):
        at = lane * eighth + column
        run, inside = lane * eighth + runs, coded & (at < size)
        step = of_run(steps + sample * groups, run, size, GROUP, WIDTH).to(tl.int32) << 16
        lo = of_run(minima + sample * groups, run, size, GROUP, WIDTH).to(tl.int32) << 16
        code = ((matrix >> (8 * lane)) & 255).to(tl.int32).to(tl.float32)
        value = lo.to(tl.float32, bitcast=True) + code * step.to(tl.float32, bitcast=True)
        store_float(x + sample * size + at, value, inside, LIMIT)


def ends(x: Tensor, found: Tensor, group: int) -> list[Launch]:
    """What writes the extremes int32[2, samples * groups] of a contiguous x[samples, size]."""
    size, count = x.shape[1], found.shape[1]
    width = triton.next_power_of_2(group)
    rows = max(_TILE // width, 1)
    fast = size % group == 0 and width == group
    given = (x, found, size, count // len(x), count)
    constants = {"GROUP": group, "ROWS": rows, "WIDTH": width, "FAST": fast}
    return [Launch(ends_kernel, -(-count // rows), _WARPS, given, constants)]


def encode(
    x: Tensor,
    planes: Tensor,
    bits: Tensor,
    stops: Tensor,
    minima: Tensor,
    rates: Tensor,
    group: int,
    key: Tensor,
    stream: int,
) -> list[Launch]:
    """What writes the planes of a contiguous x[samples, size].

    bits: uint8[samples]; stops: their running sum, int64; minima: bf16; rates: see `space.grids`.
    """
    groups = len(minima) // len(x)
    given = (x, planes, bits, stops, minima.view(torch.int16), rates, key)
    return _launches(encode_kernel, x, group, *given, x.shape[1], groups, stream & rng.MASK)


def decode(
    planes: Tensor,
    bits: Tensor,
    stops: Tensor,
    steps: Tensor,
    minima: Tensor,
    x: Tensor,
    group: int,
) -> list[Launch]:
    """What fills a contiguous x[samples, size]; see `encode`."""
    groups = len(minima) // len(x)
    given = (planes, bits, stops, steps.view(torch.int16), minima.view(torch.int16), x)
    limit = torch.finfo(x.dtype).max
    return _launches(decode_kernel, x, group, *given, x.shape[1], groups, LIMIT=limit)


def _launches(
    kernel: object, x: Tensor, group: int, *given: object, **constants: object
) -> list[Launch]:
    eighth = (x.shape[1] + 7) // 8
    width = _WARPS * warp_size() * 16 // x.element_size()
    is_fast = x.shape[1] % 128 == 0
    shared = math.gcd(eighth, group) if is_fast else 1
    run = min(shared & -shared, width)
    shape = {"GROUP": group, "WIDTH": width, "RUN": run, "FAST": is_fast}
    return [
        Launch(kernel, len(x) * -(-eighth // width), _WARPS, tuple(given), {**constants, **shape})
    ]
