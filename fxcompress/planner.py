"""Plan: one representation for each saved tensor, by the policy and under the budget.

With ``policy="auto"`` the widths solve a mixed-integer program: the least added noise such that the
modelled memory stays under the budget at every position of the step. Noise is priced by an analytic
prior: at b bits a group of normal values spans about 5.6 standard deviations, so stochastic
rounding adds ``5.6² / 6 / (2^b − 1)²`` of the tensor's variance, and every tensor's relative noise
counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxcompress.choose import (
    affine_choice,
    bytes_of,
    exact_choice,
    is_codable,
    mask_bytes,
)
from fxcompress.errors import BudgetError
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate, analyse, saved_bytes
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.peak import Timeline, timeline
from fxcompress.plan import Plan, TensorPlan
from fxcompress.policies import policy
from fxcompress.provenance import module_path, source_line
from fxcompress.settings import Settings
from fxcompress.solve import Option, build, least_noise, least_peak, least_saved

DEFAULT_BITS = 4  # "auto" with neither budget nor ratio
# The model of the peak misses a few percent of what the allocator shows (ResNets: up to 4 %, a GPT:
# up to 6 %; CPU, `fxcompress bench step`); plans stay this far below the budget.
MARGIN = 1.1


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
    """Choices for all candidates of one graph, and what they are expected to cost."""

    choices: tuple[Choice, ...]
    planned_peak: int
    note: str = ""


def baseline(cut: Cut, min_bytes: int, reserved: int, *, channels_last: bool) -> Baseline:
    """Measure the cut of plain Inductor, before anything is changed."""
    candidates = analyse(cut, min_bytes, channels_last=channels_last)
    memory = timeline(cut, candidates, channels_last=channels_last)
    keep = [Choice(c, KEEP) for c in candidates]
    return Baseline(candidates, memory.plain_peak(keep) + reserved)


def fits_already(plain: Baseline, settings: Settings) -> bool:
    """Plain Inductor stays within the budget."""
    budget = settings.budget_bytes
    return budget is not None and plain.peak * MARGIN <= budget


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
) -> Decision:
    """Decide for every candidate.

    Args:
        cut: the graphs.
        candidates: from :func:`fxcompress.passes.analyse.analyse`.
        plain: what plain Inductor needs.
        settings: what the user asked for.
        reserved: bytes that other graphs of the model keep saved meanwhile.
        channels_last: Inductor will lay feature maps out with channels fastest.

    Raises:
        BudgetError: the budget is below what the policy can reach.
    """
    memory = timeline(cut, candidates, channels_last=channels_last)
    choices = _choose(candidates, plain, settings, memory, reserved)
    planned = memory.peak(choices) + reserved
    budget = settings.budget_bytes
    if budget is not None and planned * MARGIN > budget + 1:
        raise _infeasible(candidates, choices, settings, memory, reserved)
    return Decision(choices, planned)


def _choose(
    candidates: Sequence[Candidate],
    plain: Baseline,
    settings: Settings,
    memory: Timeline,
    reserved: int,
) -> tuple[Choice, ...]:
    chosen = policy(settings.policy)
    bits = chosen.bits
    if chosen.choose:
        if settings.budget_bytes is not None or settings.ratio_saved is not None:
            return _solve(candidates, plain, settings, memory, reserved)
        bits = DEFAULT_BITS

    def fixed(candidate: Candidate) -> Choice:
        if bits is None or not is_codable(candidate):
            return exact_choice(candidate)
        return affine_choice(candidate, bits, settings.group)

    return _tie_storages([fixed(c) for c in candidates])


def _tie_storages(choices: Sequence[Choice]) -> tuple[Choice, ...]:
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


def noise(bits: int) -> float:
    """Variance added by stochastic rounding over the variance of a normal tensor; see above."""
    return 5.6**2 / 6 / (2**bits - 1) ** 2


def _ladder(candidate: Candidate, group: int) -> list[Option]:
    """Every representation of a candidate, the least noisy first."""
    exact = exact_choice(candidate)
    ladder = [Option(exact, 0.0)]
    if exact.representation != KEEP:
        ladder.append(Option(Choice(candidate, KEEP, "kept"), 0.0))
    if is_codable(candidate):
        for bits in range(8, candidate.floor_bits - 1, -1):
            choice = affine_choice(candidate, bits, group)
            if choice.representation != KEEP:
                ladder.append(Option(choice, noise(bits)))
    return ladder


def _solve(
    candidates: Sequence[Candidate],
    plain: Baseline,
    settings: Settings,
    memory: Timeline,
    reserved: int,
) -> tuple[Choice, ...]:
    """The least noisy choices within the budget or the ratio; the smallest if none are."""
    program = build([_ladder(c, settings.group) for c in candidates], memory)
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


def _infeasible(
    candidates: Sequence[Candidate],
    choices: Sequence[Choice],
    settings: Settings,
    memory: Timeline,
    reserved: int,
) -> BudgetError:
    """The error for a budget out of reach: the smallest that is, and what holds it up."""
    program = build([_ladder(c, settings.group) for c in candidates], memory)
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
    return BudgetError(
        f"budget_mb={settings.budget_mb:g} is out of reach with policy={settings.policy!r}, whose "
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
        _row(chosen[c.name], masks, c.storage_bytes) if c.name in chosen else _rebuilt(c)
        for c in plain.candidates
    ]
    # Statistics that a recomputation needs are saved although plain Inductor does not.
    rows += [_row(c, masks, 0) for name, c in chosen.items() if name not in before]
    return Plan(
        policy=settings.policy,
        budget_mb=settings.budget_mb,
        tensors=tuple(rows),
        plain_peak_bytes=plain.peak,
        planned_peak_bytes=decision.planned_peak,
        note=decision.note,
    )


def _rebuilt(candidate: Candidate) -> TensorPlan:
    row = _row(Choice(candidate, KEEP), {}, candidate.storage_bytes)
    steps = f"{len(candidate.recompute)} steps" if candidate.recompute else "pointwise steps"
    reason = f"rebuilt by {steps} from another saved tensor"
    return replace(row, representation="recompute", bytes_after=0, reason=reason)


def _row(choice: Choice, masks: dict[str, int], before: int) -> TensorPlan:
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
    )
