"""Load plan: a saved plan, edited by hand perhaps, becomes the choices for a graph again.

A tensor finds its row by name, module and operator; sizes may differ, so that a plan serves another
batch size. A plan of several graphs holds the rows of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxcompress.choose import (
    codable_choice,
    exact_choice,
    is_codable,
    offload_choice,
    recompute_choice,
    why_not_offload,
)
from fxcompress.codecs import codec
from fxcompress.errors import CodecError, SettingsError
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import KEEP, MASKS, OFFLOAD, RECOMPUTE, SHAPE, Choice
from fxcompress.plan import Plan, TensorPlan
from fxcompress.provenance import module_path


def choices_of(
    plan: Plan, candidates: Sequence[Candidate], rebuilt: Sequence[Candidate] = ()
) -> tuple[Choice, ...]:
    """What ``plan`` says of every candidate.

    Args:
        plan: see above.
        candidates: saved tensors of one graph.
        rebuilt: tensors of plain Inductor that are rebuilt from others and not saved.

    Raises:
        SettingsError: the plan is of another graph, or asks for what a tensor cannot have.
    """
    rows = _Rows(plan)
    found = [rows.of(c) for c in candidates]
    others = [rows.of(c) for c in rebuilt]
    if plan.graphs == 1:
        known = {c.name for c in (*candidates, *rebuilt)}
        extra = [t.name for t in plan.tensors if t.name not in known]
        if extra:
            raise SettingsError(
                f"the plan has tensors that this graph does not save: {_some(extra)}; is it a plan "
                "of this model, made with this version of PyTorch?"
            )
    for row in others:
        if row.representation != RECOMPUTE:
            raise SettingsError(
                f"{_of(row)}: the tensor is rebuilt from another saved tensor; leave it "
                f"{RECOMPUTE!r}"
            )
    return tuple(_choice(c, row) for c, row in zip(candidates, found, strict=True))


def leaves_alone(plan: Plan, plain: Sequence[Candidate]) -> bool:
    """The plan keeps all that plain Inductor saves in this graph.

    Raises:
        SettingsError: the plan is of another graph.
    """
    rows = [_Rows(plan).of(c) for c in plain]
    return all(row.representation == KEEP for row in rows)


@dataclass(frozen=True)
class _Rows:
    plan: Plan

    def of(self, candidate: Candidate) -> TensorPlan:
        """The one row about this tensor."""
        named = [t for t in self.plan.tensors if t.name == candidate.name]
        where = module_path(candidate.saved.forward)
        if not named:
            raise SettingsError(
                f"the plan has no tensor {candidate.name} ({where}), "
                f"which this graph saves; it has {_some([t.name for t in self.plan.tensors])}. Was "
                "it made for this model, with these min_bytes?"
            )
        identity = (where, prop.op_name(candidate.saved.forward))
        rows = [t for t in named if (t.module, t.op) == identity]
        if not rows:
            raise SettingsError(
                f"{_of(named[0])} comes from {named[0].module or 'the root'} ({named[0].op}), in "
                f"this graph {candidate.name} comes from {identity[0] or 'the root'} "
                f"({identity[1]}): the plan is of another model"
            )
        dtype, shape = str(candidate.fake.dtype), tuple(map(str, candidate.fake.shape))
        fitting = [t for t in rows if t.dtype == dtype and len(t.shape) == len(shape)]
        if not fitting:
            raise SettingsError(
                f"{_of(rows[0])} has {len(rows[0].shape)} dimensions of {rows[0].dtype}, in this "
                f"graph it has {len(shape)} of {dtype}"
            )
        exact = [t for t in fitting if tuple(map(str, t.shape)) == shape] or fitting
        if len({t.representation for t in exact}) > 1:
            raise SettingsError(
                f"several graphs of the plan have a tensor {candidate.name} from "
                f"{identity[0] or 'the root'}, with different representations: make them alike"
            )
        return exact[0]


def _choice(candidate: Candidate, row: TensorPlan) -> Choice:
    spec = row.representation
    exact = exact_choice(candidate)
    if spec == KEEP:
        return Choice(candidate, KEEP, row.reason)
    if spec == RECOMPUTE:
        choice = recompute_choice(candidate)
        if choice is None:
            raise SettingsError(
                f"{_of(row)}: nothing rebuilds this tensor; write {KEEP!r} or a codec"
            )
        return choice
    if spec == OFFLOAD:
        choice = offload_choice(candidate)
        if choice is None:
            raise SettingsError(
                f"{_of(row)} cannot wait in host memory, {why_not_offload(candidate)}; "
                f"write {KEEP!r} or a codec"
            )
        return choice
    if spec == exact.representation:
        return Choice(candidate, spec, row.reason)
    if spec in {MASKS, SHAPE}:
        raise SettingsError(
            f"{_of(row)} cannot be {spec!r}, {exact.reason or candidate.keep}; write "
            f"{exact.representation!r} or a codec"
        )
    try:
        spec = codec(spec).spec
        choice = codable_choice(candidate, spec)
    except CodecError as error:
        raise SettingsError(f"{_of(row)}: {error}") from None
    if not is_codable(candidate):
        why = candidate.keep or exact.reason or "its readers need it exactly"
        raise SettingsError(
            f"{_of(row)}: the tensor cannot be {spec}, {why}; write {exact.representation!r}"
        )
    if choice.representation not in {spec, KEEP}:
        raise SettingsError(
            f"{_of(row)}: {choice.reason}, so {spec} has too few bits; write "
            f"{choice.representation!r} or more bits"
        )
    # A codec that saves nothing at this batch size comes back as "keep", with that reason.
    return Choice(candidate, choice.representation, choice.reason or row.reason)


def _of(row: TensorPlan) -> str:
    return f"the plan's tensor {row.name}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
