"""Describe: a decision as data for the report, a row for each tensor that plain Inductor saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fxcompress.choose import bytes_of, mask_bytes
from fxcompress.codecs import codec
from fxcompress.decision import Baseline, Decision
from fxcompress.evidence import TensorEvidence
from fxcompress.ladder import cost
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import KEEP, RECOMPUTE, Choice
from fxcompress.plan import Alternative, Plan, TensorPlan
from fxcompress.policies import policy
from fxcompress.program import Option
from fxcompress.provenance import module_path, source_line
from fxcompress.settings import Settings


def describe(
    decision: Decision,
    plain: Baseline,
    settings: Settings,
    evidence: Mapping[str, TensorEvidence] | None = None,
) -> Plan:
    """The decision as data for the report: a row for each tensor that plain Inductor saves.

    Args:
        evidence: what calibration measured, by tensor name: says how biased a biased codec is.
    """
    masks = mask_bytes(decision.choices)
    chosen = {c.candidate.name: c for c in decision.choices}
    before = {c.name: c.storage_bytes for c in plain.candidates}
    kept = _why_kept(settings.policy)

    noises = {n: _noise_of(c, decision, (evidence or {}).get(n)) for n, c in chosen.items()}
    passed_on = {n: _passed_on(c, decision, noises[n]) for n, c in chosen.items()}

    def row(name: str, size: int) -> TensorPlan:
        options = decision.ladders.get(name, ())
        found = _row(chosen[name], masks, size, noises[name], options, kept)
        return _with_noise_of_roots(found, passed_on, decision)

    rows = [
        row(c.name, c.storage_bytes) if c.name in chosen else _rebuilt(c) for c in plain.candidates
    ]
    # Statistics that a recomputation needs are saved although plain Inductor does not.
    rows += [row(name, 0) for name in chosen if name not in before]
    return Plan(
        policy=settings.policy,
        budget_mb=settings.budget_mb,
        tensors=tuple(_with_bias(row, (evidence or {}).get(row.name)) for row in rows),
        plain_peak_bytes=plain.whole_peak,
        planned_peak_bytes=decision.planned_peak,
        released_peak_bytes=decision.released_peak,
        note=decision.note,
        calibrated=decision.calibrated,
        timeline=decision.timeline,
        gap=decision.gap,
        slowdown=decision.slowdown,
    )


def _why_kept(name: str) -> str:
    """Of a tensor that could have been coded, and was not."""
    if policy(name).solves:
        return "the noise or time of coding it would outweigh its bytes under this bound"
    return f"read for its values, which policy {name} leaves as they are"


def _noise_of(choice: Choice, decision: Decision, evidence: TensorEvidence | None) -> float | None:
    """What the choice adds, as the planner took it or as measured; None if nobody weighed it."""
    spec = choice.codec_spec
    if spec is None or codec(spec).lossless:
        return 0.0
    option = _on_ladder(choice, decision)
    if option is not None:
        return option.noise
    # A policy may take a codec that others beat in both bytes and noise.
    measured = evidence.prices.get(spec) if evidence is not None else None
    return None if measured is None else cost(measured)


def _passed_on(choice: Choice, decision: Decision, noise: float | None) -> float | None:
    """What counts of its noise in tensors that are rebuilt from it (see Option.passing)."""
    option = _on_ladder(choice, decision)
    return noise if noise is None or option is None else option.passing * noise


def _on_ladder(choice: Choice, decision: Decision) -> Option | None:
    options = decision.ladders.get(choice.candidate.name, ())
    return next((o for o in options if o.choice.representation == choice.representation), None)


def _with_noise_of_roots(
    row: TensorPlan, known_noises: Mapping[str, float | None], decision: Decision
) -> TensorPlan:
    """What noise of coded tensors does through one that is rebuilt from them."""
    if row.representation != RECOMPUTE:
        return row
    passes = [p for o in decision.ladders.get(row.name, ()) for p in o.passes]
    noises = [(share, known_noises[root]) for root, share in passes]
    known = [share * noise for share, noise in noises if noise is not None]
    return replace(row, predicted_variance=sum(known) if len(known) == len(noises) else None)


def _with_bias(row: TensorPlan, evidence: TensorEvidence | None) -> TensorPlan:
    spec = row.representation
    if "(" not in spec or codec(spec).unbiased:
        return row
    price = evidence.prices.get(spec) if evidence is not None else None
    return replace(row, biased=True, predicted_bias=None if price is None else price.bias)


def _rebuilt(candidate: Candidate) -> TensorPlan:
    row = _row(Choice(candidate, KEEP), {}, candidate.storage_bytes, 0.0)
    steps = f"{len(candidate.recompute)} steps" if candidate.recompute else "pointwise steps"
    reason = f"rebuilt by {steps} from another saved tensor"
    return replace(row, representation=RECOMPUTE, bytes_after=0, reason=reason)


def _row(
    choice: Choice,
    masks: dict[str, int],
    before: int,
    noise: float | None,
    options: Sequence[Option] = (),
    why_kept: str = "",
) -> TensorPlan:
    candidate = choice.candidate
    node, fake = candidate.saved.forward, candidate.fake
    steps = candidate.recipe.steps if candidate.recipe is not None else candidate.recompute
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
        recompute=tuple(prop.op_name(n) for n in steps),
        representation=choice.representation,
        bytes_after=bytes_of(choice, masks),
        reason=choice.reason or (why_kept if choice.representation == KEEP else ""),
        predicted_variance=noise,
        lowering=choice.lowering,
        alternatives=tuple(
            Alternative(o.choice.representation, bytes_of(o.choice, {}), o.noise) for o in options
        ),
    )
