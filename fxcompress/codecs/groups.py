"""Groups: sums over 256 consecutive elements, from which the noise of several codecs follows.

Prices of one tensor under dozens of codecs (fxcompress/calibrate.py) are sums over elements of
w^2 times a variance. Where that variance depends on its group only, or is quadratic in the element,
a few sums over each group are enough for all of them; the elements are read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE, SMALLEST = 256, 32  # the second: of what `rotate` pads a short group to
_PIECE = 1 << 10  # groups whose elements stay in the CPU's cache
_GPU_PIECE = 1 << 17  # 32 M elements: a GPU waits for the calls, not for memory


@dataclass(frozen=True)
class Groups:
    """Of elements x that a gradient reads by w; all fp32[rows, groups] but `size`.

    Attributes:
        size: elements in each, fp32[groups]; the last one of a row may be shorter.
        mean, low, high: of x.
        energy: sum of c^2, c = x - mean.
        weight, first, second: sums of w^2, of w^2*c and of w^2*c^2.
        alone: the rows are coded apart, so that a short group is the end of a payload.
    """

    size: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor
    energy: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor
    alone: bool

    @property
    def padded(self) -> Tensor:
        """Elements that `rotate` codes each as."""
        longer = 2 ** self.size.log2().ceil()
        return longer.clamp(min=SMALLEST) if self.alone else self.size

    def rows(self, which: Tensor) -> Groups:
        """Some of the rows."""
        sums = (self.energy, self.weight, self.first, self.second)
        some = (t.index_select(0, which) for t in (self.mean, self.low, self.high, *sums))
        mean, low, high, energy, weight, first, second = some
        return Groups(self.size, mean, low, high, energy, weight, first, second, self.alone)

    def end_to_end(self) -> Groups:
        """The rows as one tensor, of pieces that make up groups of `SIZE` (or nearly, where rows
        have a short piece at their end)."""
        rows, n = self.mean.shape
        sums = (self.mean, self.low, self.high, self.energy, self.weight, self.first, self.second)
        size, whole = self.size.repeat(rows), (t.reshape(1, -1) for t in sums)
        return Groups(size, *whole, alone=True).joined(round(SIZE * n / float(self.size.sum())))

    def joined(self, count: int) -> Groups:
        """Each `count` of a row as one."""
        size = _folded(self.size[None], count)
        total = size.sum(-1)
        mean = (_folded(self.mean, count) * size).sum(-1) / total
        moved = _folded(self.mean, count) - mean[..., None]
        weight, first = _folded(self.weight, count), _folded(self.first, count)
        energy = _folded(self.energy, count) + size * moved.square()
        second = _folded(self.second, count) + 2 * moved * first + moved.square() * weight
        return Groups(
            total[0],
            mean,
            _folded(self.low, count, math.inf).amin(-1),
            _folded(self.high, count, -math.inf).amax(-1),
            energy.sum(-1),
            weight.sum(-1),
            (first + moved * weight).sum(-1),
            second.sum(-1),
            self.alone,
        )


def groups(x: Tensor, w: Tensor, *, alone: bool = True, of: int = SIZE) -> Groups:
    """Of the rows of [rows, n], n > 0: each a tensor of its own, or parts of what is coded.

    of: elements in each group.
    """
    rows, n = x.shape
    whole = n // of * of
    parts = []
    if whole:
        main = [t[:, :whole].reshape(-1, of) for t in (x, w)]
        most = (_PIECE if x.device.type == "cpu" else _GPU_PIECE) * SIZE // of
        pieces = zip(*(t.split(most) for t in main), strict=True)
        parts.append(torch.cat([_sums(*piece) for piece in pieces], 1).view(7, rows, -1))
    if n > whole:
        parts.append(_sums(x[:, whole:], w[:, whole:])[:, :, None])
    sizes = [float(of)] * (whole // of) + [float(n - whole)] * (n > whole)
    found = torch.cat(parts, 2)
    found = torch.where(found.isfinite().all(0), found, 0.0)  # decodes to NaN: no noise to price
    mean, low, high, energy, weight, first, second = found
    size = x.new_tensor(sizes, dtype=torch.float32)
    return Groups(size, mean, low, high, energy, weight, first, second, alone)


def _sums(x: Tensor, w: Tensor) -> Tensor:
    """fp32[7, rows] of [rows, n]."""
    x, squares = x.float(), w.float().square()
    mean = x.mean(1)
    c = x - mean[:, None]
    weighed = squares * c
    sums = (c.square(), squares, weighed, weighed * c)
    return torch.stack([mean, x.amin(1), x.amax(1), *(s.sum(1) for s in sums)])


def _folded(x: Tensor, count: int, end: float = 0.0) -> Tensor:
    """[rows, n] as [rows, n/count, count]; `end` where the last one has no more."""
    rows, n = x.shape
    return torch.nn.functional.pad(x, (0, -n % count), value=end).view(rows, -1, count)
