"""Triton kernels of codecs/transform.py: both changes of basis in one pass over the tensor.

A program takes P blocks of neighbours and one block of channels: a tile [COUNT, P, LANES], whose
first axis are the places in a block of neighbours. The Walsh-Hadamard transform over space adds and
subtracts along that axis; the one over channels is the product of the tile, its first axes as one,
with one small matrix. Coefficients are written band by band in the order of their rates, so that
those of one rate, which are coded together, lie together: the coders (rotate, dither, subsample)
follow, from slices of that memory and, in decoding, to them.

Encoding reads x twice. Which band has which rate follows from the energies of all positions, so
the first pass computes coefficients for their energies alone; at bf16 that is cheaper than writing
them in fp32, in an order not known yet, and gathering them afterwards. A coder of each rate in the
same pass would have to run all of them on every tile, whose bands have different rates.

Products are summed in the order of the device's matrix instructions, with TF32 in three parts where
there are such: coefficients equal those of the reference within rounding, not bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.place import Place
from fxcompress.kernels.triton import Launch, warp_size
from fxcompress.kernels.triton.common import store_float

_ROWS = 128  # of a program's tile, places times blocks: 32 elements of 64 channels a thread
_THREADS = 256
# A program keeps its matrix for a run of tiles, as long as enough programs are left for all units
# of the largest GPU: read for each tile, its 16 KB were a quarter to a half of all bytes.
_LONGEST = 64
_PROGRAMS = 512

# Arguments whose values Triton must not compile for: a ResNet-50 took 90 kernels, and its trial on
# a part of the batch as many again. Where channels run fastest, the unit of the strides says all
# that the compiler can use; else it sees how neighbours of one row lie.
_COUNTS = ["height", "positions", "blocks", "tiles", "first", "line", "coded"]
_STRIDES = ["wide", "lead", "down", "along", "channel"]


@dataclass(frozen=True)
class Run:
    """Programs that take `tiles` tiles each, from tile `first` on; `line`: programs before them."""

    first: int
    line: int
    programs: int
    tiles: int
    fast: bool


def _tile(place: Place) -> int:
    """Blocks of neighbours a program."""
    return _ROWS // place.count


def _tiles(place: Place) -> int:
    return -(-place.positions // _tile(place))


def _lanes(place: Place) -> int:
    """Channels of a tile."""
    return max(triton.next_power_of_2(place.width), 16)


def _runs(place: Place) -> list[Run]:
    """All tiles: long runs of whole ones, whole ones alone, and the masked rest."""
    regular = _lanes(place) == place.width and place.positions % 4 == 0
    whole = place.positions // _tile(place) if regular else 0
    long = min(whole * place.channels // place.width // _PROGRAMS, _LONGEST)
    length = 1 << (long.bit_length() - 1) if long else 1
    found, first, line = [], 0, 0
    for until, step in ((whole // length * length, length), (whole, 1), (_tiles(place), 1)):
        count = (until - first) // step
        if count:
            found.append(Run(first, line, count, step, until <= whole))
        first, line = until, line + count
    return found


def lines(place: Place) -> int:
    """Programs of a block of channels."""
    return sum(run.programs for run in _runs(place))


@triton.jit
def offsets(
    p,
    column,
    height,
    wide,
    lead,
    down,
    along,
    channel,
    SIDE_H: tl.constexpr,
    SIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Where the elements of a tile are, int64[COUNT, P, LANES].

    The strides of positions are in units of so many elements: a factor that the compiler knows
    makes for wide accesses.
    """
    k, row = tl.arange(0, SIDE_H * SIDE_W), p // wide
    block = (
        (row // height).to(tl.int64) * lead
        + (row % height).to(tl.int64) * (SIDE_H * down)
        + (p % wide).to(tl.int64) * (SIDE_W * along)
    )
    place = (k // SIDE_W) * down + (k % SIDE_W) * along  # fits: kernels/place.py
    position = (place[:, None] + block[None, :]) * UNIT
    if UNIT > 1:  # channels run fastest
        return position[:, :, None] + column[None, None, :]
    else:
        return position[:, :, None] + column[None, None, :].to(tl.int64) * channel


@triton.jit
def over_space(y, SCALE: tl.constexpr):
    """The orthonormal Walsh-Hadamard transform over the first axis."""
    COUNT: tl.constexpr = y.shape[0]
    for log2 in tl.static_range(4):
        if (1 << log2) < COUNT:
            y = add_places(y, 1 << log2)
    return y * SCALE


@triton.jit
def add_places(y, h: tl.constexpr):
    """One stage: places k and k + h become their sum and their difference."""
    pairs = tl.reshape(y, (y.shape[0] // (2 * h), 2, h, y.shape[1], y.shape[2]))
    odd = tl.arange(0, 2)[None, :, None, None, None] == 1
    total = tl.sum(pairs, 1, keep_dims=True)
    difference = tl.sum(tl.where(odd, -pairs, pairs), 1, keep_dims=True)
    return tl.reshape(tl.where(odd, difference, total), y.shape)


@triton.jit
def half(
    of, block, PART: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, HALF: tl.constexpr
):
    """Columns of a block's matrix [WIDTH, WIDTH], transposed, zeros around it."""
    i, j = tl.arange(0, LANES)[:, None], PART * HALF + tl.arange(0, HALF)[None, :]
    at = of + block * (WIDTH * WIDTH) + j * WIDTH + i
    return tl.load(at) if WIDTH == LANES else tl.load(at, (i < WIDTH) & (j < WIDTH), other=0.0)


@triton.jit
def turn(y, matrix, PRECISION: tl.constexpr):
    """The last axis of a tile times a matrix."""
    COUNT: tl.constexpr = y.shape[0]
    P: tl.constexpr = y.shape[1]
    y = tl.dot(tl.reshape(y, (COUNT * P, y.shape[2])), matrix, input_precision=PRECISION)
    return tl.reshape(y, (COUNT, P, matrix.shape[1]))


@triton.jit
def put(z, out, row, p, positions, real, FAST: tl.constexpr):
    """Write coefficients of some bands, each to its row."""
    to = out + (row[:, None, :] * positions + p[None, :, None])
    if FAST:
        tl.store(to, z)
    else:
        tl.store(to, z, (p < positions)[None, :, None] & real[None, None, :])


@triton.jit(do_not_specialize=_COUNTS)
def analyse_kernel(
    x,
    mean,
    analysis,
    rows,
    out,
    height,
    wide,
    lead,
    down,
    along,
    channel,
    positions,
    blocks,
    tiles,
    first,
    line,
    SIDE_H: tl.constexpr,
    SIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    QUARTER: tl.constexpr,
    SCALE: tl.constexpr,
    ENERGIES: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """`out`: fp32[runs, bands] of squares summed, or fp32[bands, positions] in order of `rows`."""
    COUNT: tl.constexpr = SIDE_H * SIDE_W
    TWO: tl.constexpr = LANES > HALF
    positions *= QUARTER
    run, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    c, d = tl.arange(0, LANES), tl.arange(0, HALF)
    column = block * WIDTH + c
    centre = tl.load(mean + column, c < WIDTH, other=0.0)[None, None, :]
    left = half(analysis, block, 0, WIDTH, LANES, HALF)
    right = half(analysis, block, 1, WIDTH, LANES, HALF) if TWO else left
    place = tl.arange(0, COUNT)[:, None] * (blocks * WIDTH) + block * WIDTH
    if not ENERGIES:
        row_l = tl.load(rows + place + d[None, :], (d < WIDTH)[None, :], other=0)
        row_r = tl.load(rows + place + HALF + d[None, :], (HALF + d < WIDTH)[None, :], other=0)
    total_l = tl.zeros((COUNT, HALF), tl.float32)
    total_r = tl.zeros((COUNT, HALF), tl.float32)
    for t in range(tiles):
        p = (first + run * tiles + t) * P + tl.arange(0, P)
        at = offsets(p, column, height, wide, lead, down, along, channel, SIDE_H, SIDE_W, UNIT)
        if FAST:
            y = tl.load(x + at).to(tl.float32) - centre
        else:
            inside = (p < positions)[None, :, None] & (c < WIDTH)[None, None, :]
            y = tl.where(inside, tl.load(x + at, inside, other=0).to(tl.float32) - centre, 0.0)
        y = over_space(y, SCALE)
        # By halves: a whole matrix of 64 channels, its TF32 parts apart, spilled on sm_80.
        z = turn(y, left, PRECISION)
        if ENERGIES:
            total_l += tl.sum(z * z, 1)
        else:
            put(z, out, row_l, p, positions, d < WIDTH, FAST)
        if TWO:
            z = turn(y, right, PRECISION)
            if ENERGIES:
                total_r += tl.sum(z * z, 1)
            else:
                put(z, out, row_r, p, positions, HALF + d < WIDTH, FAST)
    if ENERGIES:
        to = out + (line + run).to(tl.int64) * (COUNT * WIDTH * blocks) + place + d[None, :]
        tl.store(to, total_l, (d < WIDTH)[None, :])
        if TWO:
            tl.store(to + HALF, total_r, (HALF + d < WIDTH)[None, :])


@triton.jit
def give(
    y,
    x,
    mean,
    p,
    column,
    real,
    height,
    wide,
    lead,
    down,
    along,
    channel,
    positions,
    SIDE_H: tl.constexpr,
    SIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    LIMIT: tl.constexpr,
    FAST: tl.constexpr,
):
    """Write some channels of a tile, their means added."""
    at = offsets(p, column, height, wide, lead, down, along, channel, SIDE_H, SIDE_W, UNIT)
    if FAST:
        store_float(x + at, y + tl.load(mean + column)[None, None, :], None, LIMIT)
    else:
        centre = tl.load(mean + column, real, other=0.0)[None, None, :]
        inside = (p < positions)[None, :, None] & real[None, None, :]
        store_float(x + at, y + centre, inside, LIMIT)


@triton.jit(do_not_specialize=_COUNTS)
def synthesise_kernel(
    z,
    mean,
    synthesis,
    rows,
    x,
    height,
    wide,
    lead,
    down,
    along,
    channel,
    positions,
    blocks,
    tiles,
    first,
    line,
    coded,
    SIDE_H: tl.constexpr,
    SIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    QUARTER: tl.constexpr,
    SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """x from coefficients fp32[coded, positions] in order of `rows`; other bands are 0."""
    COUNT: tl.constexpr = SIDE_H * SIDE_W
    TWO: tl.constexpr = LANES > HALF
    positions *= QUARTER
    run, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    c, d = tl.arange(0, LANES), tl.arange(0, HALF)
    left = half(synthesis, block, 0, WIDTH, LANES, HALF)
    right = half(synthesis, block, 1, WIDTH, LANES, HALF) if TWO else left
    band = tl.arange(0, COUNT)[:, None] * (blocks * WIDTH) + (block * WIDTH + c)[None, :]
    row = tl.load(rows + band, (c < WIDTH)[None, :], other=0)[:, None, :]
    for t in range(tiles):
        p = (first + run * tiles + t) * P + tl.arange(0, P)
        known = row < coded
        if not FAST:
            known &= (p < positions)[None, :, None] & (c < WIDTH)[None, None, :]
        y = tl.load(z + (row * positions + p[None, :, None]), known, other=0.0)
        give(
            *(over_space(turn(y, left, PRECISION), SCALE), x, mean, p, block * WIDTH + d),
            *(d < WIDTH, height, wide, lead, down, along, channel, positions),
            *(SIDE_H, SIDE_W, UNIT, LIMIT, FAST),
        )
        if TWO:
            give(
                *(over_space(turn(y, right, PRECISION), SCALE), x, mean, p),
                *(block * WIDTH + HALF + d, HALF + d < WIDTH),
                *(height, wide, lead, down, along, channel, positions),
                *(SIDE_H, SIDE_W, UNIT, LIMIT, FAST),
            )


def energies(x: Tensor, mean: Tensor, analysis: Tensor, place: Place, out: Tensor) -> list[Launch]:
    """What writes squares of coefficients, summed by program: fp32[lines(place), bands]."""
    given = (x, mean, analysis, mean, out)
    return _launches(analyse_kernel, given, place, x, ENERGIES=True)


def analyse(
    x: Tensor, mean: Tensor, analysis: Tensor, place: Place, rows: Tensor, out: Tensor
) -> list[Launch]:
    """What writes coefficients fp32[bands, positions], band b to row ``rows[b]``."""
    given = (x, mean, analysis, rows, out)
    return _launches(analyse_kernel, given, place, x, ENERGIES=False)


def synthesise(
    z: Tensor, mean: Tensor, synthesis: Tensor, place: Place, rows: Tensor, x: Tensor
) -> list[Launch]:
    """What fills x from coefficients fp32[coded, positions], band b in row ``rows[b]``."""
    given = (z, mean, synthesis, rows, x, len(z))
    return _launches(synthesise_kernel, given, place, x, LIMIT=torch.finfo(x.dtype).max)


def _launches(
    kernel: Any, given: tuple[object, ...], place: Place, x: Tensor, **constants: object
) -> list[Launch]:
    """Whole tiles, and the masked rest. `given` are the arguments around those of the place."""
    unit = place.width if place.strides[3] == 1 else 1
    if unit > 1:
        kernel = _for_any_strides(kernel)
    strides = tuple(stride // unit for stride in place.strides[:3])
    blocks = place.channels // place.width
    shape = {
        "SIDE_H": place.sides[0],
        "SIDE_W": place.sides[1],
        "UNIT": unit,
        "WIDTH": place.width,
        "LANES": _lanes(place),
        "HALF": min(_lanes(place), 32),
        "P": _tile(place),
        "SCALE": place.count**-0.5,
        "PRECISION": "ieee" if warp_size() == 64 else "tf32x3",
    }
    found = []
    for run in _runs(place):
        quarter = 4 if run.fast else 1
        where = (*place.blocks, *strides, place.strides[3], place.positions // quarter)
        which = (blocks, run.tiles, run.first, run.line)
        tile = {"QUARTER": quarter, "FAST": run.fast}
        arguments = (*given[:5], *where, *which, *given[5:])
        programs, warps = run.programs * blocks, _THREADS // warp_size()
        found.append(Launch(kernel, programs, warps, arguments, {**shape, **constants, **tile}))
    return found


@cache
def _for_any_strides(kernel: Any) -> Any:
    """The same kernel, compiled without a look at the strides either."""
    return triton.jit(kernel.fn, do_not_specialize=[*_COUNTS, *_STRIDES])
