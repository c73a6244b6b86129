"""Plan: one representation for each saved tensor, by the policy and under the budget.

With ``policy="auto"`` the representations solve a mixed-integer program: the least noise in the
gradients such that the modelled memory stays under the budget at every position of the step. What
each representation of each tensor adds is measured (fxcompress.calibrate); without a calibration it
is guessed (fxcompress/ladder.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fxcompress import load_plan, overrides
from fxcompress.choose import bytes_of, mask_bytes
from fxcompress.codecs import codec
from fxcompress.errors import BudgetError, SettingsError
from fxcompress.evidence import TensorEvidence
from fxcompress.ladder import ladder
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate, analyse, saved_bytes
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.peak import Timeline, timeline
from fxcompress.plan import Alternative, Moment, Plan, TensorPlan
from fxcompress.policies import Situation, policy
from fxcompress.provenance import module_path, source_line
from fxcompress.settings import Settings
from fxcompress.solve import Option, build, least_noise, least_peak, least_saved

DEFAULT_BITS = 4  # "auto" with neither budget nor ratio
# The model of the peak misses a few percent of what the allocator shows (ResNets: up to 4 %, a GPT:
# up to 6 %; CPU, `fxcompress bench step`); plans stay this far below the budget.
MARGIN = 1.1
MOMENTS = 400  # of the timeline that a plan carries


@dataclass(frozen=True)
class Baseline:
    """Plain Inductor on the same graph.

    Attributes:
        candidates: its saved tensors.
        peak: modelled peak of its step, bytes, what other graphs keep saved included.
    """

    candidates: tuple[Candidate, ...]
    peak: int

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
    """

    choices: tuple[Choice, ...]
    planned_peak: int
    note: str = ""
    ladders: Mapping[str, Sequence[Option]] = field(default_factory=dict)
    calibrated: bool = False
    timeline: tuple[Moment, ...] = ()


def baseline(cut: Cut, min_bytes: int, reserved: int, *, channels_last: bool) -> Baseline:
    """Measure the cut of plain Inductor, before anything is changed."""
    candidates = analyse(cut, min_bytes, channels_last=channels_last)
    memory = timeline(cut, candidates, channels_last=channels_last)
    keep = [Choice(c, KEEP) for c in candidates]
    return Baseline(candidates, memory.plain_peak(keep) + reserved)


def reason_to_leave(plain: Baseline, settings: Settings) -> str:
    """Why the graph stays as plain Inductor would have it; empty if it does not.

    Raises:
        SettingsError: the plan to follow is of another graph.
    """
    if settings.plan is not None:
        alone = load_plan.leaves_alone(settings.plan, plain.candidates)
        return "as in the given plan" if alone and not settings.overrides else ""
    budget = settings.budget_bytes
    if budget is None or settings.overrides or plain.peak * MARGIN > budget:
        return ""
    return f"plain Inductor needs {plain.peak / 1e6:.1f} MB, within the budget"


def leave_alone(plain: Baseline, note: str) -> Decision:
    """Keep every tensor of plain Inductor, for the reason in ``note``."""
    keep = tuple(Choice(c, KEEP, c.keep or "kept") for c in plain.candidates)
    return Decision(keep, plain.peak, note)


def make_plan(
    cut: Cut,
    candidates: Sequence[Candidate],
    plain: Baseline,
    settings: Settings,
    reserved: int,
    *,
    channels_last: bool = False,
    evidence: Mapping[str, TensorEvidence] | None = None,
) -> Decision:
    """Decide for every candidate.

    Args:
        cut: the graphs.
        candidates: from :func:`fxcompress.passes.analyse.analyse`.
        plain: what plain Inductor needs.
        settings: what the user asked for.
        reserved: bytes that other graphs of the model keep saved meanwhile.
        channels_last: Inductor will lay feature maps out with channels fastest.
        evidence: what calibration measured, by tensor name.

    Raises:
        BudgetError: the budget is below what the policy can reach.
        SettingsError: the policy needs a calibration, or a device it does not have.
    """
    memory = timeline(cut, candidates, channels_last=channels_last)
    ladders: list[Sequence[Option]]
    ladders = [ladder(c, settings.group, (evidence or {}).get(c.name)) for c in candidates]
    overrides.warn_unmatched(settings.overrides, (*plain.candidates, *candidates))
    ladders, fixed = overrides.apply(settings.overrides, candidates, ladders, evidence or {})
    choices = _choose(candidates, plain, settings, memory, reserved, ladders, fixed, evidence)
    planned = memory.peak(choices) + reserved
    budget = settings.budget_bytes
    if budget is not None and planned * MARGIN > budget + 1:
        raise _infeasible(ladders, choices, settings, memory, reserved)
    return Decision(
        choices,
        planned,
        ladders={c.name: found for c, found in zip(candidates, ladders, strict=True)},
        calibrated=evidence is not None,
        timeline=_moments(memory, candidates, choices, reserved),
    )


def _choose(
    candidates: Sequence[Candidate],
    plain: Baseline,
    settings: Settings,
    memory: Timeline,
    reserved: int,
    ladders: Sequence[Sequence[Option]],
    fixed: frozenset[str],
    evidence: Mapping[str, TensorEvidence] | None,
) -> tuple[Choice, ...]:
    if settings.plan is not None:
        saved = {c.name for c in candidates}
        rebuilt = [c for c in plain.candidates if c.name not in saved]
        return _with_fixed(load_plan.choices_of(settings.plan, candidates, rebuilt), ladders, fixed)
    chosen = policy(settings.policy)
    if chosen.solves:
        if settings.budget_bytes is not None or settings.ratio_saved is not None:
            return _solve(ladders, plain, settings, memory, reserved)
        chosen = policy(f"uniform{DEFAULT_BITS}")
    assert chosen.choose is not None
    if chosen.calibrated and evidence is None:
        raise SettingsError(
            f"policy={settings.policy!r} allocates bits by measurements of this very model: pass "
            "calibration=fxcompress.calibrate(model, batch)"
        )
    situation = Situation(candidates, None, settings.group, evidence or {})
    return _with_fixed(chosen.choose(situation), ladders, fixed)


def _with_fixed(
    choices: Sequence[Choice], ladders: Sequence[Sequence[Option]], fixed: frozenset[str]
) -> tuple[Choice, ...]:
    """The choices, except where an override fixed another; views of one buffer alike."""
    pairs = zip(choices, ladders, strict=True)
    return tie_storages([o[0].choice if c.candidate.name in fixed else c for c, o in pairs])


def tie_storages(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Views of one buffer are coded together or not at all: one kept view keeps all of it."""
    kept = {
        prop.storage_root(c.candidate.saved.forward): c.candidate.name
        for c in choices
        if c.representation == KEEP
    }

    def tied(choice: Choice) -> Choice:
        owner = kept.get(prop.storage_root(choice.candidate.saved.forward))
        if owner is None or choice.representation == KEEP:
            return choice
        return Choice(choice.candidate, KEEP, f"shares its memory with {owner}, which is kept")

    return tuple(tied(c) for c in choices)


def _solve(
    ladders: Sequence[Sequence[Option]],
    plain: Baseline,
    settings: Settings,
    memory: Timeline,
    reserved: int,
) -> tuple[Choice, ...]:
    """The least noisy choices within the budget or the ratio; the smallest if none are."""
    program = build(ladders, memory)
    if settings.budget_bytes is not None:
        limit = settings.budget_bytes / MARGIN - reserved
        return least_noise(program, peak=limit) or least_peak(program)
    assert settings.ratio_saved is not None
    found = least_noise(program, saved=plain.saved_bytes / settings.ratio_saved)
    if found is None:
        smallest = least_saved(program)
        masks = mask_bytes(smallest)
        ratio = plain.saved_bytes / sum(bytes_of(c, masks) for c in smallest)
        raise BudgetError(
            f"ratio_saved={settings.ratio_saved:g} is out of reach: this model's saved bytes "
            f"shrink by {ratio:.1f} at most; ask for ratio_saved={ratio:.1f} or less"
        )
    return found


def _moments(
    memory: Timeline,
    candidates: Sequence[Candidate],
    choices: Sequence[Choice],
    reserved: int,
) -> tuple[Moment, ...]:
    """The modelled memory, thinned out: the highest of each run of positions."""
    keep = [Choice(c, KEEP) for c in candidates]
    plain = memory.total(keep) + memory.plain_extra + reserved
    planned = memory.total(choices) + reserved
    step = -(-len(plain) // MOMENTS)
    found = []
    for start in range(0, len(plain), step):
        at = start + int(planned[start : start + step].argmax())
        phase = "forward" if at < memory.forward_nodes else "backward"
        found.append(
            Moment(
                memory.names[at],
                phase,
                int(plain[start : start + step].max()),
                int(planned[at]),
            )
        )
    return tuple(found)


def _infeasible(
    ladders: Sequence[Sequence[Option]],
    choices: Sequence[Choice],
    settings: Settings,
    memory: Timeline,
    reserved: int,
) -> BudgetError:
    """The error for a budget out of reach: the smallest that is, and what holds it up."""
    program = build(ladders, memory)
    smallest = (memory.peak(least_peak(program)) + reserved) * MARGIN
    total = memory.total(choices)
    position = int(total.argmax())
    shares = sorted(
        ((float(memory.of(c)[position]), c.candidate) for c in choices),
        key=lambda share: -share[0],
    )
    holders = ", ".join(
        f"{c.name} ({module_path(c.saved.forward) or prop.op_name(c.saved.forward)}, "
        f"{size / 1e6:.1f} MB)"
        for size, c in shares[:5]
        if size > 0
    )
    planned = (float(total[position]) + reserved) * MARGIN
    chooser = f"policy={settings.policy!r}" if settings.plan is None else "the given plan"
    return BudgetError(
        f"budget_mb={settings.budget_mb:g} is out of reach with {chooser}, whose "
        f"peak is {planned / 1e6:.1f} MB; the smallest feasible budget is "
        f"{_round_up_mb(smallest)} MB (policy='auto'). The peak is at {memory.names[position]}, "
        f"where these are alive: {holders or 'transients only'}"
        + (f"; {reserved / 1e6:.1f} MB are saved by other graphs" if reserved else "")
        + ". Raise the budget, or make the batch smaller"
    )


def _round_up_mb(size: float) -> str:
    return f"{math.ceil(size / 1e5) / 10:.1f}"


def describe(decision: Decision, plain: Baseline, settings: Settings) -> Plan:
    """The decision as data for the report: a row for each tensor that plain Inductor saves."""
    masks = mask_bytes(decision.choices)
    chosen = {c.candidate.name: c for c in decision.choices}
    before = {c.name: c.storage_bytes for c in plain.candidates}
    rows = [
        _row(chosen[c.name], masks, c.storage_bytes, decision.ladders.get(c.name, ()))
        if c.name in chosen
        else _rebuilt(c)
        for c in plain.candidates
    ]
    # Statistics that a recomputation needs are saved although plain Inductor does not.
    rows += [
        _row(c, masks, 0, decision.ladders.get(name, ()))
        for name, c in chosen.items()
        if name not in before
    ]
    return Plan(
        policy=settings.policy,
        budget_mb=settings.budget_mb,
        tensors=tuple(rows),
        plain_peak_bytes=plain.peak,
        planned_peak_bytes=decision.planned_peak,
        note=decision.note,
        calibrated=decision.calibrated,
        timeline=decision.timeline,
    )


def _noise_of(choice: Choice, options: Sequence[Option]) -> float | None:
    """What the planner took the choice to add; None for a codec that is not on its ladder."""
    if choice.codec_spec is None or codec(choice.codec_spec).lossless:
        return 0.0
    return next(
        (o.noise for o in options if o.choice.representation == choice.representation), None
    )


def _rebuilt(candidate: Candidate) -> TensorPlan:
    row = _row(Choice(candidate, KEEP), {}, candidate.storage_bytes)
    steps = f"{len(candidate.recompute)} steps" if candidate.recompute else "pointwise steps"
    reason = f"rebuilt by {steps} from another saved tensor"
    return replace(row, representation="recompute", bytes_after=0, reason=reason)


def _row(
    choice: Choice, masks: dict[str, int], before: int, options: Sequence[Option] = ()
) -> TensorPlan:
    candidate = choice.candidate
    node, fake = candidate.saved.forward, candidate.fake
    return TensorPlan(
        name=candidate.name,
        module=module_path(node),
        source=source_line(node),
        op=prop.op_name(node),
        shape=tuple(s if isinstance(s, int) else str(s) for s in fake.shape),
        dtype=str(fake.dtype),
        storage_bytes=before,
        smooth_readers=tuple(prop.op_name(n) for n in candidate.smooth),
        exact_readers=tuple(prop.op_name(n) for n in candidate.exact),
        recompute=tuple(prop.op_name(n) for n in candidate.recompute),
        representation=choice.representation,
        bytes_after=bytes_of(choice, masks),
        reason=choice.reason,
        predicted_variance=_noise_of(choice, options),
        alternatives=tuple(
            Alternative(o.choice.representation, bytes_of(o.choice, {}), o.noise) for o in options
        ),
    )
