"""Three quantizers of a thesis on stochastic activation quantization (2025).

Inputs saved by convolutions, linear layers and batch norms. `thesis-det(bits)`: nearest rounding on
a signed grid for the whole tensor, scale from the 99.999th percentile (Brevitas' default), biased.
`thesis-affine(bits,bucket)`: range and integer zero point in each bucket, stochastic.
`thesis-stoch(base_levels,bucket,use_max,mix_levels,mix_levels_prob)`: the listed kernel,
sign–magnitude with `base_levels` levels of |x|/max, or `mix_levels` in a random part of the buckets
(`codecs/mixture.py`, `codecs/magnitude.py`).

Where we differ: the packed size is what 2n + 1 values really take, bits are stored (the thesis'
listings keep floats), and the random part of the buckets has a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.codecs import codec
from fxcompress.passes.rewrite import Choice
from fxcompress.passes.roles import BATCH_NORM, CONVOLUTION, LINEAR, roles
from fxcompress.policies.base import Policy, Situation

_TAKEN = frozenset({CONVOLUTION, LINEAR, BATCH_NORM})


def _with(spec: Callable[[Situation], str]) -> Callable[[Situation], Sequence[Choice]]:
    codec(spec(Situation(())))  # parameters out of range are refused now, not amid a compile

    def choose(situation: Situation) -> list[Choice]:
        return [
            codable_choice(c, spec(situation))
            if is_codable(c) and roles(c) & _TAKEN
            else exact_choice(c)
            for c in situation.candidates
        ]

    return choose


def det(bits: int = 4) -> Policy:
    """The policy ``thesis-det(bits)``."""

    def spec(s: Situation) -> str:
        width = round(s.level or bits)
        return (
            f"affine(bits={width},rounding=nearest,zero=symmetric,scale=percentile,per=tensor,"
            "meta=fp32)"
        )

    doc = f"thesis: nearest rounding, signed, per tensor, {bits} bits (biased)"
    return Policy("thesis-det", doc, _with(spec), levels=tuple(range(8, 0, -1)))


def affine(bits: int = 4, bucket: int = 512) -> Policy:
    """The policy ``thesis-affine(bits,bucket)``."""

    def spec(s: Situation) -> str:
        return f"affine(bits={round(s.level or bits)},group={bucket},zero=integer,meta=fp32)"

    doc = f"thesis: {bits} bits, integer zero point, buckets of {bucket}"
    return Policy("thesis-affine", doc, _with(spec), levels=tuple(range(8, 0, -1)))


def stoch(
    base_levels: int = 4,
    bucket: int = 512,
    use_max: bool = True,
    mix_levels: int = 16,
    mix_levels_prob: float = 0.3,
) -> Policy:
    """The policy ``thesis-stoch(…)``; the knob is ``mix_levels_prob``."""
    norm = "max" if use_max else "l2"

    def spec(s: Situation) -> str:
        prob = mix_levels_prob if s.level is None else s.level
        if prob == 0:
            return f"magnitude(levels={base_levels},bucket={bucket},norm={norm})"
        return (
            f"mixture(base_levels={base_levels},mix_levels={mix_levels},prob={prob},"
            f"bucket={bucket},norm={norm})"
        )

    doc = f"thesis: sign–magnitude, {base_levels} or {mix_levels} levels, buckets of {bucket}"
    levels = tuple(p / 10 for p in range(10, -1, -1))
    return Policy("thesis-stoch", doc, _with(spec), levels=levels)
