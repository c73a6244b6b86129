"""Where a transform codec's kernels find the elements of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

LARGEST = 16  # places in a block of neighbours
WIDEST = 64  # channels in a block of them


@dataclass(frozen=True)
class Place:
    """Blocks of neighbours in a contiguous tensor, and blocks of channels.

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
    def bands(self) -> int:
        return self.count * self.channels


def fits(sides: Sequence[int], width: int) -> bool:
    """Tiles of such blocks are ones that the kernels can work on."""
    return len(sides) <= 2 and math.prod(sides) <= LARGEST and width <= WIDEST


@lru_cache(maxsize=4096)
def placed(shape: tuple[int, ...], axis: int, sides: tuple[int, ...], width: int) -> Place | None:
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
    if not fits(sides, width) or not math.prod(shape):
        return None
    while len(last) < 2:
        last, sides = [(1, 0), *last], (1, *sides)
    (height, down), (wide, along) = last
    if sides[0] * down >= 1 << 31:  # kernels count within a block in 32 bits
        return None
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
