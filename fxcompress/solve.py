"""Solve: the mixed-integer program behind ``policy="auto"``, on SciPy's HiGHS.

One binary variable for each (tensor, representation), one continuous variable in [0, 1] for each
hoisted mask, which is at least as large as every choice that needs it. Memory is linear in these at
every position of the step, so "the peak stays under the budget" is one row a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import fx

from fxcompress.choose import bytes_of
from fxcompress.errors import FxCompressError
from fxcompress.passes import properties as prop
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.peak import Timeline

GAP = 0.005  # relative optimality gap at which the solver may stop
SECONDS = 5.0

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One representation of one tensor and the noise it adds (see planner.noise)."""

    choice: Choice
    noise: float


@dataclass(frozen=True)
class Program:
    """The program without its limits: columns are options, then masks.

    Attributes:
        options: all options, tensor by tensor.
        memory: bytes at each undominated position, by column.
        base: bytes there that no column changes.
        sizes: saved bytes by column.
        rules: exactly one option a tensor; masks where needed; one buffer coded or kept whole.
    """

    options: tuple[Option, ...]
    memory: Array
    base: Array
    sizes: Array
    rules: tuple[LinearConstraint, ...]


def build(ladders: Sequence[Sequence[Option]], step: Timeline) -> Program:
    """The program for tensors with these options on this timeline."""
    options = tuple(option for ladder in ladders for option in ladder)
    masks = list(step.masks)
    columns = [step.of(o.choice) for o in options] + [step.masks[m] for m in masks]
    memory = np.stack(columns, axis=1)
    rows = _undominated(memory, step.base)
    sizes = [float(bytes_of(o.choice, {})) for o in options]
    sizes += [float(step.mask_payload[m]) for m in masks]
    width = len(columns)
    rules = [
        _one_each(ladders, width),
        *_mask_rules(options, masks, width),
        *_storage_rules(options, width),
    ]
    return Program(options, memory[rows], step.base[rows], np.array(sizes), tuple(rules))


def least_noise(
    program: Program, peak: float | None = None, saved: float | None = None
) -> tuple[Choice, ...] | None:
    """Choices with the least noise within ``peak`` bytes at every position and ``saved`` bytes in
    all; None if there are none. Among equally noisy plans, the smaller one."""
    limits = list(program.rules)
    if peak is not None:
        limits.append(LinearConstraint(program.memory, -np.inf, peak - program.base))
    if saved is not None:
        limits.append(LinearConstraint(program.sizes[None], -np.inf, saved))
    cost = np.zeros(len(program.sizes))
    cost[: len(program.options)] = [o.noise for o in program.options]
    return _choices(program, _run(cost + _tie_break(program, cost), limits, program))


def least_peak(program: Program) -> tuple[Choice, ...]:
    """Choices with the lowest modelled peak."""
    width = len(program.sizes)
    scale = max(float(program.base.max(initial=0.0) + program.memory.max(initial=0.0)), 1.0)
    height = -np.ones((len(program.base), 1))
    limits = [
        LinearConstraint(np.hstack([rule.A, np.zeros((rule.A.shape[0], 1))]), rule.lb, rule.ub)
        for rule in program.rules
    ]
    above = np.hstack([program.memory / scale, height])
    limits.append(LinearConstraint(above, -np.inf, -program.base / scale))
    cost = np.zeros(width + 1)
    cost[-1] = 1.0
    found = _choices(program, _run(cost, limits, program, free=1))
    if found is None:
        raise FxCompressError("the solver found no plan at all; please report this model")
    return found


def least_saved(program: Program) -> tuple[Choice, ...]:
    """Choices that save the fewest bytes."""
    scale = max(float(program.sizes.max(initial=1.0)), 1.0)
    found = _choices(program, _run(program.sizes / scale, list(program.rules), program))
    if found is None:
        raise FxCompressError("the solver found no plan at all; please report this model")
    return found


def _run(
    cost: Array, limits: list[LinearConstraint], program: Program, free: int = 0
) -> Array | None:
    binary, width = len(program.options), len(cost)
    integrality = np.zeros(width)
    integrality[:binary] = 1
    upper = np.ones(width)
    upper[width - free :] = np.inf
    result = milp(
        cost,
        integrality=integrality,
        bounds=Bounds(0, upper),
        constraints=limits,
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    return None if result.x is None else np.asarray(result.x)


def _choices(program: Program, solution: Array | None) -> tuple[Choice, ...] | None:
    if solution is None:
        return None
    return tuple(
        option.choice
        for option, taken in zip(program.options, solution, strict=False)
        if taken > 0.5
    )


def _tie_break(program: Program, cost: Array) -> Array:
    """So small that it never outweighs a difference in noise that matters."""
    smallest = min((c for c in cost if c > 0), default=1.0)
    total = max(float(program.sizes.sum()), 1.0)
    return program.sizes / total * smallest * 1e-2


def _one_each(ladders: Sequence[Sequence[Option]], width: int) -> LinearConstraint:
    matrix = np.zeros((len(ladders), width))
    column = 0
    for row, ladder in enumerate(ladders):
        matrix[row, column : column + len(ladder)] = 1
        column += len(ladder)
    return LinearConstraint(matrix, 1, 1)


def _mask_rules(
    options: Sequence[Option], masks: Sequence[fx.Node], width: int
) -> list[LinearConstraint]:
    """mask ≥ option, for each option that drops the values the mask was computed from."""
    rows = []
    for j, mask in enumerate(masks):
        for i, option in enumerate(options):
            if option.choice.drops_values and mask in option.choice.candidate.exact:
                row = np.zeros(width)
                row[len(options) + j], row[i] = 1, -1
                rows.append(row)
    return [LinearConstraint(np.stack(rows), 0, np.inf)] if rows else []


def _storage_rules(options: Sequence[Option], width: int) -> list[LinearConstraint]:
    """Views of one buffer are all kept or all coded: one kept view keeps the whole buffer."""
    kept: dict[fx.Node, dict[str, list[int]]] = {}
    for i, option in enumerate(options):
        candidate = option.choice.candidate
        views = kept.setdefault(prop.storage_root(candidate.saved.forward), {})
        columns = views.setdefault(candidate.name, [])
        if option.choice.representation == KEEP:
            columns.append(i)
    rows = []
    for views in kept.values():
        first, *others = views.values()
        for other in others:
            row = np.zeros(width)
            row[first] += 1
            row[other] -= 1
            rows.append(row)
    return [LinearConstraint(np.stack(rows), 0, 0)] if rows else []


def _undominated(memory: Array, base: Array) -> npt.NDArray[np.int64]:
    """Positions whose row is not below another's in every column: the only ones that can bind."""
    rows = np.hstack([memory, base[:, None]])
    order = np.argsort(-rows.sum(axis=1), kind="stable")
    kept: list[int] = []
    for i in order:
        if not kept or not bool((rows[kept] >= rows[i]).all(axis=1).any()):
            kept.append(int(i))
    return np.array(sorted(kept))
