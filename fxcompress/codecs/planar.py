"""Planar bit packing: how the codes of a group become bytes.

The `bits` of a code are split into sections of 8, 4, 2 or 1 bits, widest first, the lowest bits of
the code in the first section (3 = 2+1, 7 = 4+2+1). Of a group of G codes, a section of width w
takes P = G*w/8 bytes, and byte k holds the codes k + j*P, j < 8/w, code j shifted left by j*w.
Neighbouring bytes hold neighbouring codes: vector loads and stores, no shuffles.
A group's sections follow each other; groups follow each other. A last, shorter group has the same
format with its size rounded up to 8, filled with zero codes. Hence ceil(n/8)*bits bytes for n codes
whatever the group size (a multiple of 8).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sections(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, shift) of each section: sections(7) == ((4, 0), (2, 4), (1, 6))."""
    found: list[tuple[int, int]] = []
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, shift))
            shift += width
    return tuple(found)


def code_bytes(numel: int, bits: int) -> int:
    """Bytes of `numel` packed codes; `numel` may be a SymInt."""
    return (numel + 7) // 8 * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8[n, size] codes below 2^bits -> uint8[n, ceil(size/8)*bits], one group a row."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    planes = []
    for width, shift in sections(bits):
        part = (codes >> shift) & ((1 << width) - 1)
        lanes = part.chunk(8 // width, 1)
        packed = lanes[0]
        for j, lane in enumerate(lanes[1:], 1):
            packed = packed | (lane << (j * width))
        planes.append(packed)
    return torch.cat(planes, 1)


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of `pack`: uint8[n, ceil(size/8)*bits] -> uint8[n, size]."""
    padded = packed.shape[1] // bits * 8
    codes = packed.new_zeros(packed.shape[0], padded)
    offset = 0
    for width, shift in sections(bits):
        plane = packed[:, offset : offset + padded * width // 8]
        offset += plane.shape[1]
        lanes = [(plane >> (j * width)) & ((1 << width) - 1) for j in range(8 // width)]
        codes |= torch.cat(lanes, 1) << shift
    return codes[:, :size]


def group_chunks(numel: int, group: int, device: torch.device) -> list[tuple[int, int, int]]:
    """(start, rows, size) pieces covering `numel` elements: whole groups, then the tail group.

    A piece is about 2^16 elements on CPU, so that a reference's int64 temporaries stay at half a
    megabyte each, and 2^20 elsewhere, where each piece costs some forty kernel launches.
    """
    rows = max(1, (1 << 16 if device.type == "cpu" else 1 << 20) // group)
    whole = numel // group
    chunks = [(r * group, min(rows, whole - r), group) for r in range(0, whole, rows)]
    if tail := numel - whole * group:
        chunks.append((whole * group, 1, tail))
    return chunks
