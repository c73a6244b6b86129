"""Beyond: what better quantizers than ours would gain, measured before any of them is built.

Trellis-coded quantization (Marcellin and Fischer, IEEE Trans. COM 38(1), 1990): a code with twice
the levels, of which each state of a shift register allows half; the encoder finds the best path
(Viterbi). E8: the 65536 points of that lattice, shifted, nearest to the origin, at the best scale
(as in QuIP#, Tseng et al., arXiv 2402.04396). Entropy-coded: a fine uniform grid whose codes are
stored at their entropy, a size that is only known when they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.codecs import Codec
from fxcompress.codecs.levels import levels

Floats = npt.NDArray[np.float64]

# Ungerboeck's 8-state trellis: the next states and the subsets of levels on the way there.
_NEXT = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [2, 3], [4, 5], [6, 7]])
_SUBSET = np.array([[0, 2], [1, 3], [2, 0], [3, 1], [2, 0], [3, 1], [0, 2], [1, 3]])


def quantizers(bits: int = 2, length: int = 512, paths: int = 400) -> list[dict[str, Any]]:
    """Error on a unit normal of what we ship and what we might."""
    x = np.random.default_rng(0).standard_normal((paths, length))
    bound = 2.0 ** (-2 * bits)
    found = {
        "Lloyd–Max (rotate, least squares)": levels(bits).distortion,
        "trellis, 8 states": _trellis(x, bits),
        **({"E8 lattice, 65536 points": _lattice(x.reshape(-1)[:80_000])} if bits == 2 else {}),
        "uniform grid at its entropy": _entropy_coded(x.reshape(-1), bits),
        "rate–distortion bound": bound,
    }
    return [
        {
            "quantizer": name,
            "bits": bits,
            "error": e,
            "dB from the bound": 10 * math.log10(e / bound),
        }
        for name, e in found.items()
    ]


def masks(label: str, x: Tensor, codecs: Sequence[Codec]) -> list[dict[str, Any]]:
    """Bits that the mask x > 0 takes where the decoded x is known.

    flips: signs that the decoded value gets wrong, coded by position at their entropy; given
    magnitude: the same, told apart by how large the decoded value is (16 classes).
    """
    rows = []
    for found in codecs:
        key = torch.tensor([0x1234567890ABCDEF, 0])
        decoded = found.decode(found.encode(x, key, 1), x.shape, x.dtype, key, 1)
        wrong = ((decoded > 0) != (x > 0)).flatten().double()
        order = decoded.abs().flatten().argsort()
        classes = [float(_entropy(part.mean())) for part in wrong[order].tensor_split(16)]
        rows.append(
            {
                "tensor": label,
                "tensor bits": 8 * found.payload_bytes(x.shape, x.dtype) / x.numel(),
                "wrong": float(wrong.mean()),
                "flips": float(_entropy(wrong.mean())),
                "given magnitude": sum(classes) / len(classes),
            }
        )
    return rows


def _entropy(p: Tensor) -> Tensor:
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)


def _trellis(x: Floats, bits: int) -> float:
    """Mean squared error of rows of x, levels trained on another sample by Lloyd's rule."""
    levels_of = np.linspace(-2.5, 2.5, 2 << bits)
    training = np.random.default_rng(1).standard_normal((200, x.shape[1]))
    for _ in range(12):
        chosen = _paths(training, levels_of)
        counts = np.bincount(chosen.reshape(-1), minlength=len(levels_of))
        sums = np.bincount(chosen.reshape(-1), training.reshape(-1), minlength=len(levels_of))
        levels_of = np.where(counts > 0, sums / np.maximum(counts, 1), levels_of)
    return float(np.square(levels_of[_paths(x, levels_of)] - x).mean())


def _paths(x: Floats, levels_of: Floats) -> npt.NDArray[np.int64]:
    """The level of each element on the best path through the trellis."""
    rows, length = x.shape
    errors = np.square(x[:, :, None] - levels_of)  # subset s has every fourth level from s
    by_subset = errors.reshape(rows, length, -1, 4)
    best, which = by_subset.min(2), by_subset.argmin(2) * 4 + np.arange(4)
    cost = np.full((rows, 8), np.inf)
    cost[:, 0] = 0
    came = np.zeros((length, rows, 8), dtype=np.int8)
    for t in range(length):
        ahead = cost[:, :, None] + best[:, t][:, _SUBSET]  # [rows, state, branch]
        cost = np.full((rows, 8), np.inf)
        for state in range(8):
            for branch in range(2):
                to, reached = _NEXT[state, branch], ahead[:, state, branch]
                better = reached < cost[:, to]
                cost[better, to] = reached[better]
                came[t, better, to] = state * 2 + branch
    state = cost.argmin(1)
    chosen = np.zeros((rows, length), dtype=np.int64)
    row = np.arange(rows)
    for t in range(length - 1, -1, -1):
        step = came[t, row, state].astype(np.int64)
        state = step // 2
        chosen[:, t] = which[row, t, _SUBSET[state, step % 2]]
    return chosen


def _lattice(x: Floats) -> float:
    """Error of vectors of 8 coded by the nearest of 2^16 points of E8 + 1/4, 2 bits an element."""
    around = torch.cartesian_prod(*[torch.arange(-3, 4.0)] * 8)
    even = around[(around.sum(1) % 2 == 0) & (around.square().sum(1) <= 14)]
    halves = around + 0.5
    odd = halves[(halves.sum(1) % 2 == 0) & (halves.square().sum(1) <= 14)]
    points = torch.cat([even, odd]) + 0.25
    points = points[points.square().sum(1).argsort()[:65536]]
    values = torch.from_numpy(x).float().view(-1, 8)
    best = math.inf
    for scale in (0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2):
        grid, error = points * scale, 0.0
        squares = grid.square().sum(1)
        for rows in values.split(500):
            nearest = (squares - 2 * rows @ grid.mT).argmin(1)
            error += float((grid[nearest] - rows).square().sum())
        best = min(best, error / values.numel())
    return best


def _entropy_coded(x: Floats, bits: int) -> float:
    """Error of the grid whose codes have ``bits`` of entropy, cells decoded to their mean."""
    low, high = 0.05, 4.0
    for _ in range(40):
        step = (low + high) / 2
        _, codes, counts = np.unique(np.rint(x / step), return_inverse=True, return_counts=True)
        p = counts / len(x)
        low, high = (step, high) if -(p * np.log2(p)).sum() > bits else (low, step)
    means = np.bincount(codes, x) / counts
    return float(np.square(means[codes] - x).mean())
