"""Decision: what plain Inductor needs for a graph, and what was decided instead, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxcompress import load_plan
from fxcompress.passes.analyse import Candidate, analyse, saved_bytes
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.peak import timeline
from fxcompress.plan import Moment
from fxcompress.program import Option
from fxcompress.settings import Settings

# The model of the peak misses a few percent of what the allocator shows (ResNets: up to 4 %, a GPT:
# up to 6 %; CPU, `fxcompress bench step`); plans stay this far below the budget.
MARGIN = 1.1
MODEST = 0.1  # of the budget: what a graph may save as it is while others are still to come


@dataclass(frozen=True)
class Baseline:
    """Plain Inductor on the same graph.

    Attributes:
        candidates: its saved tensors.
        peak: modelled peak of its step, bytes, what other graphs keep saved included.
        whole_peak: the same if the other graphs were plain, too.
    """

    candidates: tuple[Candidate, ...]
    peak: int
    whole_peak: int

    @property
    def saved_bytes(self) -> int:
        return saved_bytes(self.candidates)


@dataclass(frozen=True)
class Decision:
    """Choices for all candidates of one graph, and what they are expected to cost.

    Attributes:
        ladders: by tensor, what was weighed, from the least noise on.
        calibrated: noise was measured, not guessed.
        timeline: modelled memory of the step.
        released_peak: planned_peak if the caller lets go of what the forward returned.
        slowdown: estimated time that encoding and decoding add to a step, over that of the plain
            step; None where nobody asked the clock.
        gap: how far from the best the choices may be (see Solution); None if nothing was solved.
    """

    choices: tuple[Choice, ...]
    planned_peak: int
    note: str = ""
    ladders: Mapping[str, Sequence[Option]] = field(default_factory=dict)
    calibrated: bool = False
    timeline: tuple[Moment, ...] = ()
    released_peak: int | None = None
    gap: float | None = None
    slowdown: float | None = None


def baseline(
    cut: Cut,
    min_bytes: int,
    reserved: int,
    reserved_plain: int = 0,
    *,
    channels_last: bool,
    repeats: int = 1,
) -> Baseline:
    """Measure the cut of plain Inductor, before anything is changed.

    Args:
        reserved, reserved_plain: bytes that other graphs of the model keep saved meanwhile, as
            planned and under plain Inductor.
        repeats: see :func:`fxcompress.peak.timeline`.
    """
    candidates = analyse(cut, min_bytes, channels_last=channels_last)
    memory = timeline(cut, candidates, channels_last=channels_last, repeats=repeats)
    peak = memory.plain_peak([Choice(c, KEEP) for c in candidates])
    return Baseline(candidates, peak + reserved, peak + max(reserved, reserved_plain))


def budget_of(plain: Baseline, settings: Settings) -> float | None:
    """Bytes that the step may take; None: no bound."""
    if settings.ratio is not None:
        return plain.whole_peak / settings.ratio
    return settings.budget_bytes


def reason_to_leave(plain: Baseline, settings: Settings, *, is_early: bool = False) -> str:
    """Why the graph stays as plain Inductor would have it; empty if it does not.

    Args:
        is_early: graphs that are not known yet will need what it leaves of the budget.

    Raises:
        SettingsError: the plan to follow is of another graph.
    """
    if settings.plan is not None:
        alone = load_plan.leaves_alone(settings.plan, plain.candidates)
        return "as in the given plan" if alone and not settings.overrides else ""
    budget = budget_of(plain, settings)
    margin = MARGIN if settings.ratio is None else 1.0  # a share of this very figure
    if budget is None or settings.overrides or plain.peak * margin > budget:
        return ""
    if is_early and settings.ratio is None and plain.saved_bytes > MODEST * budget:
        return ""
    return f"plain Inductor needs {plain.peak / 1e6:.1f} MB, within the budget"


def leave_alone(plain: Baseline, note: str) -> Decision:
    """Keep every tensor of plain Inductor, for the reason in ``note``."""
    keep = tuple(Choice(c, KEEP, c.keep or "kept") for c in plain.candidates)
    return Decision(keep, plain.peak, note)
