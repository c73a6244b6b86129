"""GACT (Liu et al., ICML 2022, arXiv 2206.11357), levels L1 to L2.2 of its reference code.

Every float saved tensor of rank 2 to 4 is quantized in groups of 256 over the flattened tensor,
with fp32 metadata. L1, L1.1, L1.2: 4, 8, 2 bits. L2, L2.1, L2.2: 4, 3, 2 bits on average from the
ladder 32 (kept), 8, 4, 2, 1, greedily by C/(2^b − 1)².

C is GACT's run-time sensitivity: it runs the backward three times for each tensor, twice with the
tensor at 1 bit and once at 8, and takes max(|g0 − g1|², 2·max(|g0 − g2|², |g1 − g2|²)). For an
unbiased codec that is about twice the variance which 1 bit on this tensor adds to the gradient, and
we take it from one vector–Jacobian product for all tensors together (fxcompress.sensitivity).

Where we differ: masks are exact (GACT quantizes a ReLU's output, and its mask flips), a tensor that
two operators save is coded once, metadata is rounded before the codes are drawn. `faithful=True`
lets comparisons see the decoded values, as there; masks that the compiler saves in place of a
tensor, and pooling indices, stay exact all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.errors import SettingsError
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import Choice
from fxcompress.policies.actnn import Item, allocate, prices_of
from fxcompress.policies.base import Policy, Situation

LADDER = (32.0, 8.0, 4.0, 2.0, 1.0)
ONE_BIT = "affine(bits=1)"


def takes(candidate: Candidate) -> bool:
    """GACT's filter: float tensors of rank 2 to 4."""
    return is_codable(candidate) and 2 <= len(candidate.stored_shape) <= 4


def spec(bits: float) -> str:
    return f"affine(bits={round(bits)},group=256,meta=fp32)"


def fixed(bits: int) -> Callable[[Situation], Sequence[Choice]]:
    """L1, L1.1, L1.2."""

    def choose(situation: Situation) -> list[Choice]:
        text = spec(situation.level or bits)
        return [
            codable_choice(c, text) if takes(c) else exact_choice(c) for c in situation.candidates
        ]

    return choose


def item(situation: Situation, candidate: Candidate, *, norms: bool = False) -> Item:
    """The tensor's sensitivity and size; ``norms``: of the gradients' norms only (ALAM).

    Raises:
        SettingsError: the tensor was not calibrated.
    """
    found = situation.evidence.get(candidate.name)
    if found is None or ONE_BIT not in found.prices:
        raise SettingsError(
            f"this policy allocates bits by measurements, and {candidate.name} has none: pass "
            "calibration=fxcompress.calibrate(model, batch)"
        )
    elements = candidate.own_bytes / candidate.fake.element_size()
    cost = found.norm_price if norms else found.prices[ONE_BIT].variance
    return Item(2 * cost, elements)


def adaptive(average: float) -> Callable[[Situation], Sequence[Choice]]:
    """L2, L2.1, L2.2."""

    def choose(situation: Situation) -> list[Choice]:
        taken = [c for c in situation.candidates if takes(c)]
        items = [item(situation, c) for c in taken]
        widths = allocate(items, situation.level or average, LADDER, prices_of(LADDER))
        bits = dict(zip((c.name for c in taken), widths, strict=True))
        return [
            exact_choice(c) if bits.get(c.name, 32) >= 32 else codable_choice(c, spec(bits[c.name]))
            for c in situation.candidates
        ]

    return choose


_PAPER = "(arXiv 2206.11357)"
_LEVELS = tuple(b / 8 for b in range(64, 7, -1))


def level(name: str, bits: int, measured: bool, faithful: bool = False) -> Policy:
    """The policy ``gact-l…(faithful=…)``: ``bits``, on average where ``measured``."""
    choose = adaptive(bits) if measured else fixed(bits)

    def flipping(situation: Situation) -> list[Choice]:
        return [replace(c, exact_masks=False) for c in choose(situation)]

    return Policy(
        name,
        f"GACT {name[5:].upper()}: "
        + (
            f"{bits} bits on average, by sensitivity {_PAPER}"
            if measured
            else f"every float tensor of rank 2 to 4 at {bits} bits {_PAPER}"
        ),
        flipping if faithful else choose,
        calibrated=measured,
        levels=_LEVELS if measured else (8, 4, 2, 1),
    )


MAKERS = {
    f"gact-{number}": partial(level, f"gact-{number}", bits, measured)
    for number, bits, measured in (
        *(("l1", 4, False), ("l1.1", 8, False), ("l1.2", 2, False)),
        *(("l2", 4, True), ("l2.1", 3, True), ("l2.2", 2, True)),
    )
}
