"""Plan: one representation for each saved tensor, by the policy and under the budget.

With ``policy="auto"`` the representations solve a mixed-integer program: the least noise in the
gradients such that the modelled memory stays under the budget at every position of the step. What
each representation of each tensor adds is measured (fxcompress.calibrate); without a calibration it
is guessed (fxcompress/ladder.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import fx

from fxcompress import load_plan, overrides, region
from fxcompress.choose import bytes_of, is_codable, mask_bytes, passes_noise
from fxcompress.costs import Clock, clock_of
from fxcompress.decision import MARGIN, Baseline, Decision, budget_of
from fxcompress.errors import BudgetError, SettingsError
from fxcompress.evidence import TensorEvidence
from fxcompress.ladder import hedges, ladder
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, RECOMPUTE, Choice
from fxcompress.peak import Timeline, timeline
from fxcompress.plan import Moment
from fxcompress.policies import Situation, policy
from fxcompress.program import is_rebuilt
from fxcompress.provenance import module_path
from fxcompress.settings import Settings
from fxcompress.solve import (
    Option,
    Program,
    Solution,
    build,
    least_noise,
    least_peak,
    least_saved,
)

log = logging.getLogger("fxcompress")

DEFAULT_BITS = 4  # "auto" with neither budget nor ratio
MEANWHILE = 0.05  # noise that a graph may have until those after it are known
FEW = 16  # times min_bytes: a graph that saves no more than this refuses no ratio_saved
MOMENTS = 400  # of the timeline that a plan carries


@dataclass(frozen=True)
class Chosen:
    """A Choice without its candidate and what lowers it; see there."""

    representation: str
    reason: str = ""
    host: bool = False
    exact_masks: bool = True


@dataclass(frozen=True)
class Given:
    """What a graph is to become, decided for all graphs of a model together (see joint.py).

    Attributes:
        choices: by the name of its saved tensors.
        reserved, reserved_plain: bytes that other graphs will keep saved meanwhile, and would if
            all were left to plain Inductor.
        gap: see Solution.
    """

    choices: Mapping[str, Chosen]
    reserved: int
    reserved_plain: int = 0
    gap: float | None = None

    def of(self, candidates: Sequence[Candidate]) -> tuple[Choice, ...]:
        """The choices for these candidates.

        Raises:
            SettingsError: they were made for other tensors, under circumstances that no key tells.
        """
        if self.choices.keys() != {c.name for c in candidates}:
            raise SettingsError(
                "what was kept of this graph's plan is of another graph: remove share-*.json from "
                "the folder fxcompress in Inductor's cache (TORCHINDUCTOR_CACHE_DIR)"
            )
        return tuple(Choice(c, **vars(self.choices[c.name])) for c in candidates)

    def key(self) -> str:
        """Content hash: part of the key of a graph that is compiled by it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:24]


def chosen(choices: Sequence[Choice]) -> dict[str, Chosen]:
    """What is kept of these choices in a Given."""
    return {
        c.candidate.name: Chosen(c.representation, c.reason, c.host, c.exact_masks) for c in choices
    }


def make_plan(
    cut: Cut,
    candidates: Sequence[Candidate],
    plain: Baseline,
    settings: Settings,
    reserved: int,
    *,
    channels_last: bool = False,
    evidence: Mapping[str, TensorEvidence] | None = None,
    is_early: bool = False,
    given: Given | None = None,
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
        is_early: other graphs of the model are still to come.
        given: what was decided for it already.

    Raises:
        BudgetError: the budget is below what the policy can reach.
        SettingsError: the policy needs a calibration, or a device it does not have.
    """
    memory, released = (
        timeline(
            cut,
            candidates,
            channels_last=channels_last,
            repeats=settings.repeats,
            lets_go=lets_go,
        )
        for lets_go in (False, True)
    )
    clock = None
    if policy(settings.policy).solves:
        clock = clock_of(cut, plain.candidates, settings.time_price)
    ladders, fixed = weighed(candidates, plain, settings, evidence, clock)
    if given is not None:
        solved: Solution | None = Solution(given.of(candidates), given.gap, 0.0)
    else:
        solved = _solved(ladders, plain, settings, memory, reserved, evidence, is_early=is_early)
    if solved is None:
        choices = _followed(candidates, plain, settings, ladders, fixed, evidence)
    else:
        choices = solved.choices
    planned = memory.peak(choices) + reserved
    budget = budget_of(plain, settings)
    if given is None and budget is not None and planned * MARGIN > budget + 1:
        raise _infeasible(ladders, choices, settings, memory, reserved, budget)
    return Decision(
        choices,
        planned,
        ladders={c.name: found for c, found in zip(candidates, ladders, strict=True)},
        calibrated=evidence is not None,
        timeline=_moments(memory, candidates, choices, reserved),
        released_peak=released.peak(choices) + reserved,
        gap=None if solved is None else solved.gap,
        slowdown=sum(clock.slowdown(c) for c in choices) if clock else None,
    )


def weighed(
    candidates: Sequence[Candidate],
    plain: Baseline,
    settings: Settings,
    evidence: Mapping[str, TensorEvidence] | None,
    clock: Clock | None,
) -> tuple[list[Sequence[Option]], frozenset[str]]:
    """(what each tensor may be, names of those that a region or an override fixes)."""
    found: list[Sequence[Option]] = []
    weights = hedges(evidence or {})
    for candidate in candidates:
        known = (evidence or {}).get(candidate.name)
        weight = weights.get(candidate.name, 1.0)
        options = ladder(candidate, settings.group, known, clock, weight)
        if settings.noise_ceiling is not None:  # a bound on noise holds for measured noise only
            prices = known.prices if known is not None else {}
            options = [o for o in options if o.noise == 0 or o.choice.representation in prices]
        found.append(options)
    if evidence is not None or settings.noise_ceiling is None:
        found = with_passes(candidates, found, evidence)
    overrides.warn_unmatched(settings.overrides, (*plain.candidates, *candidates))
    ruled, fixed = overrides.apply(settings.overrides, candidates, found, evidence or {})
    if settings.plan is not None:  # which was made with regions in force
        return ruled, fixed
    free = [c for c in candidates if c.name not in fixed]
    chosen = region.choices_of(free, evidence or {}, settings.group)
    for i, candidate in enumerate(candidates):
        if candidate.name in chosen:
            choice, known = chosen[candidate.name], (evidence or {}).get(candidate.name)
            ruled[i] = [Option(choice, overrides.noise_of(choice, found[i], known))]
    return overrides.reconciled(candidates, ruled), fixed | chosen.keys()


def with_passes(
    candidates: Sequence[Candidate],
    ladders: Sequence[Sequence[Option]],
    evidence: Mapping[str, TensorEvidence] | None,
) -> list[Sequence[Option]]:
    """The ladders, with what noise does through tensors that are rebuilt (see Option.passes).

    Without measurements every rebuilt tensor counts as much as the one that is coded.
    """
    found = list(ladders)
    views: dict[fx.Node, list[int]] = {}
    for i, candidate in enumerate(candidates):
        views.setdefault(prop.storage_root(candidate.saved.forward), []).append(i)
    names = {c.saved.forward: c.name for c in candidates if is_codable(c)}
    for places in views.values():
        if not all(passes_noise(candidates[i]) for i in places):
            continue
        first = candidates[places[0]]
        recipes = [r for i in places if (r := candidates[i].recipe) is not None]
        roots = dict.fromkeys(names[n] for r in recipes for n in r.roots if n in names)
        passes = []
        for name in roots:
            known = (evidence or {}).get(name)
            share = known.through.get(first.name) if known else len(places)
            if share is not None and (evidence is None or known is not None):
                passes.append((name, float(share)))
        found[places[0]] = [
            replace(o, passes=tuple(passes)) if is_rebuilt(o) else o for o in ladders[places[0]]
        ]
    return found


def _followed(
    candidates: Sequence[Candidate],
    plain: Baseline,
    settings: Settings,
    ladders: Sequence[Sequence[Option]],
    fixed: frozenset[str],
    evidence: Mapping[str, TensorEvidence] | None,
) -> tuple[Choice, ...]:
    """What the given plan or the policy says, except where an override says something else."""
    chosen = policy(settings.policy)
    choices: Sequence[Choice]
    if settings.plan is not None:
        saved = {c.name for c in candidates}
        rebuilt = [c for c in plain.candidates if c.name not in saved]
        choices = load_plan.choices_of(settings.plan, candidates, rebuilt)
    else:
        if chosen.calibrated and evidence is None:
            raise SettingsError(
                f"policy={settings.policy!r} allocates bits by measurements of this very model: "
                "pass calibration=fxcompress.calibrate(model, batch)"
            )
        choose = (policy(f"uniform{DEFAULT_BITS}") if chosen.solves else chosen).choose
        assert choose is not None
        choices = choose(Situation(candidates, None, settings.group, evidence or {}))
    pairs = zip(choices, ladders, strict=True)
    chosen_or_fixed = [o[0].choice if c.candidate.name in fixed else c for c, o in pairs]
    return with_roots(tie_storages(chosen_or_fixed))


def with_roots(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """What would be rebuilt is kept if the backward has not its roots, or they are too noisy."""
    settled = {c.candidate.saved.forward: c for c in choices}
    for node, choice in settled.items():  # roots come first
        recipe = choice.candidate.recipe
        if choice.representation != RECOMPUTE or recipe is None:
            continue
        bears_noise = passes_noise(choice.candidate)
        lacks = [
            root.candidate.name
            for root in (settled[n] for n in recipe.roots if n in settled)
            if not (root.is_exact or (bears_noise and root.codec_spec is not None))
        ]
        if lacks:
            reason = f"cannot be rebuilt: {lacks[0]} is not kept as it is"
            log.warning("%s %s", choice.candidate.name, reason)
            settled[node] = Choice(choice.candidate, KEEP, reason)
    return tie_storages(tuple(settled.values()))


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


def _solved(
    ladders: Sequence[Sequence[Option]],
    plain: Baseline,
    settings: Settings,
    memory: Timeline,
    reserved: int,
    evidence: Mapping[str, TensorEvidence] | None,
    *,
    is_early: bool,
) -> Solution | None:
    """The least noisy choices within the bound that was set, the smallest if none are; None where
    no bound was set or other choices are to be followed."""
    if settings.plan is not None or not (settings.is_bounded and policy(settings.policy).solves):
        return None
    program = build(ladders, memory)
    budget = budget_of(plain, settings)
    if budget is not None:
        peak = budget / MARGIN - reserved
        smallest = least_saved(program, peak=peak, noise=MEANWHILE) if is_early else None
        return smallest or least_noise(program, peak=peak) or least_peak(program)
    if settings.noise_ceiling is not None:
        return _least_peak_at(settings, program, evidence)
    assert settings.ratio_saved is not None
    found = least_noise(program, saved=plain.saved_bytes / settings.ratio_saved)
    if found is None and plain.saved_bytes <= FEW * settings.min_bytes:
        return least_saved(program)  # a loss behind a graph break, say: labels and statistics
    if found is None:
        lowest = least_saved(program)
        assert lowest is not None  # nothing else is asked of it
        masks = mask_bytes(lowest.choices)
        ratio = plain.saved_bytes / sum(bytes_of(c, masks) for c in lowest.choices)
        raise BudgetError(
            f"ratio_saved={settings.ratio_saved:g} is out of reach: this model's saved bytes "
            f"shrink by {ratio:.1f} at most; ask for ratio_saved={ratio:.1f} or less"
        )
    return found


def _least_peak_at(
    settings: Settings, program: Program, evidence: Mapping[str, TensorEvidence] | None
) -> Solution:
    """The lowest peak with at most the noise that was allowed."""
    allowed = settings.noise_ceiling
    assert allowed is not None
    name = "max_grad_error" if settings.max_loss_increase is None else "max_loss_increase"
    asked = getattr(settings, name)
    if evidence is None and asked > 0:
        raise SettingsError(
            f"{name}={asked:g} needs measurements of this very model, and the first batch "
            "gave none: pass calibration=fxcompress.calibrate(model, batch)"
        )
    found = least_peak(program, noise=allowed)
    if found is None:
        least = least_noise(program, peak=None)
        assert least is not None
        reached = math.ceil(1e4 * settings.bound_of(least.noise)) / 1e4
        raise BudgetError(
            f"{name}={asked:g} is out of reach: the overrides alone add {reached:g}; ask "
            "for that or more, or give those tensors more bits"
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
    budget: float,
) -> BudgetError:
    """The error for a budget out of reach: the smallest that is, and what holds it up."""
    lowest = least_peak(build(ladders, memory))
    assert lowest is not None  # nothing else is asked of it
    smallest = (memory.peak(lowest.choices) + reserved) * MARGIN
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
    if settings.ratio is None:
        asked = f"budget_mb={settings.budget_mb:g}"
    else:
        asked = f"ratio={settings.ratio:g} (a budget of {budget / 1e6:.1f} MB)"
    error = BudgetError(
        f"{asked} is out of reach with {chooser}, whose "
        f"peak is {planned / 1e6:.1f} MB; the smallest feasible budget is "
        f"{_round_up_mb(smallest)} MB (policy='auto'). The peak is at {memory.names[position]}, "
        f"where these are alive: {holders or 'transients only'}"
        + (f"; {reserved / 1e6:.1f} MB are saved by other graphs" if reserved else "")
        + ". Raise the budget, or make the batch smaller"
    )
    error.smallest_mb = float(_round_up_mb(smallest))
    return error


def _round_up_mb(size: float) -> str:
    return f"{math.ceil(size / 1e5) / 10:.1f}"
