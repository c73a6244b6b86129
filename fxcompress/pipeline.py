"""The pipeline: capture → analyse → plan → rewrite, as the partitioner that AOTAutograd calls."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx

from fxcompress import __version__, artefacts, report, torch_private, trial
from fxcompress.decision import Baseline, Decision, baseline, leave_alone, reason_to_leave
from fxcompress.describe import describe
from fxcompress.errors import BudgetError, SettingsError
from fxcompress.evidence import Calibration, TensorEvidence, signature
from fxcompress.fusion import takes_memory
from fxcompress.kernels import ahead
from fxcompress.ledger import Ledger
from fxcompress.lifetimes import located
from fxcompress.lowering import lowered, of_mask
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate, analyse
from fxcompress.passes.booleans import masks_as_bytes
from fxcompress.passes.capture import CaptureError, Cut, pair
from fxcompress.passes.decodes import share_decodes
from fxcompress.passes.pieces import exact_pieces
from fxcompress.passes.products import keep_products
from fxcompress.passes.realise import realise_sums
from fxcompress.passes.rebase import rebase
from fxcompress.passes.recompute import recompute
from fxcompress.passes.rewrite import KEEP, rewrite
from fxcompress.passes.settle import settle
from fxcompress.plan import Plan
from fxcompress.planner import Given, make_plan
from fxcompress.policies import policy
from fxcompress.record import Recording
from fxcompress.settings import Settings

log = logging.getLogger("fxcompress")

TRIALS = 3  # plans made for one graph, each with the prices that the last one's trial put right

_Modules = tuple[fx.GraphModule, fx.GraphModule]


class Partitioner(torch_private.partitioner_base()):  # type: ignore[misc]
    """Splits a joint graph as plain Inductor does, then compresses what passes between the parts.

    Attributes:
        settings: what the user asked for.
        ledger: saved bytes of the model's other graphs, which count against the same budget.
        plans: plan of each graph partitioned by this instance, by plan key.
        planned: what was decided last, where plans are to be made again (``replan_every``, or
            several graphs under one budget).
        role: of the graph that is partitioned next.
        recorded: gives a step of it to try the plan on (fxcompress/trial.py); None: not tried.
        calibration: what that was put right to; None: as in the settings.
    """

    def __init__(self, settings: Settings, ledger: Ledger | None = None) -> None:
        self.settings = settings
        self.ledger = ledger or Ledger(repeats=settings.repeats)
        self.plans: dict[str, None] = {}
        self.planned: Planned | None = None
        self.role = Role()
        self.recorded: Callable[[], Sequence[Recording]] | None = None
        self.calibration: Calibration | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Partitioner:
        return self  # Inductor copies its settings, this one among them, to make a cache key,

    def __getstate__(self) -> dict[str, str]:
        return {"key": self.key()}  # and pickles them: what steers a plan, and nothing else

    def uuid(self) -> str | None:
        """Part of the on-disk cache key: a graph built under another plan is never returned.

        None, and nothing is cached, where plans are to be made again: that takes the graphs.
        """
        return None if self.plans_again and self.role.given is None else self.key()

    @property
    def plans_again(self) -> bool:
        """Graphs are partitioned anew in every process (torch_private.autograd_cache_off)."""
        return self.settings.replan_every is not None or self.role.is_part

    @property
    def settings_in_force(self) -> Settings:
        """The settings, with the measurements that the last plan was made by."""
        if self.calibration is None:
            return self.settings
        return replace(self.settings, calibration=self.calibration)

    def key(self) -> str:
        """A plan follows from the joint graph and from these."""
        if (given := self.role.given) is not None:
            # Made already: measurements, and other graphs, had their say.
            parts = (replace(self.settings, calibration=None).key(), given.key())
        else:
            parts = (self.settings.key(), self.ledger.key())
        return "|".join(("fxcompress", __version__, _SOURCES, *parts))

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> _Modules:
        """Partition ``gm`` (see ``CustomPartitionerFn``).

        Raises:
            BudgetError: no plan keeps the step's peak under the budget.
            SettingsError: the policy cannot be used here.
        """
        static = kwargs.get("static_lifetime_input_indices") or ()
        _change_inductor()
        plain = torch_private.min_cut(gm, joint_inputs, **kwargs)
        if not policy(self.settings.policy).enabled:
            return plain
        try:
            cut = pair(*plain, kwargs["num_fwd_outputs"], static)
            compressed = self._compress(cut.copy())
            artefacts.show_graphs(next(reversed(self.plans)), plain, compressed)
            return compressed or plain
        except (BudgetError, SettingsError):
            raise
        except CaptureError as error:
            self._declined(f"left as plain Inductor: {error}")
        except Exception as error:
            log.exception("left as plain Inductor: a pass failed; please report this")
            self._declined(f"left as plain Inductor: a pass failed ({error!r})")
        return plain

    def _compress(self, cut: Cut) -> _Modules | None:
        """The two graphs of the plan, made from ``cut`` in place; None to leave all as it was."""
        found = self._plan(cut)
        key = report.store(found.plan)
        again = self.plans_again and (found.decision is not None or self.role.is_part)
        planned = self._unchanged(found) if again else None
        if found.decision is None:
            self._record(key, found.plan)
            self.planned = planned
            return None
        rewritten = rewrite(
            found.cut,
            found.decision.choices,
            key,
            channels_last=found.channels_last,
            inlines_mask=self._inlines_mask,
        )
        for_inductor = self.settings.inner == "inductor"
        if for_inductor:  # first: a fence would look like a call that wants booleans
            masks_as_bytes(rewritten)
        share_decodes(rewritten, channels_last=found.channels_last)
        if for_inductor:
            settle(rewritten, channels_last=found.channels_last)
            keep_products(rewritten)
            realise_sums(rewritten)
        # Not earlier: what could not be carried out is no plan.
        self._record(key, found.plan)
        self.planned = planned
        ahead.build_for((rewritten.forward, rewritten.backward))
        return rewritten.forward, rewritten.backward

    def _plan(self, cut: Cut) -> Planned:
        """The plan of the graph; one with measured prices is tried before it is trusted."""
        settings = self.settings
        reserved, plain = self.ledger.reserved(), self.ledger.reserved_plain()
        recordings: Sequence[Recording] | None = None
        for last in (False,) * (TRIALS - 1) + (True,):
            found = plan_graph(cut.copy(), settings, reserved, plain, self.role)
            if self.recorded is None or not _is_worth_a_trial(found, settings, self.role):
                break
            if recordings is None:
                recordings = self.recorded()
            outcome = tried(found, settings, recordings)
            if outcome is None:
                break
            found = replace(found, plan=replace(found.plan, tried_variance=outcome.measured))
            if outcome.evidence is None:
                break
            if last:
                log.warning(
                    "gradients are off by %.3g of their squared norm, not by %.3g as predicted, "
                    "after %d plans: see fxcompress.check(model, batch)",
                    *(outcome.measured, outcome.predicted, TRIALS),
                )
                break
            assert settings.calibration is not None
            name = signature(found.cut)
            self.calibration = settings.calibration.corrected(name, outcome.evidence)
            settings = replace(settings, calibration=self.calibration)
        return found

    def _inlines_mask(self, spec: str, node: fx.Node) -> bool:
        value, readers = prop.value(node), list(node.users)
        return of_mask(spec, value, readers, self.settings.lowering) == "inductor"

    def _unchanged(self, found: Planned) -> Planned:
        """The same on graphs that stay as they are when these are rewritten."""
        cut = found.cut.copy()
        min_bytes, channels_last = self.settings.min_bytes, found.channels_last
        candidates = analyse(cut, min_bytes, channels_last=channels_last)
        return replace(found, cut=cut, candidates=candidates)

    def _declined(self, note: str) -> None:
        """Record a graph that is compiled as plain Inductor would, and why."""
        log.info("%s", note)
        plan = Plan(self.settings.policy, self.settings.budget_mb, (), 0, 0, note)
        self._record(report.store(plan), plan)

    def _record(self, key: str, plan: Plan) -> None:
        """Count a stored plan as one that is carried out."""
        log.info("%s", plan)
        self.ledger.record(key)
        self.plans[key] = None
        artefacts.show_plan(key, plan)


@cache
def _change_inductor() -> None:
    """From now on Inductor's C++ kernels for our graphs are compiled together, the code that it
    writes calls our functions directly, and loops that this takes memory for are not joined."""
    from fxcompress.direct import call_directly
    from fxcompress.together import ask_us  # imports much of Inductor

    torch_private.change_output_code(Partitioner, lambda code: call_directly(ask_us(code)))
    torch_private.keep_apart(Partitioner, takes_memory)


def may_be_tried(settings: Settings) -> bool:
    """Plans are solved for within a bound, by prices that a trial could put right."""
    return settings.is_bounded and policy(settings.policy).solves


def _is_worth_a_trial(found: Planned, settings: Settings, role: Role) -> bool:
    """The plan was made by measured prices, and has noise that they could be wrong about."""
    if role.given is not None or not may_be_tried(settings):
        return False
    return found.plan.calibrated and found.plan.predicted_variance > 0


def tried(
    found: Planned, settings: Settings, recordings: Sequence[Recording]
) -> trial.Outcome | None:
    """What the plan does to the recorded step of its graph; None if there is none."""
    name = signature(found.cut)
    recording = next((r for r in recordings if signature(r.cut) == name), None)
    evidence = None if settings.calibration is None else settings.calibration.of(name)
    if recording is None or evidence is None or found.decision is None:
        return None
    try:
        with torch_private.outside_compile():
            return trial.attempt(recording, found.decision.choices, evidence)
    except Exception as error:  # never the reason why a training does not start
        log.warning("the plan is not tried on the first batch: %s", error)
        return None


@dataclass(frozen=True)
class Role:
    """What a graph is within its model.

    Attributes:
        is_part: others share the budget with it, and their plans will be made together.
        is_early: others will come after it: until they are known it leaves them what it can.
        given: its choices, if they are made.
    """

    is_part: bool = False
    is_early: bool = False
    given: Given | None = None


def shares_a_budget(settings: Settings) -> bool:
    """Graphs of one model are to be planned together: one bound, and a plan that is solved for."""
    is_bounded = settings.budget_mb is not None or settings.ratio is not None
    solves = policy(settings.policy).solves and settings.plan is None
    return is_bounded and solves and settings.replan_every is None


@dataclass(frozen=True)
class Planned:
    """What is to become of one graph.

    Attributes:
        cut: the graphs that the decision is about.
        decision: None where the graph is left as it was.
        plan: for the report.
        channels_last: Inductor will lay feature maps out with channels fastest.
        candidates: its saved tensors; empty where it is left as it was for good.
        plain: what plain Inductor needs.
        reserved: bytes that the model's other graphs keep saved meanwhile.
    """

    cut: Cut
    decision: Decision | None
    plan: Plan
    channels_last: bool
    candidates: tuple[Candidate, ...]
    plain: Baseline
    reserved: int


def plan_graph(
    cut: Cut,
    settings: Settings,
    reserved: int = 0,
    reserved_plain: int = 0,
    role: Role = Role(),
) -> Planned:
    """Plan one graph, changing ``cut``.

    Args:
        reserved, reserved_plain: see :func:`fxcompress.decision.baseline`.
        role: of the graph within its model.

    Raises:
        BudgetError: no plan keeps the step's peak under the budget.
        SettingsError: the policy cannot be used here.
    """
    lays_out = settings.inner == "inductor"
    channels_last = lays_out and torch_private.prefers_channels_last(cut.forward)
    cut = rebase(cut)
    if role.given is not None:
        reserved, reserved_plain = role.given.reserved, role.given.reserved_plain
    others = (reserved, reserved_plain)
    plain = baseline(
        cut, settings.min_bytes, *others, channels_last=channels_last, repeats=settings.repeats
    )
    if not plain.candidates:
        note = "left as plain Inductor: nothing is saved for the backward"
        log.info("%s", note)
        empty = Plan(settings.policy, settings.budget_mb, (), 0, 0, note)
        return Planned(cut, None, empty, channels_last, (), plain, reserved)
    note = "" if role.given else reason_to_leave(plain, settings, is_early=role.is_early)
    left = describe(leave_alone(plain, note), plain, settings) if note else None
    if left is not None and not role.is_part:
        return Planned(cut, None, left, channels_last, (), plain, reserved)
    cut = exact_pieces(recompute(cut, settings.min_bytes))
    candidates = analyse(cut, settings.min_bytes, channels_last=channels_last)
    if left is not None:
        return Planned(cut, None, left, channels_last, candidates, plain, reserved)
    evidence = _evidence(cut, settings)
    decision = make_plan(
        cut,
        candidates,
        plain,
        settings,
        reserved,
        channels_last=channels_last,
        evidence=evidence,
        is_early=role.is_early,
        given=role.given,
    )
    choices = lowered(decision.choices, settings.lowering)
    decision = replace(decision, choices=choices)
    plan = located(describe(decision, plain, settings, evidence), cut)
    if all(tensor.representation == KEEP for tensor in plan.tensors):
        unchanged = replace(plan, note="nothing to gain", planned_peak_bytes=plain.peak)
        return Planned(cut, None, unchanged, channels_last, candidates, plain, reserved)
    return Planned(cut, decision, plan, channels_last, candidates, plain, reserved)


def _evidence(cut: Cut, settings: Settings) -> Mapping[str, TensorEvidence] | None:
    """What calibration measured on this graph; None, with a reason logged, if nothing."""
    if settings.calibration is None:
        return None
    found = settings.calibration.of(signature(cut))
    if found is None:
        log.warning("the calibration does not cover this graph: was it made on this model?")
    return found


def _sources_hash() -> str:
    """Hash of the package's own sources: another version of a pass is another plan."""
    import fxcompress.passes

    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(fxcompress.passes.__path__[0])):
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp")]):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_SOURCES = _sources_hash()  # of the sources that are loaded, not of later edits
