"""transform: decorrelate, then spend bits where the gradient notices (transform coding).

Saved tensors are strongly correlated: over space, and over channels. For a tensor with positions p
and channels c (storage order, the channel axis given):

    y    = x - mean[c]                                       calibrated means
    y    = blockwise Walsh-Hadamard of y over space          the state's sides, orthonormal
    z    = analysis @ y, in blocks of (64) channels          calibrated, one small matrix product
    band = (spatial frequency, channel coefficient); each band has a rate from the state

A band at rate 1..5 is coded by `rotate` (no mean), above by `dither`, below 1 by `subsample`; bands
of one rate are coded together, those of similar energy side by side, positions running fastest. A
band at rate 0 is dropped and decodes to the mean: the one biased choice. Then everything is undone:
`x' = synthesis @ z' ...`, synthesis the inverse of analysis.

Rates come from reverse water-filling (fxcompress/fit.py) of band energies weighted by how strongly
the gradient reads each band. DIVISION and averaging are special cases: the spatial mean kept at
many bits and the rest at few, or dropped. Classic theory: Goyal, "Theoretical foundations of
transform coding", IEEE Signal Processing Magazine 18(5), 2001.

payload = the payloads of the rates, from the highest to the lowest, each padded to 4 bytes
bytes   = sum of theirs: bands(rate) * positions elements each
error   = variance synthesis^2 of the bands' variances; bias of dropped bands

The matrix products are rounded as each device rounds them: payloads of different devices may differ
where a coefficient lies on a threshold. The coders within are bit-exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.codecs import states
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys, channel_axis
from fxcompress.codecs.dither import Dither
from fxcompress.codecs.rotate import Rotate
from fxcompress.codecs.subsample import Subsample
from fxcompress.persistent import persistent

Bands = npt.NDArray[np.int64]

# Bits a coefficient, in the order of their numbers in a state's `rates`.
RATES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


@cache
def coder(rate: float) -> Codec | None:
    """The codec of one rate; None for dropped bands."""
    if rate == 0:
        return None
    if rate < 1:
        return Subsample(rate=rate)
    return Rotate(bits=int(rate), mean="none") if rate <= 5 else Dither(bits=int(rate))


@dataclass(frozen=True)
class Transform(Codec):
    """`basis` and `rates` name calibrated states; see fxcompress.fit."""

    basis: str = ""
    rates: str = ""
    channels: int = -1

    name: ClassVar[str] = "transform"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    decode_needs_key: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        return bool(states.arrays(self.rates)["rates"].all())

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        positions = math.prod(shape) // self._bands()
        total = 0
        for _, codec, bands in self._classes():
            size = codec.payload_bytes([len(bands) * positions], torch.float32)
            total = total + (size + 3) // 4 * 4
        return total

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        z, at = self.forward(x), 0
        for number, codec, _ in self._classes():
            index = _index(self.basis, self.rates, number, x.device)
            part = codec.encode(z.index_select(0, index), key, _stream(stream, number))
            end = (at + part.numel() + 3) // 4 * 4
            payload[at : at + part.numel()] = part
            payload[at + part.numel() : end] = 0
            at = end
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        positions = x.numel() // self._bands()
        z = payload.new_empty((self._bands(), positions), dtype=torch.float32)
        at, found = 0, 0
        for number, codec, bands in self._classes():
            shape = [len(bands), positions]
            size = codec.payload_bytes(shape, torch.float32)
            part = payload[at : at + size]
            decoded = codec.decode(part, shape, torch.float32, key, _stream(stream, number))
            z.index_copy_(0, _index(self.basis, self.rates, number, x.device), decoded)
            at += (size + 3) // 4 * 4
            found += len(bands)
        if found < len(z):
            z.index_fill_(0, _index(self.basis, self.rates, 0, x.device), 0.0)
        axis, limit = channel_axis(self.channels, x.dim()), torch.finfo(x.dtype).max
        y = self._synthesise(z, states.get(self.basis, z.device)["synthesis"], x.shape)
        y.add_(states.get(self.basis, z.device)["mean"]).clamp_(-limit, limit)
        folded(x.movedim(axis, -1), self._sides()).copy_(y)
        return True

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        raise AssertionError("made of other codecs, which have references of their own")

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        raise AssertionError("made of other codecs, which have references of their own")

    def error(self, x: Tensor) -> ErrorModel:
        z = self.forward(x.float())
        variance, bias = torch.zeros_like(z), -z
        for _, codec, bands in self._classes():
            found = codec.error(_select(z, bands))
            variance[bands], bias[bands] = found.variance, found.bias
        return ErrorModel(
            self._backward(variance, x.shape, squared=True),
            self._backward(bias, x.shape) if not self.unbiased else torch.zeros_like(x).float(),
        )

    def effect(self, x: Tensor, weights: Tensor) -> tuple[float, float]:
        """Noise of different bands is independent, that of channels and pixels is not."""
        return self.effect_on_bands(self.forward(x.float()), self.adjoint(weights.float()))

    def effect_on_bands(self, z: Tensor, w: Tensor) -> tuple[float, float]:
        """`effect` of coefficients and the gradient's derivative by them, [bands, positions]."""
        variance, dropped = 0.0, torch.ones(len(z), dtype=torch.bool)
        for _, codec, bands in self._classes():
            variance += codec.effect(_select(z, bands), _select(w, bands))[0]
            dropped[bands] = False
        bias = float((w[dropped] * z[dropped]).sum(dtype=torch.float64))
        return variance, bias**2

    def forward(self, x: Tensor) -> Tensor:
        """Coefficients fp32[bands, positions] of x."""
        state = states.get(self.basis, x.device)
        y = x.movedim(channel_axis(self.channels, x.dim()), -1)
        return analyse(y, self._sides(), state["analysis"], state["mean"])

    def adjoint(self, weights: Tensor) -> Tensor:
        """What a covector of x is to the coefficients: (weights * x).sum() = (result * z).sum()."""
        state = states.get(self.basis, weights.device)
        y = weights.movedim(channel_axis(self.channels, weights.dim()), -1)
        return analyse(y, self._sides(), state["synthesis"].mT)

    def backward(self, z: Tensor, shape: Sequence[int]) -> Tensor:
        """fp32 tensor of `shape` from its coefficients."""
        axis = channel_axis(self.channels, len(shape))
        mean = states.get(self.basis, z.device)["mean"]
        flat = self._backward(z, shape)
        return flat + mean.view(*[-1 if i == axis else 1 for i in range(len(shape))])

    def _backward(self, z: Tensor, shape: Sequence[int], squared: bool = False) -> Tensor:
        """The linear part of the inverse; ``squared``: of the squares of its entries."""
        matrices = states.get(self.basis, z.device)["synthesis"]
        y = self._synthesise(z, matrices.square() if squared else matrices, shape, squared)
        out = z.new_empty(list(shape))
        axis = channel_axis(self.channels, len(shape))
        folded(out.movedim(axis, -1), self._sides()).copy_(y)
        return out

    def _synthesise(
        self, z: Tensor, matrices: Tensor, shape: Sequence[int], squared: bool = False
    ) -> Tensor:
        """The linear part of the inverse, as `folded` sees a tensor of `shape`."""
        sides = self._sides()
        blocks, _, width = matrices.shape
        count = math.prod(sides)
        parts = z.view(count, blocks, width, -1)
        rows = z.new_empty(count, parts.shape[-1], blocks * width)
        for block, out in enumerate(rows.split(width, 2)):
            torch.bmm(parts[:, block].mT, matrices[block].mT.expand(count, -1, -1), out=out)
        if squared:
            rows = rows.mean(0, keepdim=True).expand_as(rows)
        elif count > 1:
            rows = _hadamard(count, z.device) @ rows.view(count, -1)
        axis = channel_axis(self.channels, len(shape))
        like = torch.empty(list(shape), device="meta").movedim(axis, -1)
        return rows.reshape(folded(like, sides).shape)

    def _sides(self) -> list[int]:
        sides: list[int] = states.arrays(self.basis)["sides"].tolist()
        return sides

    def _bands(self) -> int:
        return len(states.arrays(self.rates)["rates"])

    def _classes(self) -> Iterator[tuple[int, Codec, Bands]]:
        """(number, codec, bands) of each rate in use, from the highest."""
        for number, bands in _by_rate(self.basis, self.rates):
            codec = coder(RATES[number])
            if codec is not None:
                yield number, codec, bands


def analyse(
    y: Tensor, sides: Sequence[int], matrices: Tensor, mean: Tensor | None = None
) -> Tensor:
    """Coefficients [bands, positions] of y - mean; y is [positions..., channels].

    sides: of the blocks over its last position axes; matrices: [blocks, width, width] of channels.
    """
    view, count = folded(y.detach(), sides), math.prod(sides)
    rows = y.new_empty(view.shape, dtype=torch.float32)
    if mean is None:
        rows.copy_(view)
    else:
        torch.sub(view, mean, out=rows)
    rows = rows.view(count, -1)
    if count > 1:
        rows = _hadamard(count, y.device) @ rows
    rows = rows.view(count, -1, y.shape[-1])  # [frequencies, positions, channels]
    blocks, width, _ = matrices.shape
    z = rows.new_empty(count, blocks, width, rows.shape[1])
    for block, part in enumerate(rows.split(width, 2)):
        torch.bmm(matrices[block].expand(count, -1, -1), part.mT, out=z[:, block])
    return z.view(-1, rows.shape[1])


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


@cache
def _hadamard(count: int, device: torch.device) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < count:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    with persistent(device):
        return (matrix / math.sqrt(count)).to(device)


@cache
def _index(basis: str, rates: str, number: int, device: torch.device) -> Tensor:
    """The bands of a rate, int64 on a device; kept there, so that no step waits for a copy."""
    with persistent(device):
        return torch.from_numpy(dict(_by_rate(basis, rates))[number]).to(device)


@cache
def _by_rate(basis: str, rates: str) -> tuple[tuple[int, Bands], ...]:
    """Bands of each rate in use, from the highest rate; in each, from the most energy."""
    numbers, order = states.arrays(rates)["rates"], states.arrays(basis)["order"].astype(np.int64)
    found = ((n, order[numbers[order] == n]) for n in range(len(RATES) - 1, -1, -1))
    return tuple((n, bands) for n, bands in found if len(bands))


def _select(z: Tensor, bands: Bands) -> Tensor:
    return z.index_select(0, torch.from_numpy(bands).to(z.device))


def _stream(stream: int, number: int) -> int:
    """Streams of their own for the coders inside: above those of whole tensors."""
    return (stream + 1) * 4096 + number
