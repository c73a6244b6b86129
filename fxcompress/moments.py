"""Moments: what a transform codec has to know of a tensor, added up over batches.

A basis follows from second moments alone: of the values around their mean, and of the gradient's
derivatives by them. So batches are seen one by one and need not be held together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codecs.base import channel_axis
from fxcompress.codecs.basis import analyse

WIDTH = 64  # channels a block: 2*64 multiply-adds an element and way, a fraction of the layer's own
SIDES = (4, 2, 1)  # of spatial blocks


@dataclass(frozen=True)
class Moments:
    """Of one tensor.

    Attributes:
        channels: position of the channel axis in storage order.
        mean: of each channel, float64[channels].
        positions: how many values a channel has had.
        values: by block sides, around the mean: Σ z zᵀ, float64[frequencies, blocks, width, width],
            over the coefficients z of blocks of channels at a spatial frequency.
        weights: the same of the derivatives by them, around zero.
        probes: how many derivatives were added up.
    """

    channels: int
    mean: Tensor
    positions: int
    values: dict[tuple[int, ...], Tensor]
    weights: dict[tuple[int, ...], Tensor]
    probes: int


def moments(
    values: Tensor,
    weights: Sequence[Tensor],
    channels: int,
    *,
    width: int = WIDTH,
    sides: Sequence[int] | None = None,
) -> Moments:
    """Moments of one batch.

    Args:
        values: what will be coded, in storage order.
        weights: derivatives of random combinations of the gradient by it (fxcompress.sensitivity).
        channels: position of the channel axis.
        width: channels in a block of the basis.
        sides: the only block sides to look at; None: all worth trying.
    """
    axis = channel_axis(channels, values.dim())
    y = values.float().movedim(axis, -1)
    mean = y.reshape(-1, y.shape[-1]).double().mean(0)
    y = y - mean.float()
    covectors = [w.float().movedim(axis, -1) for w in weights]
    tried = _sides(y.shape[:-1]) if sides is None else [tuple(sides)]
    return Moments(
        axis,
        mean.cpu(),
        y.numel() // y.shape[-1],
        {s: _products(y, s, width) for s in tried},
        {s: sum(_products(w, s, width) for w in covectors) for s in tried},  # type: ignore[misc]
        len(covectors),
    )


def together(first: Moments, second: Moments) -> Moments:
    """Moments of two batches of the same tensor."""
    positions = first.positions + second.positions
    share = second.positions / positions
    mean = first.mean + share * (second.mean - first.mean)
    return Moments(
        first.channels,
        mean,
        positions,
        {
            s: _around(first, mean, s) + _around(second, mean, s)
            for s in first.values
            if s in second.values
        },
        {s: first.weights[s] + second.weights[s] for s in first.weights if s in second.weights},
        first.probes + second.probes,
    )


def _around(of: Moments, mean: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Products of the values around another mean: only frequency 0 sees a constant."""
    found = of.values[sides].clone()
    count = math.prod(sides)
    moved = (of.mean - mean).view(found.shape[1], -1) * count**0.5
    found[0] += of.positions // count * moved[:, :, None] * moved[:, None, :]
    return found


def _products(y: Tensor, sides: Sequence[int], width: int) -> Tensor:
    channels = y.shape[-1]
    blocks = _blocks(channels, width)
    identity = torch.eye(channels // blocks, device=y.device).repeat(blocks, 1, 1)
    z = analyse(y, sides, identity).view(math.prod(sides), blocks, channels // blocks, -1)
    return (z @ z.mT).double().cpu()


def _sides(positions: Sequence[int]) -> list[tuple[int, ...]]:
    """Block sides worth trying over the position axes after the first (over it if there is no
    other): none, then squares as far as the axes divide by them."""
    axes = positions[1:] or positions
    found = {
        tuple(next(s for s in SIDES if s <= most and size % s == 0) for size in axes)
        for most in SIDES
    }
    return sorted(found)


def _blocks(count: int, width: int) -> int:
    """As few equal blocks of at most ``width`` channels as divide ``count``."""
    blocks = max(1, -(-count // width))
    while count % blocks:
        blocks += 1
    return blocks
