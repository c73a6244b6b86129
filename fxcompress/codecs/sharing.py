"""Sharing: which elements of a tensor share a scale.

Storage order is seen as (outer, repeat, scales, run), the last fastest. Scale (o, s) belongs to all
elements [o, :, s, :]:

    per           outer  repeat  scales         run
    group         1      1       ceil(n/group)  group    consecutive elements
    sample-group  N      1       ceil(m/group)  group    the same, starting anew at each sample
    tensor        1      1       1              n
    sample        N      1       1              m
    channel       1      before  C              after    the axes before and after the channel axis
    plane         N      before  C              after    those between axis 0 and the channel axis

n elements, N = shape[0], m = n/N, C = shape[channel axis]. The last group of a row (of the tensor,
or of a sample) may be short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fxcompress.codecs.base import channel_axis

PER = ("group", "sample-group", "tensor", "sample", "channel", "plane")

_PIECE = {"cpu": 1 << 16}  # elements a piece, as in planar.group_chunks


@dataclass(frozen=True)
class Piece:
    """Consecutive elements, seen as `shape` = (outer, repeat, scales, run), with their scales."""

    span: slice
    shape: tuple[int, int, int, int]
    scales: tuple[slice, slice]

    def fold(self, flat: Tensor) -> Tensor:
        """The piece's elements in `shape`; short rows are filled with their last element."""
        rows = flat.view(self.shape[0], -1)
        if missing := math.prod(self.shape[1:]) - rows.shape[1]:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
        return rows.view(self.shape)

    def unfold(self, folded: Tensor) -> Tensor:
        """The inverse of `fold`: flat."""
        length = (self.span.stop - self.span.start) // self.shape[0]
        return folded.reshape(self.shape[0], -1)[:, :length].reshape(-1)

    def spread(self, scales: Tensor) -> Tensor:
        """What [outer, scales] of the whole tensor has for this piece, to broadcast in `shape`."""
        return scales[self.scales][:, None, :, None]


@dataclass(frozen=True)
class Sharing:
    """A tensor's (outer, repeat, scales, run), each of `outer` rows holding `row` elements."""

    outer: int
    repeat: int
    scales: int
    run: int
    row: int

    @property
    def count(self) -> int:
        """Number of scales."""
        return self.outer * self.scales

    def pieces(self, device: torch.device) -> list[Piece]:
        """All elements in order, in pieces that keep a reference's temporaries small."""
        if self.outer * self.row == 0:
            return []
        limit = _PIECE.get(device.type, 1 << 20)
        axes = (self.outer, self.repeat, self.scales, self.run)
        strides = [math.prod(axes[i + 1 :]) for i in range(4)]
        strides[0] = self.row
        cut = next(i for i in range(4) if strides[i] <= limit)  # the axis to be sliced
        found = []
        most = limit // strides[cut]
        for lead in product(*map(range, axes[:cut])):
            for first in range(0, axes[cut], most):
                length = min(most, axes[cut] - first)
                start = sum(i * s for i, s in zip((*lead, first), strides, strict=False))
                end = start + length * strides[cut]
                if cut:
                    end = min(end, (lead[0] + 1) * self.row)
                if start >= end:  # beyond a last, short run
                    continue
                ranges = [*(slice(i, i + 1) for i in lead), slice(first, first + length)]
                ranges += [slice(0, size) for size in axes[cut + 1 :]]
                outer, repeat, scales, run = (r.stop - r.start for r in ranges)
                shape = (outer, repeat, scales, run)
                found.append(Piece(slice(start, end), shape, (ranges[0], ranges[2])))
        return found

    def rows(self, x: Tensor) -> list[Tensor]:
        """[outer, scales, elements that share it]: one, or the whole groups and the short ones."""
        if self.row == self.repeat * self.scales * self.run:
            folded = x.view(self.outer, self.repeat, self.scales, self.run)
            return [folded.transpose(1, 2).flatten(2)]
        rows, whole = x.view(self.outer, self.row), self.row // self.run
        groups = rows[:, : whole * self.run].unflatten(1, (whole, self.run))
        return [part for part in (groups, rows[:, None, whole * self.run :]) if part.shape[1]]


def sharing(per: str, shape: Sequence[int], group: int = 0, channels: int = 0) -> Sharing:
    """How elements of a tensor share scales. Sizes may be SymInts: only + - * // are used."""
    shape = shape if len(shape) else (1,)
    axis = channel_axis(channels, len(shape))
    numel, sample = math.prod(shape), math.prod(shape[1:])
    after = math.prod(shape[axis + 1 :])
    if per == "group":
        return Sharing(1, 1, (numel + group - 1) // group, group, numel)
    if per == "sample-group":
        return Sharing(shape[0], 1, (sample + group - 1) // group, group, sample)
    if per == "tensor":
        return Sharing(1, 1, 1, numel, numel)
    if per == "sample":
        return Sharing(shape[0], 1, 1, sample, sample)
    if per == "channel" or axis == 0:
        return Sharing(1, math.prod(shape[:axis]), shape[axis], after, numel)
    return Sharing(shape[0], math.prod(shape[1:axis]), shape[axis], after, sample)
