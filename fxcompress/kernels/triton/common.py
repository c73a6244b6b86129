"""What the Triton kernels share: the tile, the eight lanes of a group, packing, random bits.

A program handles a tile of ROWS groups. Planar packing (codecs/planar.py) puts the codes of the
eight *lanes* of a group (its eighths, each of consecutive elements) beside each other: byte block b
of a group, as long as a lane, is made of bits of the b-th element of lanes alone. So a lane is a
tensor [ROWS, WIDTH], packing is elementwise over the tuple of lanes, and nothing ever moves between
threads except to find a group's extremes. A thread holds 16 bytes of each lane.

Whole tiles of groups of 8 * 2^k elements take the fast path; other groups, and the end of the
tensor, the masked one, which the compiler cannot vectorise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.triton import Launch, warp_size


@dataclass(frozen=True)
class Piece:
    """A run of groups that one launch takes: from group `first` on, `rows` groups a program."""

    first: int
    programs: int
    rows: int
    width: int
    warps: int
    fast: bool

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> Launch:
        """A kernel of this piece, whose last argument is the first group."""
        tile = {"ROWS": self.rows, "WIDTH": self.width, "FAST": self.fast}
        given = (*arguments, self.first)
        return Launch(kernel, self.programs, self.warps, given, {**constants, **tile})


@dataclass(frozen=True)
class Config:
    """Of programs of whole tiles: bytes of each lane that a thread holds, and the least warps."""

    vector: int = 16
    warps: int = 4


# Any gives the same bits: random numbers belong to elements, and sums that could depend on the
# order are of integers. One for all: what timing a few for each kernel could gain on a GPU is less
# than compiling them takes (tools/gpu_check.py measures it).
CONFIG = Config()


def pieces(numel: int, group: int, itemsize: int) -> list[Piece]:
    """The whole tiles of the fast path, and what is left over for the masked one.

    Two launches, since one kernel of both paths would take the registers of the worse.
    """
    width, found = triton.next_power_of_2(group // 8), []
    groups, first = -(-numel // group), 0
    if group == 8 * width:
        rows, warps = _tile(width, CONFIG.vector // itemsize, CONFIG.warps)
        if programs := numel // (rows * group):
            found.append(Piece(0, programs, rows, width, warps, True))
            first = programs * rows
    if groups > first:
        rows, warps = _tile(width, 1, CONFIG.warps)
        found.append(Piece(first, -(-(groups - first) // rows), rows, width, warps, False))
    return found


def launches(
    kernel: Any, x: Tensor, group: int, *arguments: Any, numel: int | None = None, **constants: Any
) -> list[Launch]:
    """A kernel over all groups of x, or over as many groups as hold ``numel`` of its elements."""
    found = pieces(x.numel() if numel is None else numel, group, x.element_size())
    return [piece.launch(kernel, *arguments, **constants, GROUP=group) for piece in found]


def _tile(width: int, vector: int, least: int) -> tuple[int, int]:
    """(rows, warps) of programs whose threads hold `vector` elements of each lane."""
    warp = warp_size()
    warps = min(max(width // (warp * vector), least), 16)
    return max(warps * warp * vector // width, 1), warps


# ---- random bits: rng.py ----


@triton.jit
def mix(x):
    """lowbias32 of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stream_keys(key, stream):
    """(k_a, k_b) of a stream from a pointer to int64[2]: the device's own key, no sync."""
    base, counter = tl.load(key), tl.load(key + 1)
    h = mix(stream.to(tl.uint32) + 0x9E3779B9)
    h = mix(h ^ base.to(tl.uint32))
    h = mix(h ^ (base >> 32).to(tl.uint32))
    h = mix(h ^ counter.to(tl.uint32))
    h = mix(h ^ (counter >> 32).to(tl.uint32))
    return h, mix(h ^ 0x85EBCA6B)


@triton.jit
def hash_bits(index, k_a, k_b):
    """The hash of each element index (uint32, modulo 2^32)."""
    return mix(mix(index ^ k_a) + k_b)


# ---- a tile: its groups are rows, the elements of a lane are columns ----


@triton.jit
def tile_start(first, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The first element of this program's tile."""
    return (first + tl.program_id(0).to(tl.int64) * ROWS) * GROUP


@triton.jit
def group_sizes(numel, start, GROUP: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr):
    """int32[ROWS, 1]: elements of each group of the tile that starts at `start`; 0 past the end."""
    if FAST:
        return tl.full((ROWS, 1), GROUP, tl.int32)
    else:
        left = numel - start - tl.arange(0, ROWS)[:, None] * GROUP
        return tl.minimum(tl.maximum(left, 0), GROUP).to(tl.int32)


@triton.jit
def lane_offsets(eighth, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Where the elements of each lane are, in rows of GROUP whose lanes are `eighth` long."""
    row, column = tl.arange(0, eighth.shape[0])[:, None], tl.arange(0, WIDTH)[None, :]
    return [row * GROUP + lane * eighth + column for lane in (0, 1, 2, 3, 4, 5, 6, 7)]


@triton.jit
def lane_masks(size, eighth, WIDTH: tl.constexpr, FAST: tl.constexpr):
    """Which elements of each lane exist."""
    if FAST:
        return [tl.full((size.shape[0], WIDTH), 1, tl.int1) for lane in (0, 1, 2, 3, 4, 5, 6, 7)]
    else:
        column = tl.arange(0, WIDTH)[None, :]
        return [
            (column < eighth) & (lane * eighth + column < size) for lane in (0, 1, 2, 3, 4, 5, 6, 7)
        ]


@triton.jit
def tile(
    numel, first, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr
):
    """(its first element, sizes of groups, length of a lane, offsets, what exists, what has codes).

    Of a program whose lanes are eighths of a group, as they are but for padded and pooled groups.
    """
    start = tile_start(first, GROUP, ROWS)
    size = group_sizes(numel, start, GROUP, ROWS, FAST)
    eighth = (size + 7) // 8
    offsets, inside = lane_offsets(eighth, GROUP, WIDTH), lane_masks(size, eighth, WIDTH, FAST)
    return start, size, eighth, offsets, inside, coded_mask(size, eighth, WIDTH, FAST)


@triton.jit
def coded_mask(size, eighth, WIDTH: tl.constexpr, FAST: tl.constexpr):
    """Which columns have codes, those that fill up a group included."""
    if FAST:
        return tl.full((size.shape[0], WIDTH), 1, tl.int1)
    else:
        return (tl.arange(0, WIDTH)[None, :] < eighth) & (size > 0)


@triton.jit
def load_lanes(x, offsets, inside, other):
    """The eight lanes of a tile; `other` where there is nothing."""
    return [
        tl.load(x + offsets[lane], inside[lane], other=other) for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]


@triton.jit
def store_float(x, value, mask, LIMIT: tl.constexpr):
    """Write fp32 rounded to the type of x and kept within its finite range."""
    value = tl.where(value > LIMIT, LIMIT, value)  # NaN stays NaN
    value = tl.where(value < -LIMIT, -LIMIT, value)
    tl.store(x, value.to(x.dtype.element_ty), mask)


# ---- fp32 numbers ----


@triton.jit
def largest(lanes):
    """(max |x| of each group, whether all of it is finite) of fp32 lanes."""
    most = tl.zeros(lanes[0].shape, tl.int32)
    for lane in tl.static_range(8):
        most = tl.maximum(most, lanes[lane].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.max(most, 1, keep_dims=True)
    return most.to(tl.float32, bitcast=True), most < 0x7F800000


@triton.jit
def round_to_int(value):
    """int32 nearest to fp32 in [0, 2^22]; ties to even, by the rounding of a sum."""
    return (value + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000


@triton.jit
def nearest_bf16(value):
    """The bits, as int32, of the bf16 nearest to finite fp32."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def ceil_bf16(value):
    """The bits, as int32, of the least bf16 not below positive fp32."""
    return (value.to(tl.int32, bitcast=True) + 0xFFFF) >> 16


# ---- planar packing: codecs/planar.py ----


@triton.constexpr_function
def shift_of(width, bits):
    """The shift of the section of that width: the wider ones come first."""
    return bits & (-2 * width)


@triton.constexpr_function
def width_of(block, bits):
    """The width of the section that a byte block lies in."""
    wide = [w for w in (8, 4, 2, 1) if bits & w and (bits & (-2 * w)) <= block]
    return wide[-1]


@triton.jit
def pack_block(codes, block: tl.constexpr, BITS: tl.constexpr):
    """Byte block `block` of BITS, as int32, from the eight lanes of codes."""
    width: tl.constexpr = width_of(block, BITS)
    shift: tl.constexpr = shift_of(width, BITS)
    byte = (codes[block - shift] >> shift) & ((1 << width) - 1)
    for j in tl.static_range(1, 8 // width):
        part = (codes[block - shift + j * width] >> shift) & ((1 << width) - 1)
        byte |= part << (j * width)
    return byte


@triton.jit
def unpack_section(blocks, lane: tl.constexpr, width: tl.constexpr, shift: tl.constexpr):
    """What one section adds to the codes of a lane."""
    part = blocks[shift + lane % width] >> (lane // width * width)
    return (part & ((1 << width) - 1)) << shift


@triton.jit
def unpack_lane(blocks, lane: tl.constexpr, BITS: tl.constexpr):
    """The codes of a lane, as int32, from the BITS byte blocks."""
    code = tl.zeros_like(blocks[0])
    for log2 in tl.static_range(4):
        if BITS & (1 << log2):
            code |= unpack_section(blocks, lane, 1 << log2, shift_of(1 << log2, BITS))
    return code


@triton.jit
def store_codes(at, codes, eighth, mask, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Pack a tile of codes, eight lanes; `at` is where the bytes of its first group go."""
    offsets = lane_offsets(eighth, GROUP // 8 * BITS, mask.shape[1])
    for block in tl.static_range(BITS):
        tl.store(at + offsets[block], pack_block(codes, block, BITS).to(tl.uint8), mask)


@triton.jit
def load_codes(at, eighth, mask, GROUP: tl.constexpr, BITS: tl.constexpr):
    """The codes of a tile as eight lanes of int32; 0 where there are none."""
    offsets = lane_offsets(eighth, GROUP // 8 * BITS, mask.shape[1])
    blocks = [
        tl.load(at + offsets[block], mask, other=0).to(tl.int32)
        for block in (0, 1, 2, 3, 4, 5, 6, 7)[:BITS]
    ]
    return [unpack_lane(blocks, lane, BITS) for lane in (0, 1, 2, 3, 4, 5, 6, 7)]
