"""Ladder: every representation the planner may give a tensor, each with its noise.

Noise is the squared error that a representation adds to the parameter gradients, over their squared
norm. Calibration measures it. Where there is none it is guessed: every tensor's relative error
counts alike, and a codec's relative error is what it is on normal values: at b bits a group of 256
normal values spans about 5.6 standard deviations, so stochastic rounding adds
``5.6² / 6 / (2^b − 1)²`` of the variance and dither half of that; the rotated Lloyd–Max quantizer
adds ``1/ρ² − 1``.

A fixed error counts more than a random one of the same size: noise averages out over steps, bias
does not (a GPT trained worse at half a bit with dropped components than at twice that error without
bias). Squared bias is weighed by `BIAS_WEIGHT`, about the steps over which Adam averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from fxcompress.choose import (
    bytes_of,
    codable_choice,
    exact_choice,
    is_codable,
    offload_choice,
    recompute_choice,
)
from fxcompress.codecs import codec
from fxcompress.codecs.levels import levels
from fxcompress.costs import Clock
from fxcompress.evidence import Price, TensorEvidence
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.solve import Option

BIAS_WEIGHT = 100.0
HEDGE = 0.5
REFERENCE = "rotate(bits=2)"
AFFINE_BITS = (8, 7, 6, 5, 4, 3, 2, 1)
DITHER_BITS = (8, 7, 6, 5, 4, 3)
ROTATE_BITS = (5, 4, 3, 2, 1)
SAMPLE_RATES = (0.5, 0.25, 0.125, 0.0625)


def specs(group: int = 256) -> list[str]:
    """Codecs that calibration prices for every tensor."""
    return [
        *(codec(f"affine(bits={b},group={group})").spec for b in AFFINE_BITS),
        *(codec(f"dither(bits={b},group={group})").spec for b in DITHER_BITS),
        *(codec(f"rotate(bits={b})").spec for b in ROTATE_BITS),
        *(codec(f"subsample(rate={r})").spec for r in SAMPLE_RATES),
    ]


def cost(price: Price) -> float:
    """One number for the solver; see the module docstring."""
    return price.variance + BIAS_WEIGHT * price.bias


def hedges(evidence: Mapping[str, TensorEvidence]) -> dict[str, float]:
    """What each tensor's noise counts, so that its price is drawn to that of the average tensor.

    Prices are measured once and then trained with for long. On a small GPT, bits shared out by the
    prices of step 50 made 2.5 times the noise, at step 550, of those shared out by square roots of
    prices; from step 150 on they were as good. So a tensor `s` times as sensitive, by the element,
    as the geometric mean counts as ``s**HEDGE``.
    """
    prices = {
        name: found.prices[REFERENCE].variance / max(found.elements, 1)
        for name, found in evidence.items()
        if REFERENCE in found.prices
    }
    known = [math.log(p) for p in prices.values() if p > 0]
    middle = math.exp(sum(known) / len(known)) if known else 1.0
    return {name: (middle / p) ** (1 - HEDGE) if p > 0 else 1.0 for name, p in prices.items()}


def ladder(
    candidate: Candidate,
    group: int,
    evidence: TensorEvidence | None = None,
    clock: Clock | None = None,
    weight: float = 1.0,
) -> list[Option]:
    """Representations of a candidate that no other beats in both bytes and cost.

    Args:
        clock: what the step and the codecs take; without it time costs nothing.
        weight: of its noise, from `hedges`.
    """
    exact = exact_choice(candidate)
    lossless = [Option(exact, 0.0)]
    if exact.representation != KEEP:
        lossless.append(Option(Choice(candidate, KEEP, "kept"), 0.0))
    rebuilt = recompute_choice(candidate)
    if rebuilt is not None and exact.representation == KEEP:
        lossless.append(option(rebuilt, 0.0, clock))
    moved = offload_choice(candidate)
    if moved is not None and exact.representation == KEEP:
        lossless.append(option(moved, 0.0, clock))
    if not is_codable(candidate):
        return lossless
    measured = evidence is not None and bool(evidence.prices)
    prices = (
        {spec: (cost(price), price.passing) for spec, price in evidence.prices.items()}
        if evidence is not None and measured
        else {spec: (noise, 1.0) for spec, noise in _guess(group).items()}
    )
    lossy: dict[str, Option] = {}
    for spec, (noise, passing) in prices.items():
        choice = codable_choice(candidate, spec)
        # A width below what the readers bear comes back as another spec: not this price.
        if choice.representation == spec:
            lossy[spec] = replace(option(choice, noise, clock, weight), passing=passing)
    if candidate.floor_bits > 1 and not lossy:
        wider = codable_choice(candidate, f"affine(bits={candidate.floor_bits},group={group})")
        if wider.representation != KEEP:
            guessed = _guess(group)[wider.representation]
            lossy[wider.representation] = option(wider, guessed, clock, weight)
    kept = _undominated(lossy.values(), _by_itself)
    if any(o.passing != 1 for o in lossy.values()):
        kept += _undominated(lossy.values(), _passed_on)
    return [*lossless, *dict.fromkeys(kept)]


def _by_itself(option: Option) -> float:
    """What an option costs where nothing is rebuilt of the tensor."""
    return option.cost


def _passed_on(option: Option) -> float:
    """What it would cost if all that counts were what passes through rebuilt tensors."""
    return replace(option, noise=option.passing * option.noise).cost


def option(choice: Choice, noise: float, clock: Clock | None, weight: float = 1.0) -> Option:
    """The choice with what it takes by the clock."""
    if clock is None:
        return Option(choice, noise, weight=weight)
    return Option(choice, noise, clock.slowdown(choice), weight, time_price=clock.price)


def _undominated(options: Iterable[Option], cost: Callable[[Option], float]) -> list[Option]:
    """From the least cost on, each with fewer bytes than all before it."""
    kept: list[Option] = []
    smallest = float("inf")
    for option in sorted(options, key=lambda o: (cost(o), bytes_of(o.choice, {}))):
        size = bytes_of(option.choice, {})
        if size < smallest:
            kept.append(option)
            smallest = size
    return kept


def _guess(group: int) -> dict[str, float]:
    """Relative error on normal values by spec; see the module docstring."""
    grid = {b: 5.6**2 / 6 / (2**b - 1) ** 2 for b in AFFINE_BITS}
    turned = {b: 1 / (1 - levels(b).distortion) - 1 for b in ROTATE_BITS}
    return {
        **{codec(f"affine(bits={b},group={group})").spec: grid[b] for b in AFFINE_BITS},
        **{codec(f"dither(bits={b},group={group})").spec: grid[b] / 2 for b in DITHER_BITS},
        **{codec(f"rotate(bits={b})").spec: turned[b] for b in ROTATE_BITS},
        **{codec(f"subsample(rate={r})").spec: (1 + turned[1]) / r - 1 for r in SAMPLE_RATES},
    }
