"""Basis: a tensor's coefficients over space and channels, there and back, as ATen operations.

What codecs/transform.py defines; kernels/transform.cpp and kernels/triton/transform.py do the same
in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from fxcompress.kernels import cpu
from fxcompress.persistent import persistent

# Elements that are transformed at once, in memory that is in use then and in the cache. Of 64 MB of
# fp32 encoding took 173 ms and decoding 157, as one 214 and 200 (one core, a clone 34).
_PART = 1 << 19


def analyse(
    y: Tensor, sides: Sequence[int], matrices: Tensor, mean: Tensor | None = None
) -> Tensor:
    """Coefficients [bands, positions] of y - mean; y is [positions..., channels].

    sides: of the blocks over its last position axes; matrices: [blocks, width, width] of channels.
    """
    count, (blocks, width, _) = math.prod(sides), matrices.shape
    positions, start = y[..., 0].numel() // count, 0
    z: Tensor | None = None
    for part in _parts(y.detach(), len(sides)):
        view = folded(part, sides)
        rows = y.new_empty(view.shape, dtype=torch.float32)
        if mean is None:
            rows.copy_(view)
        else:
            torch.sub(view, mean, out=rows)
        rows = rows.view(count, -1)
        if count > 1:
            rows = _hadamard(count, y.device) @ rows
        rows = rows.view(count, -1, y.shape[-1])  # [frequencies, positions, channels]
        stop = start + rows.shape[1]
        if z is None:  # not earlier: three buffers, of a part that is the whole, are one too many
            z = cpu.empty((count, blocks, width, positions), y.device)
        for block, lanes in enumerate(rows.split(width, 2)):
            out = z[:, block, :, start:stop]
            torch.bmm(matrices[block].expand(count, -1, -1), lanes.mT, out=out)
        start = stop
    assert z is not None
    return z.view(-1, positions)


def _parts(y: Tensor, sides: int) -> Sequence[Tensor]:
    """y [positions..., channels] along its first axis, if blocks do not span it: see `_PART`."""
    if y.dim() - 1 <= sides or not y.numel():
        return [y]
    return y.split(max(_PART * len(y) // y.numel(), 1))


def folded(y: Tensor, sides: Sequence[int]) -> Tensor:
    """A view of [..., channels] as [positions in a block..., blocks..., channels].

    sides: of the blocks over the last position axes. With memory in this order, a transform over a
    block is one matrix product, and frequencies are what a batch of products runs over.
    """
    lead = y.dim() - 1 - len(sides)
    for i, side in enumerate(sides):
        y = y.unflatten(lead + 2 * i, (-1, side))
    inner = [lead + 2 * i + 1 for i in range(len(sides))]
    return y.permute(*inner, *(i for i in range(y.dim()) if i not in inner))


def synthesised(
    z: Tensor, matrices: Tensor, y: Tensor, sides: Sequence[int], squared: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The inverse of :func:`analyse`: (a part of y as `folded` sees it, its values without means).

    z: [bands, positions], overwritten. squared: of the squares of the inverse's entries, `matrices`
    those of the channels' already.
    """
    (blocks, _, width), start, count = matrices.shape, 0, math.prod(sides)
    for part in _parts(y, len(sides)):
        view = folded(part, sides)
        rows = z.new_empty(count, view[..., 0].numel() // count, blocks * width)
        stop = start + rows.shape[1]
        bands = z[:, start:stop].view(count, blocks, width, -1)
        for block, out in enumerate(rows.split(width, 2)):
            torch.bmm(bands[:, block].mT, matrices[block].mT.expand(count, -1, -1), out=out)
        if squared:
            rows = rows.mean(0, keepdim=True).expand_as(rows)
        elif count > 1:
            # Into the coefficients' memory, if this is all of it: they are read.
            spare = bands.view(count, -1) if bands.is_contiguous() else None
            rows = torch.mm(_hadamard(count, z.device), rows.view(count, -1), out=spare)
        yield view, rows.reshape(view.shape)
        start = stop


@cache
def _hadamard(count: int, device: torch.device) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < count:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    with persistent(device):
        return (matrix / math.sqrt(count)).to(device)
