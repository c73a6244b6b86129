"""What a policy is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fxcompress.evidence import TensorEvidence
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import Choice


@dataclass(frozen=True)
class Situation:
    """What a policy decides on.

    Attributes:
        candidates: saved tensors of one graph.
        level: the policy's knob (bits an element, mostly); None for its own value.
        group: elements that share one scale, where the policy leaves it open.
        evidence: what calibration measured, by tensor name; empty without calibration.
    """

    candidates: Sequence[Candidate]
    level: float | None = None
    group: int = 256
    evidence: Mapping[str, TensorEvidence] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """What a policy name means.

    Attributes:
        name: as the user writes it.
        doc: one line for ``fxcompress policies``, with the source.
        choose: the choices for all candidates of a graph, in order; None where the graph is left
            to plain Inductor or the planner solves for the choices.
        enabled: False leaves every graph as plain Inductor compiles it.
        solves: the planner picks the least noisy choices under the budget.
        calibrated: needs measurements of a real batch.
        levels: values of its knob that make sense, from the most bytes to the fewest.
    """

    name: str
    doc: str
    choose: Callable[[Situation], Sequence[Choice]] | None = None
    enabled: bool = True
    solves: bool = False
    calibrated: bool = False
    levels: tuple[float, ...] = ()
