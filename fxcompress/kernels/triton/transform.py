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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.triton import Launch, warp_size
from fxcompress.kernels.triton.common import store_float

LARGEST = 16  # places in a block of neighbours
_ROWS = 128  # of a program's tile, places times blocks: 32 elements of 64 channels a thread
_THREADS = 256


@dataclass(frozen=True)
class Place:
    """Where elements are.

    Attributes:
        blocks: blocks of neighbours along the last two position axes (1 where there is one axis).
        sides: of a block along them.
        strides: of the axes before them taken as one, of the two, and of the channels; elements.
        positions: blocks of neighbours in all.
        channels: in all.
        width: of a block of channels.
    """

    blocks: tuple[int, int]
    sides: tuple[int, int]
    strides: tuple[int, int, int, int]
    positions: int
    channels: int
    width: int

    @property
    def count(self) -> int:
        return self.sides[0] * self.sides[1]

    @property
    def tile(self) -> int:
        """Blocks of neighbours a program."""
        return _ROWS // self.count

    @property
    def tiles(self) -> int:
        return -(-self.positions // self.tile)

    @property
    def bands(self) -> int:
        return self.count * self.channels


def placed(shape: Sequence[int], axis: int, sides: Sequence[int], width: int) -> Place | None:
    """Where the elements of a contiguous tensor are; None where the kernels cannot say.

    Args:
        shape: of the tensor, storage order; axis: of its channels.
        sides: of blocks over its last position axes.
        width: of a block of channels.
    """
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    axes = [(s, t) for i, (s, t) in enumerate(zip(shape, strides, strict=True)) if i != axis]
    last = axes[len(axes) - len(sides) :]
    lead = axes[: len(axes) - len(sides)]
    # The axes before them must be steps of one stride.
    if any(outer[1] != inner[0] * inner[1] for outer, inner in pairwise(lead)):
        return None
    if len(sides) > 2 or math.prod(sides) > LARGEST or not math.prod(shape):
        return None
    while len(last) < 2:
        last, sides = [(1, 0), *last], [1, *sides]
    (height, down), (wide, along) = last
    blocks = (height // sides[0], wide // sides[1])
    before = math.prod(size for size, _ in lead)
    return Place(
        blocks=blocks,
        sides=(sides[0], sides[1]),
        strides=(lead[-1][1] if lead else 0, down, along, strides[axis]),
        positions=before * blocks[0] * blocks[1],
        channels=shape[axis],
        width=width,
    )


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
    place = (k // SIDE_W).to(tl.int64) * down + (k % SIDE_W) * along
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
def turn(y, of, block, c, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Channels c of a tile times a block's matrix [WIDTH, WIDTH], zeros around it."""
    COUNT: tl.constexpr = y.shape[0]
    P: tl.constexpr = y.shape[1]
    LANES: tl.constexpr = y.shape[2]
    i, j = tl.arange(0, LANES)[:, None], c[None, :]
    at = of + block * (WIDTH * WIDTH) + j * WIDTH + i  # transposed
    matrix = tl.load(at) if WIDTH == LANES else tl.load(at, (i < WIDTH) & (j < WIDTH), other=0.0)
    y = tl.dot(tl.reshape(y, (COUNT * P, LANES)), matrix, input_precision=PRECISION)
    return tl.reshape(y, (COUNT, P, c.shape[0]))


@triton.jit(do_not_specialize=["first"])
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
    first,
    SIDE_H: tl.constexpr,
    SIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    """`out`: fp32[tiles, bands] of squares summed, or fp32[bands, positions] in order of `rows`."""
    COUNT: tl.constexpr = SIDE_H * SIDE_W
    positions *= QUARTER
    tile, block = first + tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    p, c = tile * P + tl.arange(0, P), tl.arange(0, LANES)
    column = block * WIDTH + c
    at = offsets(p, column, height, wide, lead, down, along, channel, SIDE_H, SIDE_W, UNIT)
    if FAST:
        y = tl.load(x + at).to(tl.float32) - tl.load(mean + column)[None, None, :]
    else:
        real = c < WIDTH
        inside = (p < positions)[None, :, None] & real[None, None, :]
        centre = tl.load(mean + column, real, other=0.0)[None, None, :]
        y = tl.where(inside, tl.load(x + at, inside, other=0).to(tl.float32) - centre, 0.0)
    y = over_space(y, SCALE)
    # By halves: a whole matrix of 64 channels, its TF32 parts apart, spilled registers on sm_80.
    for part in tl.static_range(LANES // HALF):
        c = part * HALF + tl.arange(0, HALF)
        z, real = turn(y, analysis, block, c, WIDTH, PRECISION), c < WIDTH
        band = tl.arange(0, COUNT)[:, None] * (BLOCKS * WIDTH) + (block * WIDTH + c)[None, :]
        if ENERGIES:
            to = out + tile.to(tl.int64) * (COUNT * BLOCKS * WIDTH) + band
            if FAST:
                tl.store(to, tl.sum(z * z, 1))
            else:
                tl.store(to, tl.sum(z * z, 1), real[None, :])
        elif FAST:
            row = tl.load(rows + band)[:, None, :]
            tl.store(out + (row * positions + p[None, :, None]), z)
        else:
            row = tl.load(rows + band, real[None, :], other=0)[:, None, :]
            inside = (p < positions)[None, :, None] & real[None, None, :]
            tl.store(out + (row * positions + p[None, :, None]), z, inside)


@triton.jit(do_not_specialize=["first"])
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
    coded,
    first,
    SIDE_H: tl.constexpr,
    SIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCKS: tl.constexpr,
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
    positions *= QUARTER
    tile, block = first + tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    p, c = tile * P + tl.arange(0, P), tl.arange(0, LANES)
    column, real = block * WIDTH + c, c < WIDTH
    band = tl.arange(0, COUNT)[:, None] * (BLOCKS * WIDTH) + column[None, :]
    if FAST:
        row = tl.load(rows + band)[:, None, :]
        known = row < coded
    else:
        row = tl.load(rows + band, real[None, :], other=0)[:, None, :]
        known = (p < positions)[None, :, None] & real[None, None, :] & (row < coded)
    z = tl.load(z + (row * positions + p[None, :, None]), known, other=0.0)
    for part in tl.static_range(LANES // HALF):
        c = part * HALF + tl.arange(0, HALF)
        column, real = block * WIDTH + c, c < WIDTH
        y = over_space(turn(z, synthesis, block, c, WIDTH, PRECISION), SCALE)
        at = offsets(p, column, height, wide, lead, down, along, channel, SIDE_H, SIDE_W, UNIT)
        if FAST:
            store_float(x + at, y + tl.load(mean + column)[None, None, :], None, LIMIT)
        else:
            centre = tl.load(mean + column, real, other=0.0)[None, None, :]
            inside = (p < positions)[None, :, None] & real[None, None, :]
            store_float(x + at, y + centre, inside, LIMIT)


def energies(x: Tensor, mean: Tensor, analysis: Tensor, place: Place, out: Tensor) -> list[Launch]:
    """What writes squares of coefficients, summed over each tile: fp32[place.tiles, bands]."""
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
    kernel: object, given: tuple[object, ...], place: Place, x: Tensor, **constants: object
) -> list[Launch]:
    """Whole tiles, and the masked rest. `given` are the arguments around those of the place."""
    lanes = max(triton.next_power_of_2(place.width), 16)
    regular = lanes == place.width and place.positions % 4 == 0
    whole = place.positions // place.tile if regular else 0
    blocks = place.channels // place.width
    unit = place.channels if place.strides[3] == 1 else 1
    strides = tuple(stride // unit for stride in place.strides[:3])
    shape = {
        "SIDE_H": place.sides[0],
        "SIDE_W": place.sides[1],
        "UNIT": unit,
        "BLOCKS": blocks,
        "WIDTH": place.width,
        "LANES": lanes,
        "HALF": min(lanes, 32),
        "P": place.tile,
        "SCALE": place.count**-0.5,
        "PRECISION": "ieee" if warp_size() == 64 else "tf32x3",
    }
    runs = [(0, whole, True), (whole, place.tiles - whole, False)]
    found = []
    for first, count, fast in runs:
        quarter = 4 if fast else 1
        where = (*place.blocks, *strides, place.strides[3], place.positions // quarter)
        tile = {**shape, **constants, "QUARTER": quarter, "FAST": fast}
        arguments = (*given[:5], *where, *given[5:], first)
        if count:
            found.append(Launch(kernel, count * blocks, _THREADS // warp_size(), arguments, tile))
    return found
