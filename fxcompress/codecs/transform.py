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
where a coefficient lies on a threshold. The coders within are bit-exact. The changes of basis are
kernels of their own (kernels/transform.cpp, kernels/triton/transform.py) where there are such for
the shape, else ATen operations (basis.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxcompress.codecs import states
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys, channel_axis
from fxcompress.codecs.basis import analyse, synthesised
from fxcompress.codecs.dither import Dither
from fxcompress.codecs.groups import SIZE, Groups, groups, mean_square
from fxcompress.codecs.levels import levels
from fxcompress.codecs.rotate import Rotate
from fxcompress.codecs.subsample import Subsample
from fxcompress.kernels import cpu, triton
from fxcompress.kernels.place import Place, fits, placed

VERSION = 4  # bytes that tell by which version of its basis a payload was made (states.py)
# Bits a coefficient, in the order of their numbers in a state's `rates`.
RATES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
APART = 64 * SIZE  # positions from which on few groups hold more than one band
PIECE = 16  # elements; of fewer there would be too many


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
    shapes_noise: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        return bool(states.arrays(self.rates)["rates"].all())

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        bands = self._bands()
        positions = math.prod(shape) // bands
        end = self._first_bands()
        for part in self._parts(positions):
            end = part.at + _aligned(part.size)
        return end

    def workspace_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Of `encode` and of `decode`: coefficients; where ATen does the work, also rows on their
        way to or from them."""
        numel = math.prod(shape)
        if not self._has_kernels():
            return 8 * numel
        return 4 * numel + numel // 8 + 32 * self._bands()

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        state, version = states.get(self.basis, x.device), states.version(self.basis, x.device)
        mean, on_cpu = self._mean(x, state), self._on_cpu(x)
        if on_cpu is not None:
            assert key is not None
            ranked = self._ranked(x.device)
            cpu.transform_encode(x, payload, state, mean, ranked, *on_cpu, key, stream)
        else:
            payload.zero_()
            self._encode_bands(x, payload, state, mean, key, stream)
        if version is not None:
            payload[:1] = version
        if self._running_means():
            at = self._after_numbers()
            payload[at : at + 2 * len(mean)].view(torch.bfloat16).copy_(mean)
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        state, on_cpu = states.of_payload(self.basis, payload), self._on_cpu(x)
        mean = state["mean"]
        if self._running_means():
            at = self._after_numbers()
            mean = payload[at : at + 2 * len(mean)].view(torch.bfloat16).float()
        if on_cpu is not None:
            assert key is not None
            cpu.transform_decode(payload, x, state, mean, *on_cpu, key, stream)
        else:
            z, coded = self._decoded_bands(payload, x, key, stream)
            self._give(z, coded, self._numbers_in(payload), state["synthesis"], mean, x)
        return True

    def _on_cpu(self, x: Tensor) -> tuple[Place, cpu.Coders] | None:
        """Where the kernels for the CPU find everything; None: they do not do the work."""
        return _for_cpu(self, x.shape) if _on_cpu(x) else None

    def _encode_bands(
        self,
        x: Tensor,
        payload: Tensor,
        state: Mapping[str, Tensor],
        mean: Tensor,
        key: Tensor | None,
        stream: int,
    ) -> None:
        """Rates and coefficients, where each rate's coder is called by itself."""
        z = self._in_order(x, state, mean, self._numbers_in(payload))
        for part in self._parts(z.shape[1]):
            bands, own = part.of_bands(z), _stream(stream, part.number)
            part.of_payload(payload).copy_(part.codec.encode(bands, key, own))

    def _in_order(
        self, x: Tensor, state: Mapping[str, Tensor], mean: Tensor, numbers: Tensor
    ) -> Tensor:
        """Coefficients in the order of their rates, which are written to `numbers`."""
        place, basis = self._place(x), state["analysis"]
        if place is None:
            z = analyse(self._channels_last(x), self._sides(), basis, mean)
            rates = self._numbers(_energies(z), state)
            numbers.copy_(_nibbles(rates))
            return z.index_select(0, rates.argsort(descending=True, stable=True))
        from fxcompress.kernels.triton import transform as gpu

        energies = x.new_empty((gpu.lines(place), place.bands), dtype=torch.float32)
        triton.run(gpu.energies(x, mean, basis, place, energies))
        rates = self._numbers(energies.sum(0), state)
        numbers.copy_(_nibbles(rates))
        z = x.new_empty((place.bands, place.positions), dtype=torch.float32)
        triton.run(gpu.analyse(x, mean, basis, place, _rows(rates), z))
        return z

    def _decoded_bands(
        self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int
    ) -> tuple[Tensor, int]:
        """Coefficients in the order of their rates, and how many bands are not dropped."""
        count = self._bands()
        z, coded = cpu.empty((count, x.numel() // count), payload.device), 0
        for part in self._parts(z.shape[1]):
            bands, codes = part.of_bands(z), part.of_payload(payload)
            own, codec = _stream(stream, part.number), part.codec
            if not codec.decode_kernel(codes, bands, key, own):
                bands.copy_(codec.decode(codes, bands.shape, torch.float32, key, own))
            coded += part.count
        return z, coded

    def _give(
        self,
        z: Tensor,
        coded: int,
        numbers: Tensor,
        basis: Tensor,
        mean: Tensor,
        x: Tensor,
    ) -> None:
        """Fill x from coefficients in the order of their rates; only `coded` are not dropped."""
        place = self._place(x)
        rows = _rows(_numbers_of(numbers, len(z)))
        if place is not None:
            from fxcompress.kernels.triton import transform as gpu

            triton.run(gpu.synthesise(z[:coded], mean, basis, place, rows, x))
            return
        z[coded:] = 0.0
        z, limit = z.index_select(0, rows), torch.finfo(x.dtype).max
        for part, y in synthesised(z, basis, self._channels_last(x), self._sides()):
            part.copy_(y.add_(mean).clamp_(-limit, limit))

    def _has_kernels(self) -> bool:
        """There may be: which shapes they take, `placed` says."""
        if not fits(self._sides(), self._width()):
            return False
        return (torch.cuda.is_available() and triton.installed()) or cpu.available("transform")

    def _place(self, x: Tensor) -> Place | None:
        """Where the GPU's kernels find its elements; None where ATen does the work."""
        return self._placed(x.shape) if triton.takes(x, 1) else None

    def _placed(self, shape: torch.Size) -> Place | None:
        axis, sides = channel_axis(self.channels, len(shape)), tuple(self._sides())
        return placed(shape, axis, sides, self._width())

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

    def effect(self, x: Tensor, *weights: Tensor) -> tuple[float, float]:
        """Noise of different bands is independent, that of channels and pixels is not."""
        return self.effect_on(self.seen(x, weights))

    def seen(self, x: Tensor, weights: Sequence[Tensor]) -> Seen:
        """x as several covectors see it, for `effect_on` of this codec and others of its basis."""
        z, read = self.forward(x), [self.adjoint(w.float()) for w in weights]
        products = torch.stack([(w * z).sum(1, dtype=torch.float64) for w in read])
        apart, positions = z.shape[1] >= APART, z.shape[1]
        piece = SIZE if apart else min(max(math.gcd(positions, SIZE), PIECE), positions)
        found = groups(z, mean_square(read), alone=False, of=piece)
        return Seen(found, apart, _energies(z), products)

    def effect_on(self, bands: Seen) -> tuple[float, float]:
        """`effect` on these coefficients, the mean over the covectors."""
        variance, order = 0.0, self._order(bands.energies)
        for _, codec, count in self.classes():
            coded = bands.groups.rows(order[:count])
            noise = codec.noise(coded if bands.apart else coded.end_to_end())
            assert noise is not None
            variance, order = variance + noise, order[count:]
        dropped = bands.products.index_select(1, order).sum(1)
        return variance, float(dropped.square().mean())

    def _coded(self, z: Tensor) -> Iterator[tuple[Codec, Tensor]]:
        """(codec, bands) of each rate that these coefficients would be coded at."""
        order = self._order(_energies(z))
        for _, codec, count in self.classes():
            yield codec, order[:count]
            order = order[count:]

    def _order(self, energies: Tensor) -> Tensor:
        """The bands, from the highest rate, in the newest basis."""
        state = states.get(self.basis, energies.device)
        return self._numbers(energies, state).argsort(descending=True, stable=True)

    def _numbers(self, energies: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The rate of each band, uint8: the highest where energy times weight now is largest."""
        need = energies * state["weight"]
        ranked = self._ranked(energies.device)
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

    def forward(self, x: Tensor) -> Tensor:
        """Coefficients fp32[bands, positions] of x, in the newest basis."""
        state = states.get(self.basis, x.device)
        mean = self._mean(x, state)
        return analyse(self._channels_last(x), self._sides(), state["analysis"], mean)

    def adjoint(self, weights: Tensor) -> Tensor:
        """What a covector of x is to the coefficients: (weights * x).sum() = (result * z).sum()."""
        state = states.get(self.basis, weights.device)
        return analyse(self._channels_last(weights), self._sides(), state["synthesis"].mT)

    def _backward(self, z: Tensor, shape: Sequence[int], squared: bool = False) -> Tensor:
        """The linear part of the inverse; ``squared``: of the squares of its entries."""
        matrices = states.get(self.basis, z.device)["synthesis"]
        out = z.new_empty(list(shape))
        if squared:
            matrices = matrices.square()
        y, sides = self._channels_last(out), self._sides()
        for part, values in synthesised(z, matrices, y, sides, squared):
            part.copy_(values)
        return out

    def _channels_last(self, x: Tensor) -> Tensor:
        """A view [positions..., channels]."""
        return x.movedim(channel_axis(self.channels, x.dim()), -1)

    def _numbers_in(self, payload: Tensor) -> Tensor:
        return payload[VERSION : VERSION + (self._bands() + 1) // 2]

    def _after_numbers(self) -> int:
        return VERSION + _aligned((self._bands() + 1) // 2)

    def _width(self) -> int:
        width: int = states.arrays(self.basis)["analysis"].shape[-1]
        return width

    def _sides(self) -> list[int]:
        return states.arrays(self.basis)["sides"].tolist()  # type: ignore[no-any-return]

    def _bands(self) -> int:
        return len(states.arrays(self.rates)["rates"])

    def _first_bands(self) -> int:
        """Where in a payload coefficients begin."""
        return self._after_numbers() + _aligned(2 * self._running_means())

    def _ranked(self, device: torch.device) -> Tensor:
        """The numbers of the rates in use, from the highest, uint8[bands]."""
        return states.get(self.rates, device)["rates"]

    def _parts(self, positions: int) -> Iterator[_Part]:
        """The rates in use, from the highest, of bands of so many positions."""
        first, at = 0, self._first_bands()
        for number, codec, count in self.classes():
            size = codec.size([count * positions], torch.float32)
            yield _Part(number, codec, first, count, at, size)
            first, at = first + count, at + _aligned(size)

    def classes(self) -> Sequence[tuple[int, Codec, int]]:
        """(number, codec, how many bands) of each rate in use, from the highest."""
        return _classes(self.rates)


@dataclass(frozen=True)
class Seen:
    """Coefficients that covectors read: sums over their groups, and over each band.

    Bands of few positions share groups, and so their scales: 16 bands of a ViT's pooled tokens had
    22 times the noise that they would have had one by one.

    Attributes:
        groups: of each band. apart: as if none went over from one band to the next; otherwise they
            are pieces of such.
        energies: of squares.
        products: with each covector, float64[covectors, bands].
    """

    groups: Groups
    apart: bool
    energies: Tensor
    products: Tensor


@lru_cache(maxsize=4096)
def _classes(rates: str) -> Sequence[tuple[int, Codec, int]]:
    counts = np.bincount(states.arrays(rates)["rates"], minlength=len(RATES))
    coded = [(n, coder(RATES[n]), int(counts[n])) for n in range(len(RATES) - 1, -1, -1)]
    return [(n, codec, count) for n, codec, count in coded if codec is not None and count]


@dataclass(frozen=True)
class _Part:
    """The bands of one rate, in the order of their rates, and their bytes in a payload."""

    number: int
    codec: Codec
    first: int
    count: int
    at: int
    size: int

    def of_bands(self, z: Tensor) -> Tensor:
        return z[self.first : self.first + self.count]

    def of_payload(self, payload: Tensor) -> Tensor:
        return payload[self.at : self.at + self.size]


@lru_cache(maxsize=4096)
def _for_cpu(transform: Transform, shape: torch.Size) -> tuple[Place, cpu.Coders] | None:
    """Where elements are, and how each rate is coded, as the kernels for the CPU take it."""
    place, found = transform._placed(shape), []
    if place is None:
        return None
    for part in transform._parts(place.positions):
        codec = part.codec
        if isinstance(codec, Subsample):
            kind, bits, table = "subsample", codec.block, levels(1).table
        elif isinstance(codec, Rotate):
            kind, bits, table = "rotate", codec.bits, levels(codec.bits).table
        else:
            assert isinstance(codec, Dither)
            kind, bits, table = "dither", codec.bits, ()
        found.append(cpu.Bands(kind, bits, part.number, part.count, part.at, table))
    return place, cpu.coders(found)


def _on_cpu(x: Tensor) -> bool:
    """Our kernels for the CPU do the work."""
    return x.device.type == "cpu" and not triton.takes(x, 1) and cpu.available("transform")


def _energies(z: Tensor) -> Tensor:
    """Of each band of coefficients."""
    return torch.linalg.vector_norm(z, dim=1).square()


def _rows(numbers: Tensor) -> Tensor:
    """Where each band stands if bands are ordered by their rates."""
    return numbers.argsort(descending=True, stable=True).argsort()


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
