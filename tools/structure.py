"""Structure: what other models of a saved tensor would gain, measured before any is built.

Each row is the error over the variance that ideal coders would make at a mean rate of 2 bits: bits
by reverse water-filling of band energies on one batch, `2^(−2b)` of the energies on *another*.
- over space: nothing, Walsh–Hadamard, DCT, Haar, the tensor's own KLT; then the KLT of blocks of 64
  channels, which all of them have;
- the residual of the best linear map from the saved tensor before it, decoded from 2 bits;
- the residual of the best low rank of each sample, factors at 16 bits counted in the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.codecs.base import channel_axis
from fxcompress.codecs.basis import folded
from fxcompress.fit import at_rate, fit

RATE = 2.0
WIDTH = 64
RANKS = (1, 4, 16)


def structure(
    label: str, first: Tensor, second: Tensor, axis: int, before: tuple[Tensor, Tensor, int] | None
) -> list[dict[str, Any]]:
    """Rows of one tensor.

    Args:
        first, second: its values on two batches, in storage order; fitted to the first.
        axis: of channels.
        before: the saved tensor before it on both batches, and its channel axis, if it has as many
            positions.
    """
    a, b = (_centred(x, first, axis) for x in (first, second))
    variance = float(b.square().mean())
    sides = _sides(a.shape[1:-1] or a.shape[:-1])
    spatial: dict[str, tuple[Sequence[int], Callable[[int], Tensor]]] = {
        "channels alone": ([1] * len(sides), _identity),
        "Walsh–Hadamard": (sides, _hadamard),
        "DCT": (sides, _dct),
        "Haar": (sides, _haar),
    }
    found = {
        name: _error(_space(a, s, matrix), _space(b, s, matrix), RATE)
        for name, (s, matrix) in spatial.items()
    }
    basis = _own_basis(_blocks_of(a, sides))
    own = [torch.einsum("fg,gpc->fpc", basis, _blocks_of(x, sides)) for x in (a, b)]
    found["KLT over space"] = _error(own[0], own[1], RATE)

    def hadamard(rest: tuple[Tensor, Tensor], rate: float) -> float:
        first, second = (_space(x, sides, _hadamard) for x in rest)
        return _error(first, second, rate)

    if before is not None:
        found["Walsh–Hadamard, predicted from the tensor before"] = hadamard(
            _predicted(a, b, before), RATE
        )
    for rank in RANKS:
        rows, channels = math.prod(a.shape[1:-1]), a.shape[-1]
        side = 16 * rank * (rows + channels) / (rows * channels)
        if rank < min(rows, channels) and side < RATE:
            found[f"Walsh–Hadamard, without rank {rank} of each sample"] = hadamard(
                (_without_rank(a, rank), _without_rank(b, rank)), RATE - side
            )
    return [
        {
            "tensor": label,
            "model": name,
            "error at 2 bits": error / variance,
            "dB": -10 * math.log10(max(error / variance, 1e-30)),
        }
        for name, error in found.items()
    ]


def _centred(x: Tensor, like: Tensor, axis: int) -> Tensor:
    """Channels last, without the means that the first batch has."""
    at = channel_axis(axis, x.dim())
    mean = like.float().movedim(at, -1).reshape(-1, like.shape[at]).mean(0)
    return x.float().movedim(at, -1) - mean


def _sides(positions: Sequence[int]) -> list[int]:
    return [next(s for s in (4, 2, 1) if size % s == 0) for size in positions]


def _blocks_of(y: Tensor, sides: Sequence[int]) -> Tensor:
    """[positions in a block, blocks, channels]."""
    return folded(y, sides).reshape(math.prod(sides), -1, y.shape[-1])


def _space(y: Tensor, sides: Sequence[int], matrix: Callable[[int], Tensor]) -> Tensor:
    """[frequencies, positions, channels]."""
    whole = torch.ones(1, 1)
    for side in sides:
        whole = torch.kron(whole, matrix(side))
    return torch.einsum("fg,gpc->fpc", whole, _blocks_of(y, sides))


def _error(first: Tensor, second: Tensor, rate: float) -> float:
    """Mean squared error on the second, [frequencies, positions, channels], at so many bits."""
    energies, actual = [], []
    for a, b in zip(first.split(WIDTH, 2), second.split(WIDTH, 2), strict=True):
        rows = a.reshape(-1, a.shape[2]).double()
        size = rows.shape[1]
        covariance = rows.mT @ rows / len(rows)
        share = size / (size + len(rows))  # as in fxcompress.fit
        mean = covariance.diagonal().mean()
        covariance = (1 - share) * covariance + share * mean * torch.eye(size, dtype=torch.float64)
        _, vectors = torch.linalg.eigh(covariance)
        energies.append((a.double() @ vectors).square().mean(1).flatten())
        actual.append((b.double() @ vectors).square().mean(1).flatten())
    fitted, seen = torch.cat(energies).clamp(min=1e-30), torch.cat(actual)
    low, high = float(fitted.log().min()) - 40, float(fitted.log().max())
    for _ in range(80):
        level = (low + high) / 2
        bits = (fitted.log() - level).clamp(min=0) / (2 * math.log(2))
        low, high = (level, high) if float(bits.mean()) > rate else (low, level)
    return float((seen * torch.exp2(-2 * bits)).mean())


def _own_basis(blocks: Tensor) -> Tensor:
    """Eigenvectors of what positions of a block have in common, over all channels."""
    rows = blocks.reshape(len(blocks), -1).double()
    _, vectors = torch.linalg.eigh(rows @ rows.mT)
    return vectors.mT.float()


def _predicted(a: Tensor, b: Tensor, before: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor]:
    """Residuals of both, the linear map fitted to the first batch, its input coded at 2 bits."""
    inputs = []
    coded = at_rate(fit(before[0], [torch.randn_like(before[0])], before[2]), RATE)
    for draw, x in enumerate(before[:2]):
        key = torch.tensor([0x1234567890ABCDEF, draw])
        decoded = coded.decode(coded.encode(x, key, 1), x.shape, x.dtype, key, 1)
        rows = _centred(decoded, before[0], before[2])
        inputs.append(rows.reshape(-1, rows.shape[-1]).double())
    gram = inputs[0].mT @ inputs[0]
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    target = a.reshape(-1, a.shape[-1]).double()
    weights = torch.linalg.solve(gram + ridge, inputs[0].mT @ target)
    rest = [
        (x.reshape(-1, x.shape[-1]).double() - rows @ weights).float().view(x.shape)
        for x, rows in zip((a, b), inputs, strict=True)
    ]
    return rest[0], rest[1]


def _without_rank(y: Tensor, rank: int) -> Tensor:
    """What the best matrices of that rank, one a sample, leave of [samples, ..., channels]."""
    rows = y.reshape(len(y), -1, y.shape[-1])
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    values[:, :rank] = 0
    return ((left * values[:, None]) @ right).view(y.shape)


def _identity(side: int) -> Tensor:
    return torch.eye(side)


def _hadamard(side: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < side:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / side**0.5


def _dct(side: int) -> Tensor:
    k, n = torch.arange(side)[:, None], torch.arange(side)[None]
    matrix = torch.cos(math.pi * (2 * n + 1) * k / (2 * side)) * (2 / side) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def _haar(side: int) -> Tensor:
    if side == 1:
        return torch.ones(1, 1)
    low = torch.kron(_haar(side // 2), torch.tensor([[1.0, 1.0]]))
    high = torch.kron(torch.eye(side // 2), torch.tensor([[1.0, -1.0]]))
    return torch.cat([low, high]) / 2**0.5
