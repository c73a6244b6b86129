"""Fit: the basis and the rates of a transform codec, from the moments of a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress.codecs import codec, states
from fxcompress.codecs.levels import levels
from fxcompress.codecs.transform import RATES, Transform
from fxcompress.evidence import Price
from fxcompress.moments import WIDTH, Moments, moments
from fxcompress.sensitivity import Measured, ratio, through_of_reference

FEWEST = 8  # channels worth a basis
SMALLEST = 16  # positions a channel
RUNNING = 512  # positions a channel from which on a payload has room for its own means
# Bits an element at which calibration fits and prices the codec.
LADDER = (6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.375, 0.25, 0.125)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """A basis for one tensor, before rates are chosen.

    Attributes:
        basis: name of its state, which holds means, block sides, matrices and, for each band, what
            the two properties give.
        channels: position of the channel axis in storage order.
    """

    basis: str
    channels: int

    @property
    def energy(self) -> Floats:
        """Mean square of each band's coefficients."""
        return states.arrays(self.basis)["energy"]

    @property
    def weight(self) -> Floats:
        """Mean square of the gradient's derivative by them."""
        return states.arrays(self.basis)["weight"]

    @property
    def side_bits(self) -> float:
        """Bits an element of what a payload holds besides: the bands' rates, and means."""
        state = states.arrays(self.basis)
        rates, means = 4 * math.prod(state["sides"].tolist()), 16 * int(state["running"][0])
        return (rates + means) / int(state["positions"][0])


def fit(values: Tensor, weights: Sequence[Tensor], channels: int, *, width: int = WIDTH) -> Fitted:
    """The basis for one batch of a tensor in storage order; arguments as of `moments`."""
    return basis_of(moments(values, weights, channels, width=width))


def basis_of(found: Moments) -> Fitted:
    """Choose means, block sides and channel bases.

    The basis makes both the covariance of the values and that of the weights diagonal, in blocks of
    channels: then no other linear transform has a smaller product of energy and weight over the
    bands, which is what the noise at a given total rate goes with. Block sides are those with the
    smallest such product.
    """
    tried = [_with_sides(found, sides) for sides in found.values]
    best = min(
        tried, key=lambda s: float((s["energy"] * s["weight"]).clamp(min=1e-300).log().mean())
    )
    return Fitted(states.put(best), found.channels)


def renew(codec: Transform, found: Moments) -> None:
    """Give a codec in use the basis of newer moments: sides, rates and payloads stay as they are.

    found: with the codec's own block sides among those it was gathered for.
    """
    old = states.arrays(codec.basis)
    state = _with_sides(found, tuple(old["sides"].tolist()))
    states.renew(codec.basis, {**state, "running": old["running"], "positions": old["positions"]})


def _with_sides(found: Moments, sides: tuple[int, ...]) -> dict[str, Tensor]:
    """The state of a basis with these block sides."""
    values, weights = found.values[sides], found.weights[sides]
    size, positions = values.shape[-1], found.positions // math.prod(sides)
    analysis, synthesis = _diagonalise(
        _shrunk_covariance(values, found.positions), weights.sum(0) / max(found.probes, 1)
    )
    energy = ((analysis @ values) * analysis).sum(-1) / positions
    weight = ((synthesis.mT @ weights) * synthesis.mT).sum(-1) / (positions * found.probes)
    return {
        "mean": found.mean.float(),
        "sides": torch.tensor(sides, dtype=torch.int64),
        "analysis": analysis.float().contiguous(),
        "synthesis": synthesis.float().contiguous(),
        "running": torch.tensor([found.positions >= RUNNING]),
        "positions": torch.tensor([found.positions]),
        "energy": _shrunk(energy.view(-1), size, positions),
        "weight": _shrunk(weight.view(-1), size, positions),
    }


def _shrunk_covariance(products: Tensor, positions: int) -> Tensor:
    """float64[blocks, width, width] of [frequencies, blocks, width, width], shrunk.

    Few positions know little of many channels: without shrinking, the last layers of a ResNet (64
    positions, blocks of 64 channels) looked 20 dB more compressible than the next batch was.
    """
    found = products.sum(0)
    size = found.shape[-1]
    mean = found.diagonal(dim1=-2, dim2=-1).sum(-1) / size
    share = size / (size + positions)
    return (1 - share) * found + share * mean[:, None, None] * torch.eye(size, dtype=found.dtype)


def _shrunk(squares: Tensor, width: int, positions: int) -> Tensor:
    """Mean squares of bands, drawn to the mean of their block in the same proportion."""
    parts = squares.view(-1, width)
    share = width / (width + positions)
    return ((1 - share) * parts + share * parts.mean(1, keepdim=True)).view(-1)


def _diagonalise(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(analysis, synthesis) under which both covariances are diagonal.

    With A the weights' covariance and V the eigenvectors of A^½ C A^½: analysis Vᵀ A^½, synthesis
    A^-½ V. A's mean eigenvalue is added to all of them: what the gradient reads today it may not
    read tomorrow, and the inverse of a small eigenvalue would let all noise in there. On a GPT 500
    steps later that gave a sixth less noise than a thousandth of the mean, at the day's own noise.
    """
    size = weights.shape[-1]
    trace = weights.diagonal(dim1=-2, dim2=-1).sum(-1) / size
    floor = trace.clamp(min=1e-300)[:, None, None]
    squares, turned = torch.linalg.eigh(weights / floor + torch.eye(size, dtype=torch.float64))
    roots = squares.sqrt()
    root = turned * roots[:, None] @ turned.mT
    inverse = turned / roots[:, None] @ turned.mT
    _, vectors = torch.linalg.eigh(root @ values @ root)
    return vectors.mT.flip(1) @ root, inverse @ vectors.flip(2)


def is_fitted(tensor: Measured) -> bool:
    """The tensor is large enough to gain from a basis, and the backward has a derivative by it."""
    channels = tensor.values.shape[tensor.candidate.channels] if tensor.values.dim() else 1
    enough = channels >= FEWEST and tensor.values.numel() >= SMALLEST * channels
    return enough and tensor.weights is not None


def fit_transforms(found: Moments | None) -> dict[float, Transform]:
    """Transform codecs for one tensor, by bits an element; none where there are no moments."""
    if found is None:
        return {}
    fitted = basis_of(found)
    return dict(zip(LADDER, at_rates(fitted, LADDER), strict=True))


def transform_prices(
    codecs: Mapping[float, Transform], tensor: Measured, gradient_square: float
) -> dict[str, Price]:
    """Price of each of the codecs (of one basis) on a tensor, by spec."""
    assert tensor.weights is not None
    if not codecs:
        return {}
    any_rate, values = next(iter(codecs.values())), tensor.values.float()
    own = any_rate.seen(values, tensor.weights)
    if tensor.through:
        through, expected = any_rate.seen(values, tensor.through), through_of_reference(tensor)
    found = {}
    for each in {c.spec: c for c in codecs.values()}.values():
        variance, bias = each.effect_on(own)
        passing = 1.0
        if tensor.through:
            passing = ratio(each.effect_on(through)[0], variance * expected)
        found[each.spec] = Price(variance / gradient_square, bias / gradient_square, passing)
    return found


def at_rate(fitted: Fitted, bits: float, *, unbiased: bool = True) -> Transform:
    """The codec that spends ``bits`` an element, metadata included, where they matter most."""
    return at_rates(fitted, (bits,), unbiased=unbiased)[0]


def at_rates(
    fitted: Fitted, ladder: Sequence[float], *, unbiased: bool = True
) -> tuple[Transform, ...]:
    """:func:`at_rate` for each number of bits.

    Reverse water-filling over a discrete ladder: each band takes the rate with the least
    ``weight * energy * error(rate) + λ * bits(rate)``, and λ is what meets the total. So from the
    least rate on, bands step up in the order of what a further bit wins them.
    """
    numbers = np.arange(1 if unbiased else 0, len(RATES))
    numbers = numbers[_corners(_true_rates()[numbers], _errors()[numbers])]
    steps = np.diff(_true_rates()[numbers])
    gains = -np.diff(_errors()[numbers]) / steps
    need = np.maximum(fitted.energy * fitted.weight, 1e-300)
    order = np.argsort(-(need[:, None] * gains).ravel(), kind="stable") % len(steps)
    spent = len(need) * _true_rates()[numbers[0]] + np.cumsum(steps[order])
    found = []
    for bits in ladder:
        taken = np.searchsorted(spent, len(need) * (bits - fitted.side_bits), side="right")
        reached = np.bincount(order[:taken], minlength=len(steps))  # bands, by step
        bands = -np.diff(reached, prepend=len(need), append=0)
        rates = np.repeat(numbers[::-1], bands[::-1]).astype(np.uint8)
        found.append(Transform(fitted.basis, states.put({"rates": rates}), fitted.channels))
    return tuple(found)


def _corners(rates: Floats, errors: Floats) -> list[int]:
    """Of the lower convex hull of errors over ascending rates."""
    found = [0]
    while found[-1] < len(rates) - 1:
        at = found[-1]
        slopes = (errors[at + 1 :] - errors[at]) / (rates[at + 1 :] - rates[at])
        found.append(at + 1 + int(np.argmin(slopes)))
    return found


def biased(spec: str) -> str:
    """A transform codec's spec with as many bits, but bands dropped where that gives less error."""
    found = codec(spec)
    if not isinstance(found, Transform):
        return spec
    numbers = states.arrays(found.rates)["rates"]
    bits = float(_true_rates()[numbers].mean())
    return at_rate(Fitted(found.basis, found.channels), bits, unbiased=False).spec


def staleness(found: Transform, values: Tensor) -> float:
    """How much more noise the codec makes on ``values`` than on those its basis was fitted to.

    1 is as calibrated; 2 means twice the noise that was planned for, in the same units: it is time
    to calibrate again. Bands count by the error of their rate and by how the gradient reads them.
    """
    state, z = states.arrays(found.basis), found.forward(values)
    energy = z.double().square().mean(1).cpu()
    now = _shrunk(energy, state["analysis"].shape[-1], z.shape[1]).numpy()
    errors = _errors()[states.arrays(found.rates)["rates"]]  # the least where most is needed
    noise = [
        float((errors * np.sort(e * state["weight"])[::-1]).sum()) for e in (now, state["energy"])
    ]
    return noise[0] / max(noise[1], 1e-300)


def _errors() -> Floats:
    """Error over energy of a coefficient at each rate."""
    turned = {b: 1 / (1 - levels(b).distortion) - 1 for b in range(1, 6)}
    found = []
    for rate in RATES:
        if rate == 0:
            found.append(1.0)
        elif rate < 1:
            found.append((1 + turned[1]) / rate - 1)
        elif rate <= 5:
            found.append(turned[int(rate)])
        else:  # dither: a group of 256 normal values spans about 5.6 standard deviations
            found.append(5.6**2 / 12 / (2**rate - 1) ** 2)
    return np.array(found)


def _true_rates() -> Floats:
    """Bits a coefficient at each rate, metadata included: one scale (or pair) a group of 256."""
    found = []
    for rate in RATES:
        metadata = 0.0 if rate == 0 else rate * 32 / 256 if rate < 1 else 16 / 256
        found.append(rate + (32 / 256 if rate > 5 else metadata))
    return np.array(found)
