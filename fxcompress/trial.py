"""Trial: a plan is carried out once, on a recorded step, before it is trusted.

Prices are of first order: they hold for small errors and smooth readers. Attention's softmax of a
noisy query and an exact log-sum-exp, say, is far from that. So the gradients that the plan gives
are compared with the exact ones. Where they are off by more than was predicted, the tensors at
fault are found by halving (GACT tries each tensor; here a sound plan takes one run), and what they
have now, and anything coarser, is priced by what was seen. The plan is then made again: with more
bits for those.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fxcompress import rng
from fxcompress.choose import is_codable
from fxcompress.evidence import Price, TensorEvidence
from fxcompress.kernels import ahead
from fxcompress.passes.analyse import Candidate, analyse
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, OFFLOAD, RECOMPUTE, Choice, rewrite
from fxcompress.planner import with_roots
from fxcompress.record import Recording, gradients

log = logging.getLogger("fxcompress")

TRUSTED = 3.0  # times the predicted noise; the batch of the trial is not all that was priced on
NEGLIGIBLE = 1e-3  # of the gradient's squared norm: whatever was predicted
RUNS = 24  # backward passes to look for the tensors at fault
WORST = 1e6  # price of what gave infinite gradients
TINY = 1e-12  # instead of a price of 0
SEEDS = 2  # noise streams that a measurement averages over


@dataclass(frozen=True)
class Outcome:
    """What a trial showed.

    Attributes:
        measured, predicted: squared error of the parameter gradients over their squared norm, on
            that step.
        evidence: prices put right; None where the prediction holds.
    """

    measured: float
    predicted: float
    evidence: Mapping[str, TensorEvidence] | None


def attempt(
    recording: Recording,
    choices: Sequence[Choice],
    evidence: Mapping[str, TensorEvidence],
) -> Outcome:
    """Try ``choices`` (of the same graph, maybe for another batch size) on a recorded step.

    Only tensors with measured prices are coded, as only their prices are in question.
    """
    chosen = {c.candidate.name: c.representation for c in choices}
    exact = gradients(recording, recording.cut)
    norm = sum(float(g.double().square().sum()) for g in exact) or 1.0

    def measured(coded: Sequence[str]) -> float:
        cut = _rewritten(recording, {**_rebuilt(chosen), **{n: chosen[n] for n in coded}})
        ahead.build_for((cut.forward, cut.backward))
        total = 0.0
        for seed in range(SEEDS):
            rng.manual_seed(seed)
            pairs = zip(gradients(recording, cut), exact, strict=True)
            total += sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        return total / SEEDS / norm

    sizes = {c.name: c.fake.numel() for c in recording.candidates}

    def predicted(coded: Sequence[str]) -> float:
        # Noise of samples averages out, their gradient may not: a smaller batch has more of it.
        fewer = {n: max(1.0, evidence[n].elements / sizes.get(n, math.inf)) for n in coded}
        return sum(fewer[n] * _price(evidence[n], chosen[n], chosen) for n in coded)

    priced = [n for n, spec in chosen.items() if spec in _prices(evidence.get(n))]
    state = rng.get_state()
    try:
        error, expected = measured(priced), predicted(priced)
        if _holds(error, expected):
            return Outcome(error, expected, None)
        ratios = _at_fault(priced, error, measured, predicted)
    finally:
        rng.set_state(state)
    log.info("a trial was off by %.3g, not %.3g: %s", error, expected, ", ".join(ratios))
    right = {n: _dearer(evidence[n], chosen[n], ratio) for n, ratio in ratios.items()}
    return Outcome(error, expected, {**evidence, **right})


_Noise = Callable[[Sequence[str]], float]


def _at_fault(
    names: Sequence[str], error: float, measured: _Noise, predicted: _Noise
) -> dict[str, float]:
    """Tensors whose noise is not as predicted, each with the factor between the two."""
    ratios: dict[str, float] = {}
    pending, runs = [(names, error)], 0
    while pending:
        group, seen = pending.pop()
        middle = len(group) // 2
        halves = [group[:middle], group[middle:]] if middle and runs < RUNS else []
        runs += len(halves)
        found = [(half, measured(half)) for half in halves]
        worse = [(half, noise) for half, noise in found if not _holds(noise, predicted(half))]
        pending += worse
        if not worse:  # one tensor, or some only together
            seen = seen if math.isfinite(seen) else WORST
            ratios.update(dict.fromkeys(group, seen / max(predicted(group), TINY)))
    return ratios


def _holds(measured: float, predicted: float) -> bool:
    return measured <= max(TRUSTED * predicted, NEGLIGIBLE)  # False for NaN


def _prices(evidence: TensorEvidence | None) -> Mapping[str, Price]:
    return {} if evidence is None else evidence.prices


def _price(evidence: TensorEvidence, spec: str, chosen: Mapping[str, str]) -> float:
    price = evidence.prices[spec]
    return (1 + evidence.again(_rebuilt(chosen), spec)) * price.variance + price.bias


def _dearer(evidence: TensorEvidence, spec: str, factor: float) -> TensorEvidence:
    """With this spec, and all that cost as much or more, at ``factor`` times the price."""
    least = evidence.prices[spec].variance
    prices = {
        s: replace(p, variance=max(p.variance, TINY) * factor) if p.variance >= least else p
        for s, p in evidence.prices.items()
    }
    return replace(evidence, prices=prices)


def _rebuilt(chosen: Mapping[str, str]) -> dict[str, str]:
    return {name: what for name, what in chosen.items() if what == RECOMPUTE}


def _rewritten(recording: Recording, representations: Mapping[str, str]) -> Cut:
    """A copy of the recorded graphs in which these tensors are represented so, the others kept."""
    cut = recording.cut.copy()
    candidates = analyse(cut, recording.min_bytes, channels_last=recording.channels_last)
    choices = [Choice(c, _possible(c, representations.get(c.name, KEEP))) for c in candidates]
    return rewrite(cut, with_roots(choices), "", channels_last=recording.channels_last)


def _possible(candidate: Candidate, representation: str) -> str:
    """Of a smaller batch, PyTorch may save other tensors."""
    if representation == RECOMPUTE:
        return RECOMPUTE if candidate.recipe is not None else KEEP
    if representation == OFFLOAD:  # exact: there is nothing to try
        return KEEP
    return representation if is_codable(candidate) else KEEP
