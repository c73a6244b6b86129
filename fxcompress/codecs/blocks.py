"""Blocks of neighbours in space: how average.py and frequency.py see a tensor, pool and spread it.

A tensor is samples x positions x channels, its samples on axis 0. With two or more axes of
positions a block lies in the last two of them (H and W of a feature map, whatever its memory
format), with one (tokens) it is a run along it. A matrix has no positions: neighbours are then
neighbouring features, as in DIVISION's code for MLPs; a vector is one sample.

The mean of a block of a elements (a power of two; a ragged edge has fewer) in fp32:

    mean = sum(x * 2^-k) / (count * 2^-k),  2^k = a

summed as a fixed binary tree, along W and then along H: missing elements are zeros, and the two
halves of a run are added element by element until one is left. The scaling keeps the sum finite.

`floor` leaves a ragged edge out of the means, and `stretch` spreads them over it, as pooling and
nearest upsampling do by default: element i of a side of s positions and c cells reads i*c // s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxcompress.codecs.base import channel_axis

_CHUNK = {"cpu": 1 << 16}  # elements a piece, as in planar.group_chunks


def layout(shape: Sequence[int], channels: int) -> tuple[list[int], int]:
    """(shape of at least three axes, samples first; its channel axis) of a tensor in storage."""
    axis = channel_axis(channels, len(shape))
    if len(shape) < 2:
        return [1, math.prod(shape), 1], 2
    if len(shape) == 2:
        return [*shape, 1], 2
    return ([1, *shape], 1) if axis == 0 else ([*shape], axis)


def planes(x: Tensor, axis: int) -> Tensor:
    """A view with the channel axis second: [samples, channels, *positions]."""
    return x.movedim(axis, 1)


def pooled(
    shape: Sequence[int], axis: int, blocks: Sequence[int], *, floor: bool = False
) -> list[int]:
    """Shape of the means of `planes(x, axis)`: [samples, channels, *positions]."""
    sizes = [shape[0], shape[axis], *shape[1:axis], *shape[axis + 1 :]]
    for i, block in zip(range(-len(blocks), 0), blocks, strict=True):
        size = whole(sizes[i], block) if floor else sizes[i]
        sizes[i] = (size + block - 1) // block
    return sizes


def whole(size: int, block: int) -> int:
    """Positions in whole blocks; all of them where there is none. May be a SymInt."""
    return torch.sym_max(size // block * block, torch.sym_min(size, block))  # type: ignore


def samples(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Pieces of axis 0 that keep a reference's temporaries small."""
    count = max(1, _CHUNK.get(device.type, 1 << 20) // max(1, math.prod(shape[1:])))
    return (slice(i, min(i + count, shape[0])) for i in range(0, shape[0], count))


def pool(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """Means of fp32 `x` over blocks of its last axes, one block length (a power of two) an axis."""
    scale = 1.0 / math.prod(blocks)
    counts = torch.full((), scale, device=x.device)
    x = x * scale
    for i, block in reversed(list(enumerate(blocks, -len(blocks)))):
        size = x.shape[i]
        cells = (size + block - 1) // block
        x = pad(x, (0, 0) * (-i - 1) + (0, cells * block - size)).unflatten(i, (cells, block))
        here = (size - block * torch.arange(cells, device=x.device)).clamp(max=block)
        counts = here.view([-1] + [1] * (-i - 1)) * counts
        while block > 1:
            block //= 2
            x = x.narrow(i, 0, block) + x.narrow(i, block, block)
        x = x.squeeze(i)
    return x / counts


def spread(means: Tensor, blocks: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Each mean at every element of its block; `sizes` of the last axes. The inverse of `pool`."""
    for i, (block, size) in enumerate(zip(blocks, sizes, strict=True), -len(blocks)):
        means = means.repeat_interleave(block, i).narrow(i, 0, size)
    return means


def stretch(means: Tensor, sizes: Sequence[int]) -> Tensor:
    """The means over last axes of `sizes`, nearest neighbours."""
    for i, size in enumerate(sizes, -len(sizes)):
        nearest = torch.arange(size, device=means.device) * means.shape[i] // max(size, 1)
        means = means.index_select(i, nearest)
    return means
