"""Average Quantization on ActNN's and GACT's allocators, and ALAM (Woo et al., ICLR 2024).

Averages of a = 2/β neighbours at 2 bits (`codecs/average.py`) become the ladder's lowest rung: β
bits an element, charged as β by the budget and priced as 1 bit, as in the reference code. β = 0.5.

`aq-B`: B bits on average. On GACT's allocator by default, where means lie in groups of 256·β; on
ActNN's (`aq-B(allocator=actnn)`) over conv and linear inputs, means in groups of 256, and one width
a layer where ActNN gives each sample its own. `alam(bits)`: groups of 128 everywhere, sensitivities
of the gradients' norms only, ladder 32, 8, 4, 2, β.

Where we differ: the step down to β is weighed by the 2 − β bits that it frees (theirs: by 1), and
neighbours lie along space, or tokens, where their code takes them in row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.errors import SettingsError
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import Choice
from fxcompress.passes.roles import product_of, roles
from fxcompress.policies import actnn, gact
from fxcompress.policies.base import Policy, Situation

BETA = 0.5
GACT_LADDER = (32.0, 8.0, 4.0, 2.0, BETA)
ACTNN_LADDER = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, BETA)


def spec(candidate: Candidate, bits: float, group: int, means: int) -> str:
    """The codec of one rung; neighbours along space, as in the row-major maps of the paper."""
    if bits < 1 and len(candidate.stored_shape) > 2:
        channels = candidate.channels
        return f"average(beta={bits},group={means},along=space,channels={channels})"
    if bits < 1:
        return f"average(beta={bits},group={means})"
    return f"affine(bits={round(bits)},group={group})"


def on_gact(
    average: float, group: int = 256, *, norms: bool = False
) -> Callable[[Situation], Sequence[Choice]]:
    """Every float tensor of rank 2 to 4, by GACT's sensitivities or those of the norms."""

    def choose(situation: Situation) -> list[Choice]:
        taken = [c for c in situation.candidates if gact.takes(c)]
        items = [gact.item(situation, c, norms=norms) for c in taken]
        widths = actnn.allocate(
            items, situation.level or average, GACT_LADDER, actnn.prices_of(GACT_LADDER)
        )
        bits = dict(zip((c.name for c in taken), widths, strict=True))
        means = group if norms else round(group * BETA)
        return [
            exact_choice(c)
            if bits.get(c.name, 32) >= 32
            else codable_choice(c, spec(c, bits[c.name], group, means))
            for c in situation.candidates
        ]

    return choose


def on_actnn(average: float) -> Callable[[Situation], Sequence[Choice]]:
    """Conv, linear and batch-norm inputs, by ActNN's costs."""

    def choose(situation: Situation) -> list[Choice]:
        layers = [
            c
            for c in situation.candidates
            if is_codable(c) and roles(c) & actnn.LAYERS and product_of(c)
        ]
        items = []
        for candidate in layers:
            of_samples = actnn.layer_items(candidate, actnn.evidence_of(situation, candidate))
            items.append(
                actnn.Item(sum(i.cost for i in of_samples), sum(i.weight for i in of_samples))
            )
        widths = actnn.allocate(
            items, situation.level or average, ACTNN_LADDER, actnn.prices_of(ACTNN_LADDER)
        )
        layer_bits = dict(zip((c.name for c in layers), widths, strict=True))
        bits = actnn.with_batch_norms(situation.candidates, layer_bits)
        return [
            codable_choice(c, spec(c, bits[c.name], 256, 256))
            if c.name in bits
            else exact_choice(c)
            for c in situation.candidates
        ]

    return choose


def aq(average: float, allocator: str = "gact") -> Policy:
    """The policy ``aq-B(allocator=…)``."""
    makers = {"gact": on_gact, "actnn": on_actnn}
    if allocator not in makers:
        raise SettingsError(f"allocator={allocator!r}: choose gact or actnn")
    return Policy(
        f"aq-{average}",
        f"Average Quantization: {average} bits on average, down to {BETA} on {allocator.upper()}'s"
        " allocator",
        makers[allocator](average),
        calibrated=True,
        levels=tuple(b / 8 for b in range(64, 3, -1)),
    )


def alam(bits: float = 1.5) -> Policy:
    """The policy ``alam(bits)``."""
    return Policy(
        "alam",
        f"ALAM (ICLR 2024): {bits} bits on average, groups of 128, sensitivity of gradient norms",
        on_gact(bits, 128, norms=True),
        calibrated=True,
        levels=tuple(b / 8 for b in range(64, 3, -1)),
    )
