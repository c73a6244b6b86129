"""Transform coding for every float saved tensor: `bits` an element on average, over all of them.

A tensor that calibration found a basis for is coded in it (`codecs/transform.py`), the others by
the codecs that need none. Inside a tensor the bits go to the bands where the gradient notices
(`fit.at_rate`), and by the same rule to the tensors: each takes the rate with the least
``noise + λ·bytes``, where noise is hedged (`ladder.hedges`) and λ is what meets the average.
Without ``unbiased`` the same rates are spent on fewer bands and the rest is dropped: less error in
one gradient, but a part of every gradient that never comes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxcompress.choose import codable_choice, exact_choice, is_codable, payload_bytes
from fxcompress.evidence import TensorEvidence
from fxcompress.fit import LADDER, biased
from fxcompress.ladder import DITHER_BITS, ROTATE_BITS, SAMPLE_RATES, hedges
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import Choice
from fxcompress.policies.base import Policy, Situation

LEVELS = tuple(b / 16 for b in range(int(16 * LADDER[0]), 1, -1))
_PLAIN = (
    *(f"dither(bits={b})" for b in DITHER_BITS),
    *(f"rotate(bits={b})" for b in ROTATE_BITS),
    *(f"subsample(rate={r})" for r in SAMPLE_RATES),
)


def transform(bits: float = 2.0, unbiased: bool = True) -> Policy:
    """The policy ``transform(bits=…,unbiased=…)``."""

    def choose(situation: Situation) -> list[Choice]:
        coded = [c for c in situation.candidates if is_codable(c)]
        specs = _allocate(coded, situation, situation.level or bits)
        return [
            codable_choice(c, specs[c.name] if unbiased else biased(specs[c.name]))
            if c.name in specs
            else exact_choice(c)
            for c in situation.candidates
        ]

    return Policy(
        f"transform{bits:g}",
        f"every float saved tensor in its own basis, {bits:g} bits an element on average"
        + ("" if unbiased else ", bands dropped (biased)"),
        choose,
        calibrated=True,
        levels=LEVELS,
    )


def _allocate(
    candidates: Sequence[Candidate], situation: Situation, average: float
) -> dict[str, str]:
    """A codec spec for each candidate, by name."""
    names, sizes, noises = [], [], []
    weights = hedges(situation.evidence)
    for candidate in candidates:
        evidence = situation.evidence.get(candidate.name) or TensorEvidence()
        specs = list(evidence.transforms.values()) or [s for s in _PLAIN if s in evidence.prices]
        if not specs:  # the backward has no derivative there
            specs = [_nearest(average)]
        names.append(specs)
        sizes.append(np.array([float(payload_bytes(candidate, s)) for s in specs]))
        prices = [evidence.prices[s].variance if s in evidence.prices else 0.0 for s in specs]
        noises.append(np.array(prices) * weights.get(candidate.name, 1.0))
    limit = average / 8 * sum(c.own_bytes / c.fake.element_size() for c in candidates)

    def picks(log_price: float) -> list[int]:
        price = np.exp(log_price)
        return [int(np.argmin(n + price * s)) for n, s in zip(noises, sizes, strict=True)]

    low, high = -80.0, 40.0  # of the logarithm of noise a byte: all at most bits, all at fewest
    for _ in range(50):
        middle = (low + high) / 2
        spent = sum(float(s[i]) for s, i in zip(sizes, picks(middle), strict=True))
        low, high = (middle, high) if spent > limit else (low, middle)
    found = zip(candidates, names, picks(high), strict=True)
    return {candidate.name: specs[i] for candidate, specs, i in found}


def _nearest(bits: float) -> str:
    """What needs neither basis nor prices, at about this many bits."""
    return f"rotate(bits={min(max(round(bits), 1), 5)})" if bits >= 0.75 else "subsample(rate=0.5)"


_BITS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
POLICIES: tuple[Policy, ...] = tuple(transform(bits) for bits in _BITS)
