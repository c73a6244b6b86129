"""Groups: sums over 256 consecutive elements, from which the noise of several codecs follows.

Prices of one tensor under dozens of codecs (fxcompress/calibrate.py) are sums over elements of
w^2 times a variance. Where that variance depends on its group only, or is quadratic in the element,
a few sums over each group are enough for all of them; the elements are read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE, SMALLEST = 256, 32  # the second: of what `rotate` pads a short group to
_PIECE = 1 << 10  # groups whose elements stay in the CPU's cache
_GPU_PIECE = 1 << 17  # 32 M elements: a GPU waits for the calls, not for memory


@dataclass(frozen=True)
class Groups:
    """Of elements x that a gradient reads by w (w^2: the mean over several).

    Attributes:
        size: elements in each, fp32[groups]; the last one of a row may be shorter.
        sums: fp32[7, rows, groups], see the properties.
        alone: the rows are coded apart, so that a short group is the end of a payload.
    """

    size: Tensor
    sums: Tensor
    alone: bool

    @property
    def mean(self) -> Tensor:
        """Of x, fp32[rows, groups] as all of these."""
        return self.sums[0]

    @property
    def low(self) -> Tensor:
        """The least x."""
        return self.sums[1]

    @property
    def high(self) -> Tensor:
        """The largest x."""
        return self.sums[2]

    @property
    def energy(self) -> Tensor:
        """Sum of c^2, c = x - mean."""
        return self.sums[3]

    @property
    def weight(self) -> Tensor:
        """Sum of w^2."""
        return self.sums[4]

    @property
    def first(self) -> Tensor:
        """Sum of w^2*c."""
        return self.sums[5]

    @property
    def second(self) -> Tensor:
        """Sum of w^2*c^2."""
        return self.sums[6]

    @property
    def padded(self) -> Tensor:
        """Elements that `rotate` codes each as."""
        longer = 2 ** self.size.log2().ceil()
        return longer.clamp(min=SMALLEST) if self.alone else self.size

    def rows(self, which: Tensor) -> Groups:
        """Some of the rows."""
        return Groups(self.size, self.sums.index_select(1, which), self.alone)

    def end_to_end(self) -> Groups:
        """The rows as one tensor, of pieces that make up groups of `SIZE` (or nearly, where rows
        have a short piece at their end)."""
        _, rows, n = self.sums.shape
        whole = Groups(self.size.repeat(rows), self.sums.view(7, 1, -1), alone=True)
        return whole.joined(round(SIZE * n / float(self.size.sum())))

    def joined(self, count: int) -> Groups:
        """Each `count` of a row as one."""
        if count == 1:
            return self
        size = _folded(self.size, count)
        mean, low, high, energy, weight, first, second = _folded(self.sums, count)
        total = size.sum(-1)
        middle = (mean * size).sum(-1) / total
        moved = mean - middle[..., None]
        energy = energy + size * moved.square()
        second = second + 2 * moved * first + moved.square() * weight
        sums = [t.sum(-1) for t in (energy, weight, first + moved * weight, second)]
        low = torch.where(size > 0, low, math.inf).amin(-1)
        high = torch.where(size > 0, high, -math.inf).amax(-1)
        return Groups(total, torch.stack([middle, low, high, *sums]), self.alone)


def groups(x: Tensor, squares: Tensor, *, alone: bool = True, of: int = SIZE) -> Groups:
    """Of the rows of x and w^2, [rows, n], n > 0: each a tensor of its own, or parts of what is
    coded.

    of: elements in each group.
    """
    rows, n = x.shape
    whole = n // of * of
    parts = []
    if whole:
        main = [t[:, :whole].reshape(-1, of) for t in (x, squares)]
        most = (_PIECE if x.device.type == "cpu" else _GPU_PIECE) * SIZE // of
        pieces = zip(*(t.split(most) for t in main), strict=True)
        parts.append(torch.cat([_sums(*piece) for piece in pieces], 1).view(7, rows, -1))
    if n > whole:
        parts.append(_sums(x[:, whole:], squares[:, whole:])[:, :, None])
    sizes = [float(of)] * (whole // of) + [float(n - whole)] * (n > whole)
    found = torch.cat(parts, 2)
    found = torch.where(found.isfinite().all(0), found, 0.0)  # decodes to NaN: no noise to price
    return Groups(x.new_tensor(sizes, dtype=torch.float32), found, alone)


def mean_square(weights: Sequence[Tensor]) -> Tensor:
    """Of each element over covectors that are alike in shape, fp32."""
    total = weights[0].float().square()
    for w in weights[1:]:
        total.addcmul_(w.float(), w.float())
    return total.div_(len(weights))


def _sums(x: Tensor, squares: Tensor) -> Tensor:
    """fp32[7, rows] of [rows, n]."""
    x, squares = x.float(), squares.float()
    mean = x.mean(1)
    c = x - mean[:, None]
    weighed = squares * c
    sums = (c.square(), squares, weighed, weighed * c)
    return torch.stack([mean, x.amin(1), x.amax(1), *(s.sum(1) for s in sums)])


def _folded(x: Tensor, count: int) -> Tensor:
    """[..., n] as [..., n/count, count]; zeros where the last one has no more."""
    missing = -x.shape[-1] % count
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padded.view(*x.shape[:-1], -1, count)
