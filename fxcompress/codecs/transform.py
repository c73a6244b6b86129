"""transform: decorrelate, then spend bits where the gradient notices (transform coding).

Saved tensors are strongly correlated: over space, and over channels. For a tensor with positions p
and channels c (storage order, the channel axis given):

    y    = x - mean[c]                                       its own means, or calibrated ones
    y    = blockwise Walsh-Hadamard of y over space          the state's sides, orthonormal
    z    = analysis @ y, in blocks of (64) channels          calibrated, one small matrix product
    band = (spatial frequency, channel coefficient)

How many bands have which rate is calibrated, by reverse water-filling (fxcompress/fit.py) of their
energies, weighted by how strongly the gradient reads them. *Which* bands is decided at each encode:
the highest rates go to those with the most weighted energy now. With the bands fixed as well, a GPT
calibrated at step 50 had 200 times the noise 500 steps later; a band that had woken up at a
sixteenth of a bit was to blame. Bases may grow old in the same way, slower.

A band at rate 1..5 is coded by `rotate` (no mean), above by `dither`, below 1 by `subsample`; bands
of one rate are coded together, positions running fastest. A band at rate 0 is dropped and decodes
to the mean: the one biased choice. Then everything is undone: `x' = synthesis @ z' ...`, synthesis
the inverse of analysis. DIVISION and averaging are special cases: the spatial mean kept at many
bits and the rest at few, or dropped. Classic theory: Goyal, "Theoretical foundations of transform
coding", IEEE Signal Processing Magazine 18(5), 2001.

payload = version of the basis | rate of each band, 4 bits | bf16 means of channels, where they are
          its own | payloads of the rates, from the highest to the lowest; each padded to 4 bytes
bytes   = sum of these; a rate's: bands(rate) * positions elements
error   = variance synthesis^2 of the bands' variances; bias of dropped bands

The matrix products are rounded as each device rounds them: payloads of different devices may differ
where a coefficient lies on a threshold. The coders within are bit-exact. On GPUs the changes of
basis are kernels of their own (kernels/triton/transform.py), elsewhere ATen operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxcompress.codecs import states
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys, channel_axis
from fxcompress.codecs.dither import Dither
from fxcompress.codecs.rotate import Rotate
from fxcompress.codecs.subsample import Subsample
from fxcompress.kernels import cpu, triton
from fxcompress.persistent import persistent

if TYPE_CHECKING:
    from fxcompress.kernels.triton.transform import Place

VERSION = 4  # bytes that tell by which version of its basis a payload was made (states.py)
# Bits a coefficient, in the order of their numbers in a state's `rates`.
RATES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
# Elements that are transformed at once, in memory that is in use then and in the cache. Of 64 MB of
# fp32 encoding took 173 ms and decoding 157, as one 214 and 200 (one core, a clone 34).
_PART = 1 << 19


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
        bands = self._bands()
        positions = math.prod(shape) // bands
        total = VERSION + _aligned((bands + 1) // 2) + _aligned(2 * self._running_means())
        for _, codec, count in self._classes():
            total = total + _aligned(codec.payload_bytes([count * positions], torch.float32))
        return total

    def workspace_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Of `encode` and of `decode`: coefficients, and rows on their way to or from them."""
        return 8 * math.prod(shape)

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        payload.zero_()
        version = states.version(self.basis, x.device)
        payload[:1] = version
        state = states.of_version(self.basis, version)
        mean, at = self._mean(x, state), VERSION + _aligned((self._bands() + 1) // 2)
        if self._running_means():
            payload[at : at + 2 * len(mean)].view(torch.bfloat16).copy_(mean)
            at += _aligned(2 * len(mean))
        z, numbers, order = self._ordered(x, state, mean)
        payload[VERSION : VERSION + (len(z) + 1) // 2] = _nibbles(numbers)
        start = 0
        for number, codec, count in self._classes():
            span = slice(start, start + count)
            bands = z[span]
            if order is not None:
                bands = cpu.empty(bands.shape, z.device)
                torch.index_select(z, 0, order[span], out=bands)
            part = codec.encode(bands, key, _stream(stream, number))
            payload[at : at + part.numel()] = part
            start, at = start + count, at + _aligned(part.numel())
        return True

    def _ordered(
        self, x: Tensor, state: Mapping[str, Tensor], mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(coefficients, rate of each band, the order of the bands by their rates).

        The order is None where the coefficients are in it already.
        """
        place = self._place(x)
        if place is None:
            z = self.forward(x, state, mean)
            numbers = self._numbers(_energies(z), state)
            return z, numbers, numbers.argsort(descending=True, stable=True)
        from fxcompress.kernels.triton import transform as gpu

        energies = x.new_empty((place.lines, place.bands), dtype=torch.float32)
        triton.run(gpu.energies(x, mean, state["analysis"], place, energies))
        numbers = self._numbers(energies.sum(0), state)
        z = x.new_empty((place.bands, place.positions), dtype=torch.float32)
        triton.run(gpu.analyse(x, mean, state["analysis"], place, _rows(numbers), z))
        return z, numbers, None

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        bands, state = self._bands(), states.of_version(self.basis, payload[:1])
        positions, at = x.numel() // bands, VERSION + _aligned((bands + 1) // 2)
        mean = state["mean"]
        if self._running_means():
            mean = payload[at : at + 2 * len(mean)].view(torch.bfloat16).float()
            at += _aligned(2 * len(mean))
        numbers, place = _numbers_of(payload[VERSION:], bands), self._place(x)
        order = numbers.argsort(descending=True, stable=True)
        z = cpu.empty((bands, positions), payload.device)
        start = 0
        for number, codec, count in self._classes():
            shape, span = [count, positions], slice(start, start + count)
            size = codec.payload_bytes(shape, torch.float32)
            part, own = payload[at : at + size], _stream(stream, number)
            if place is None:
                z.index_copy_(0, order[span], codec.decode(part, shape, torch.float32, key, own))
            elif not codec.decode_kernel(part, z[span], key, own):
                z[span] = codec.decode(part, shape, torch.float32, key, own)
            start, at = start + count, at + _aligned(size)
        if place is not None:
            from fxcompress.kernels.triton import transform as gpu

            given = (mean, state["synthesis"], place, _rows(numbers), x)
            triton.run(gpu.synthesise(z[:start], *given))
            return True
        z.index_fill_(0, order[start:], 0.0)  # what is dropped
        axis, limit = channel_axis(self.channels, x.dim()), torch.finfo(x.dtype).max
        for part, y in self._synthesised(z, state["synthesis"], x.movedim(axis, -1)):
            part.copy_(y.add_(mean).clamp_(-limit, limit))
        return True

    def _place(self, x: Tensor) -> Place | None:
        """Where the kernels for x's device find its elements; None where ATen does the work."""
        if not triton.takes(x, 1):
            return None
        from fxcompress.kernels.triton.transform import placed

        width = states.arrays(self.basis)["analysis"].shape[-1]
        return placed(x.shape, channel_axis(self.channels, x.dim()), self._sides(), width)

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        raise AssertionError("made of other codecs, which have references of their own")

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        raise AssertionError("made of other codecs, which have references of their own")

    def error(self, x: Tensor) -> ErrorModel:
        z = self.forward(x)
        variance, bias = torch.zeros_like(z), -z
        for codec, bands in self._coded(z):
            found = codec.error(z.index_select(0, bands))
            variance[bands], bias[bands] = found.variance, found.bias
        return ErrorModel(
            self._backward(variance, x.shape, squared=True),
            self._backward(bias, x.shape) if not self.unbiased else torch.zeros_like(x).float(),
        )

    def effect(self, x: Tensor, weights: Tensor) -> tuple[float, float]:
        """Noise of different bands is independent, that of channels and pixels is not."""
        return self.effect_on_bands(self.forward(x), self.adjoint(weights.float()))

    def effect_on_bands(self, z: Tensor, w: Tensor) -> tuple[float, float]:
        """`effect` of coefficients and the gradient's derivative by them, [bands, positions]."""
        variance, dropped = 0.0, torch.ones(len(z), dtype=torch.bool, device=z.device)
        for codec, bands in self._coded(z):
            variance += codec.effect(z.index_select(0, bands), w.index_select(0, bands))[0]
            dropped[bands] = False
        bias = float((w[dropped] * z[dropped]).sum(dtype=torch.float64))
        return variance, bias**2

    def _coded(self, z: Tensor) -> Iterator[tuple[Codec, Tensor]]:
        """(codec, bands) of each rate that these coefficients would be coded at."""
        state = states.get(self.basis, z.device)
        order = self._numbers(_energies(z), state).argsort(descending=True, stable=True)
        for _, codec, count in self._classes():
            yield codec, order[:count]
            order = order[count:]

    def _numbers(self, energies: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The rate of each band, uint8: the highest where energy times weight now is largest."""
        need = energies * state["weight"]
        ranked = states.get(self.rates, energies.device)["rates"]
        return torch.empty_like(ranked).index_copy_(0, need.argsort(descending=True), ranked)

    def _mean(self, x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """What is subtracted, fp32[channels]: of x itself where that is worth its bytes."""
        if not self._running_means():
            return state["mean"]
        axis = channel_axis(self.channels, x.dim())
        mean = x.mean([i for i in range(x.dim()) if i != axis], dtype=torch.float32)
        return mean.to(torch.bfloat16).float()

    def _running_means(self) -> int:
        """How many means a payload holds: one a channel, or none."""
        state = states.arrays(self.basis)
        return len(state["mean"]) * int(state["running"][0])

    def forward(
        self, x: Tensor, state: Mapping[str, Tensor] | None = None, mean: Tensor | None = None
    ) -> Tensor:
        """Coefficients fp32[bands, positions] of x, in the newest basis if not another is given."""
        y = x.movedim(channel_axis(self.channels, x.dim()), -1)
        state = states.get(self.basis, x.device) if state is None else state
        mean = self._mean(x, state) if mean is None else mean
        return analyse(y, self._sides(), state["analysis"], mean)

    def adjoint(self, weights: Tensor) -> Tensor:
        """What a covector of x is to the coefficients: (weights * x).sum() = (result * z).sum()."""
        state = states.get(self.basis, weights.device)
        y = weights.movedim(channel_axis(self.channels, weights.dim()), -1)
        return analyse(y, self._sides(), state["synthesis"].mT)

    def _backward(self, z: Tensor, shape: Sequence[int], squared: bool = False) -> Tensor:
        """The linear part of the inverse; ``squared``: of the squares of its entries."""
        matrices = states.get(self.basis, z.device)["synthesis"]
        out = z.new_empty(list(shape))
        y = out.movedim(channel_axis(self.channels, len(shape)), -1)
        if squared:
            matrices = matrices.square()
        for part, values in self._synthesised(z, matrices, y, squared):
            part.copy_(values)
        return out

    def _synthesised(
        self, z: Tensor, matrices: Tensor, y: Tensor, squared: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(a part of y [positions..., channels] as `folded` sees it, its values without means)."""
        blocks, _, width = matrices.shape
        sides, start = self._sides(), 0
        count = math.prod(sides)
        for part in _parts(y, len(sides)):
            view = folded(part, sides)
            rows = z.new_empty(count, view[..., 0].numel() // count, blocks * width)
            stop = start + rows.shape[1]
            bands = z[:, start:stop].view(count, blocks, width, -1)
            for block, out in enumerate(rows.split(width, 2)):
                torch.bmm(bands[:, block].mT, matrices[block].mT.expand(count, -1, -1), out=out)
            if squared:
                rows = rows.mean(0, keepdim=True).expand_as(rows)
            elif count > 1:
                # Into the coefficients' memory, if this is all of it: they are read.
                spare = bands.view(count, -1) if bands.is_contiguous() else None
                rows = torch.mm(_hadamard(count, z.device), rows.view(count, -1), out=spare)
            yield view, rows.reshape(view.shape)
            start = stop

    def _sides(self) -> list[int]:
        sides: list[int] = states.arrays(self.basis)["sides"].tolist()
        return sides

    def _bands(self) -> int:
        return len(states.arrays(self.rates)["rates"])

    def _classes(self) -> Iterator[tuple[int, Codec, int]]:
        """(number, codec, how many bands) of each rate in use, from the highest."""
        counts = np.bincount(states.arrays(self.rates)["rates"], minlength=len(RATES))
        for number in range(len(RATES) - 1, -1, -1):
            codec = coder(RATES[number])
            if codec is not None and counts[number]:
                yield number, codec, int(counts[number])


def analyse(
    y: Tensor, sides: Sequence[int], matrices: Tensor, mean: Tensor | None = None
) -> Tensor:
    """Coefficients [bands, positions] of y - mean; y is [positions..., channels].

    sides: of the blocks over its last position axes; matrices: [blocks, width, width] of channels.
    """
    count, (blocks, width, _) = math.prod(sides), matrices.shape
    positions, start = y[..., 0].numel() // count, 0
    z: Tensor | None = None
    for part in _parts(y.detach(), len(sides)):
        view = folded(part, sides)
        rows = y.new_empty(view.shape, dtype=torch.float32)
        if mean is None:
            rows.copy_(view)
        else:
            torch.sub(view, mean, out=rows)
        rows = rows.view(count, -1)
        if count > 1:
            rows = _hadamard(count, y.device) @ rows
        rows = rows.view(count, -1, y.shape[-1])  # [frequencies, positions, channels]
        stop = start + rows.shape[1]
        if z is None:  # not earlier: three buffers, of a part that is the whole, are one too many
            z = cpu.empty((count, blocks, width, positions), y.device)
        for block, lanes in enumerate(rows.split(width, 2)):
            out = z[:, block, :, start:stop]
            torch.bmm(matrices[block].expand(count, -1, -1), lanes.mT, out=out)
        start = stop
    assert z is not None
    return z.view(-1, positions)


def _parts(y: Tensor, sides: int) -> Sequence[Tensor]:
    """y [positions..., channels] along its first axis, if blocks do not span it: see `_PART`."""
    if y.dim() - 1 <= sides or not y.numel():
        return [y]
    return y.split(max(_PART * len(y) // y.numel(), 1))


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


def _energies(z: Tensor) -> Tensor:
    """Of each band of coefficients."""
    return torch.linalg.vector_norm(z, dim=1).square()


def _rows(numbers: Tensor) -> Tensor:
    """Where each band stands if bands are ordered by their rates."""
    return numbers.argsort(descending=True, stable=True).argsort()


@cache
def _hadamard(count: int, device: torch.device) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < count:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    with persistent(device):
        return (matrix / math.sqrt(count)).to(device)


def _nibbles(numbers: Tensor) -> Tensor:
    """Two numbers below 16 a byte."""
    pairs = torch.nn.functional.pad(numbers, (0, len(numbers) % 2)).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def _numbers_of(payload: Tensor, count: int) -> Tensor:
    packed = payload[: (count + 1) // 2]
    return torch.stack([packed & 15, packed >> 4], 1).view(-1)[:count]


def _aligned(size: int) -> int:
    return (size + 3) // 4 * 4


def _stream(stream: int, number: int) -> int:
    """Streams of their own for the coders inside: above those of whole tensors."""
    return (stream + 1) * 4096 + number
