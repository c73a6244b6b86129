"""The same codec for every float saved tensor: the yardstick for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.passes.rewrite import Choice
from fxcompress.policies.base import Policy, Situation


def lossless(situation: Situation) -> list[Choice]:
    """Masks and small integers packed, all else kept: gradients equal plain Inductor's."""
    return [exact_choice(c) for c in situation.candidates]


def with_spec(spec: Callable[[Situation], str]) -> Callable[[Situation], Sequence[Choice]]:
    """A chooser that codes every float saved tensor with ``spec(situation)``."""

    def choose(situation: Situation) -> list[Choice]:
        text = spec(situation)
        return [
            codable_choice(c, text) if is_codable(c) else exact_choice(c)
            for c in situation.candidates
        ]

    return choose


def _affine(bits: int) -> Policy:
    return Policy(
        f"uniform{bits}",
        f"every float saved tensor at {bits} bits, min–max grid, stochastic rounding",
        with_spec(lambda s: f"affine(bits={round(s.level or bits)},group={s.group})"),
        levels=tuple(range(8, 0, -1)),
    )


def _rotate(bits: int) -> Policy:
    return Policy(
        f"rotate{bits}",
        f"every float saved tensor rotated and quantized at {bits} bits, unbiased",
        with_spec(lambda s: f"rotate(bits={round(s.level or bits)})"),
        levels=(5, 4, 3, 2, 1),
    )


def _dither(bits: int) -> Policy:
    return Policy(
        f"dither{bits}",
        f"every float saved tensor at {bits} bits, min–max grid, subtractive dither",
        with_spec(lambda s: f"dither(bits={round(s.level or bits)},group={s.group})"),
        levels=tuple(range(8, 0, -1)),
    )


def every(spec: str) -> Policy:
    """A codec's spec as a policy: every float saved tensor by it."""
    return Policy(spec, f"every float saved tensor by {spec}", with_spec(lambda _: spec))


POLICIES = (
    Policy("inductor", "plain Inductor, nothing changed", enabled=False),
    Policy("lossless", "masks and small integers packed; gradients exact", lossless),
    *(_affine(bits) for bits in range(1, 9)),
    *(_rotate(bits) for bits in range(1, 6)),
    *(_dither(bits) for bits in range(1, 9)),
)
