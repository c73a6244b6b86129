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
        z = self.forward(x.float())
        at = 0
        for number, codec, bands in self._classes():
            part = codec.encode(_select(z, bands), key, _stream(stream, number))
            payload[at : at + part.numel()] = part
            end = (at + part.numel() + 3) // 4 * 4
            payload[at + part.numel() : end] = 0
            at = end
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        positions = x.numel() // self._bands()
        z = payload.new_zeros((self._bands(), positions), dtype=torch.float32)
        at = 0
        for number, codec, bands in self._classes():
            shape = [len(bands), positions]
            size = codec.payload_bytes(shape, torch.float32)
            part = payload[at : at + size]
            decoded = codec.decode(part, shape, torch.float32, key, _stream(stream, number))
            z[torch.from_numpy(bands).to(z.device)] = decoded
            at += (size + 3) // 4 * 4
        limit = torch.finfo(x.dtype).max
        x.copy_(self.backward(z, x.shape).clamp_(-limit, limit))
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
        """Coefficients fp32[bands, positions] of fp32 x."""
        state = states.get(self.basis, x.device)
        y = x.movedim(channel_axis(self.channels, x.dim()), -1) - state["mean"]
        return analyse(y, self._sides(), state["analysis"])

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
        sides, matrices = self._sides(), states.get(self.basis, z.device)["synthesis"]
        if squared:
            matrices = matrices.square()
        blocks, _, width = matrices.shape
        parts = z.reshape(math.prod(sides), blocks, width, -1)
        y = torch.einsum("fbip,bji->pfbj", parts, matrices).flatten(-2)
        y = y.sum(1, keepdim=True).expand_as(y) / y.shape[1] if squared else _hadamard(y, sides)
        axis = channel_axis(self.channels, len(shape))
        positions = [size for i, size in enumerate(shape) if i != axis]
        return _join(y, positions, sides).movedim(-1, axis)

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


def analyse(y: Tensor, sides: Sequence[int], matrices: Tensor) -> Tensor:
    """Coefficients [bands, positions] of y, [positions..., channels].

    sides: of the blocks over its last position axes; matrices: [blocks, width, width] of channels.
    """
    y = _hadamard(_split(y, sides), sides)  # [positions, frequencies, channels]
    blocks, width, _ = matrices.shape
    z = torch.einsum("pfbi,bji->fbjp", y.unflatten(-1, (blocks, width)), matrices)
    return z.reshape(-1, z.shape[-1])


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


def _split(y: Tensor, sides: Sequence[int]) -> Tensor:
    """[..., channels] -> [positions, frequencies, channels]; sides of the last position axes."""
    lead = y.dim() - 1 - len(sides)
    if math.prod(sides) == 1:
        return y.reshape(-1, 1, y.shape[-1])
    shape = list(y.shape[:lead])
    for size, side in zip(y.shape[lead:-1], sides, strict=True):
        shape += [size // side, side]
    y = y.reshape(*shape, y.shape[-1])
    inner = [lead + 2 * i + 1 for i in range(len(sides))]
    outer = [i for i in range(y.dim() - 1) if i not in inner]
    return y.permute(*outer, *inner, y.dim() - 1).reshape(-1, math.prod(sides), y.shape[-1])


def _join(y: Tensor, positions: Sequence[int], sides: Sequence[int]) -> Tensor:
    """The inverse of `_split`: [positions, frequencies, channels] -> [*positions, channels]."""
    lead = len(positions) - len(sides)
    if math.prod(sides) == 1:
        return y.reshape(*positions, y.shape[-1])
    outer = [*positions[:lead], *(s // b for s, b in zip(positions[lead:], sides, strict=True))]
    y = y.reshape(*outer, *sides, y.shape[-1])
    order = list(range(lead))
    for i in range(len(sides)):
        order += [lead + i, len(outer) + i]
    return y.permute(*order, y.dim() - 1).reshape(*positions, y.shape[-1])


def _hadamard(y: Tensor, sides: Sequence[int]) -> Tensor:
    """Orthonormal Walsh-Hadamard transform over axis 1, an axis of blocks of these sides."""
    count = math.prod(sides)
    h = 1
    while h < count:
        y = y.unflatten(1, (-1, 2, h))
        low, high = y[:, :, 0], y[:, :, 1]
        y = torch.stack([low + high, low - high], 2).flatten(1, 3)
        h *= 2
    return y / math.sqrt(count) if count > 1 else y
