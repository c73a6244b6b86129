"""Solve: the mixed-integer program behind ``policy="auto"``, on SciPy's HiGHS.

"The peak stays under the budget" is one row a position of the step. Few of them bind, so rows are
added as they are needed: solve the relaxed program, look at the memory of the whole step, add the
positions that are too high, until none is. The relaxed plan splits only as many tensors as rows
bind; rounded, it is often near enough to the bound that it gives. Where it is not, options whose
reduced cost exceeds what is left to win are dropped, and the rest is a small program in integers.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp

from fxcompress import greedy
from fxcompress.errors import FxCompressError
from fxcompress.passes.rewrite import Choice
from fxcompress.program import Array, Flags, Option, Program, build

__all__ = ["Option", "Program", "Solution", "build", "least_noise", "least_peak", "least_saved"]

GAP = 0.005  # relative optimality gap at which the solver may stop
SECONDS = 5.0  # for one program; the best plan found by then is taken
ROWS = 24  # added in one round
TOLERANCE = 1e-6  # of HiGHS, on rows scaled to 1
TIE = 1e-4  # of the cost may be added to save all bytes


@dataclass(frozen=True)
class Solution:
    """One option for each tensor.

    Attributes:
        gap: by how much, relatively, the objective may still be above the best; None where the
            solver ran out of time before it knew.
        noise: of the choices together.
    """

    choices: tuple[Choice, ...]
    gap: float | None
    noise: float


@dataclass(frozen=True)
class _Task:
    """What is asked of a program.

    Attributes:
        cost: by column, to be minimised; None: the peak is.
        limit: (bytes or noise by column, bound of its sum).
        peak: bound at every position.
        excluded: by column, may not be taken.
        deadline: on the monotonic clock.
    """

    program: Program
    cost: Array | None
    limit: tuple[Array, float] | None
    peak: float | None
    excluded: Flags
    deadline: float

    def value(self, taken: Array) -> float:
        if self.cost is not None:
            return float(self.cost @ taken)
        return float(self.program.total(taken).max(initial=0.0))

    def allows(self, taken: Array) -> bool:
        """The plan follows the rules, keeps to the limits and takes nothing that is excluded."""
        if taken[self.excluded].any():
            return False
        if self.limit is not None and self.limit[0] @ taken > self.limit[1]:
            return False
        if not _is_lawful(self.program, taken):
            return False
        return self.peak is None or self.program.total(taken).max(initial=0.0) <= self.peak

    @property
    def scale(self) -> float:
        """Bytes of the order of the peak, which rows are divided by."""
        return max(self.program.base.max(initial=0.0), self.peak or self.program.sizes.sum(), 1.0)


@dataclass(frozen=True)
class _Found:
    """A plan, if any, and its gap; ``infeasible`` if there is none."""

    taken: Array | None
    gap: float | None = None
    infeasible: bool = False


def least_noise(
    program: Program,
    peak: float | None = None,
    saved: float | None = None,
    seconds: float = SECONDS,
) -> Solution | None:
    """Choices that cost least, in noise and time, within ``peak`` bytes at every position and
    ``saved`` bytes in all; None if there are none. At no cost if possible, then the smaller."""
    limit = None if saved is None else (program.sizes, saved)
    costly = program.cost > 0
    task = _Task(program, program.sizes, limit, peak, costly, time.monotonic() + seconds)
    found = _minimise(task, None)
    if found.taken is None and costly.any():
        start = greedy.within(program, peak=peak, saved=saved)
        worst = float(program.cost @ start if start is not None else program.cost.max()) or 1.0
        cost = program.cost + TIE * worst / max(program.sizes.sum(), 1.0) * program.sizes
        task = replace(task, cost=cost / worst, excluded=program.cost > worst)
        found = _minimise(task, start)
    return None if found.taken is None else _solution(program, found)


def least_peak(
    program: Program, noise: float | None = None, seconds: float = SECONDS
) -> Solution | None:
    """Choices with the lowest modelled peak and at most this much noise in all; None if there are
    none. Among equally high plans, the least noisy one."""
    deadline = time.monotonic() + seconds
    nothing = np.zeros(len(program.sizes), bool)
    if noise is None:
        task = _Task(program, None, None, None, nothing, deadline)
    else:
        noise *= 1 + 1e-9
        task = _Task(program, None, (program.noise, noise), None, program.noise > noise, deadline)
    found = _minimise(task, None)
    if found.taken is None and not found.infeasible:
        found = _Found(greedy.lowest(program, noise))
    if found.taken is None:
        return None
    best = _solution(program, found)
    left = deadline - time.monotonic()
    quieter = least_noise(program, peak=task.value(found.taken), seconds=left)
    if quieter is None or quieter.noise > best.noise:
        return best
    return replace(quieter, gap=best.gap)


def least_saved(
    program: Program,
    peak: float | None = None,
    noise: float | None = None,
    seconds: float = SECONDS,
) -> Solution | None:
    """Choices that save the fewest bytes, within ``peak`` bytes at every position and with at most
    this much noise in all; None if there are none."""
    limit = None if noise is None else (program.noise, noise * (1 + 1e-9))
    too_noisy = np.zeros(len(program.sizes), bool) if noise is None else program.noise > noise
    deadline = time.monotonic() + seconds
    found = _minimise(_Task(program, program.sizes, limit, peak, too_noisy, deadline), None)
    if found.taken is not None:
        return _solution(program, found)
    if found.infeasible or peak is not None or noise is not None:
        return None
    raise FxCompressError("the solver found no plan at all; please report this model")


def _minimise(task: _Task, start: Array | None) -> _Found:
    """The best plan; ``start`` is one to begin with."""
    program = task.program
    whole = program.total(np.where(task.excluded, 0.0, 1.0))
    positions = _too_high(whole, task.peak or 0.0) if task.peak or task.cost is None else []
    if any(_is_hopeless(task, p) for p in positions[:3]):
        return _Found(start, infeasible=start is None)
    while True:
        relaxed = _relaxed(task, positions)
        if relaxed is None or relaxed.x is None:
            stopped = relaxed is None or relaxed.status != 2
            return _Found(start, None, infeasible=not stopped and start is None)
        taken = np.asarray(relaxed.x)[: len(program.sizes)]
        if not (new := _new_positions(task, taken, positions)):
            break
        positions += new
    best = _better(task, start, _round(task, taken))
    bound = float(relaxed.fun) * (1.0 if task.cost is not None else task.scale)
    if best is not None and (gap := _gap(task.value(best), bound)) <= GAP:
        return _Found(best, gap)
    excluded = task.excluded
    if best is not None:
        reduced = np.asarray(relaxed.lower.marginals)[: len(program.sizes)]
        left = (task.value(best) - bound) / (1.0 if task.cost is not None else task.scale)
        excluded = excluded | ((reduced > left * (1 + TOLERANCE)) & (best < 0.5))
    return _in_integers(replace(task, excluded=excluded), positions, best, bound)


def _in_integers(task: _Task, positions: list[int], best: Array | None, bound: float) -> _Found:
    """The best plan in whole numbers, at least as good as ``best``."""
    tight = task.peak
    while True:
        result = _whole(replace(task, peak=tight), positions)
        if result is None or result.x is None:
            infeasible = result is not None and result.status == 2 and best is None
            gap = None if best is None else _gap(task.value(best), bound)
            return _Found(best, gap, infeasible)
        taken = _settled(task.program, np.asarray(result.x)[: len(task.program.sizes)])
        new = _new_positions(replace(task, peak=tight), taken, positions)
        if new:
            positions = positions + new
        elif not task.allows(taken) and tight is not None:
            # By a rounding error of the solver's: ask for that much less.
            tight -= 2 * max(float(task.program.total(taken).max()) - tight, 1.0)
        else:
            best = _better(task, best, taken)
            assert best is not None or not task.allows(taken)
            value = None if best is None else task.value(best)
            known = max(
                bound,
                float(result.mip_dual_bound or 0.0)
                * (1.0 if task.cost is not None else task.scale),
            )
            return _Found(best, None if value is None else _gap(value, known))


def _better(task: _Task, one: Array | None, other: Array | None) -> Array | None:
    fit = [plan for plan in (one, other) if plan is not None and task.allows(plan)]
    return min(fit, key=task.value, default=None)


def _gap(value: float, bound: float) -> float:
    return float(max(value - bound, 0.0) / max(abs(value), 1e-30))


def _new_positions(task: _Task, taken: Array, known: list[int]) -> list[int]:
    """Positions that are too high and not yet among the rows."""
    if task.peak is None and task.cost is not None:
        return []
    total = task.program.total(taken)
    ceiling = task.peak
    if ceiling is None:
        ceiling = float(total[known].max()) if known else 0.0
    found = _too_high(total, ceiling + 2 * TOLERANCE * task.scale)
    return [p for p in found if p not in known]


def _is_hopeless(task: _Task, position: int) -> bool:
    """The smallest options of all tensors are too high together."""
    if task.peak is None:
        return False
    count = len(task.program.options)
    row = np.where(task.excluded[:count], np.inf, task.program.row(position)[:count])
    smallest = np.minimum.reduceat(row, task.program.starts).sum()
    return bool(task.program.base[position] + smallest > task.peak)


def _too_high(total: Array, ceiling: float) -> list[int]:
    """The highest of the local maxima above the ceiling."""
    before = np.concatenate([[-np.inf], total[:-1]])
    after = np.concatenate([total[1:], [-np.inf]])
    (peaks,) = np.nonzero((total > ceiling) & (total > before) & (total >= after))
    return [int(p) for p in peaks[np.argsort(-total[peaks], kind="stable")][:ROWS]]


def _rows(task: _Task, positions: list[int]) -> tuple[sparse.csr_array, Array]:
    """(matrix, bounds) of what must not be exceeded. Without a cost, one more column: the peak."""
    program, height = task.program, int(task.cost is None)
    matrices, bounds = [], []
    if positions:
        memory = np.stack([program.row(p) for p in positions]) / task.scale
        memory = np.hstack([memory, np.full((len(positions), height), -1.0)])
        matrices.append(sparse.csr_array(memory))
        bounds.append(((task.peak or 0.0) - program.base[positions]) / task.scale)
    if task.limit is not None:
        row, bound = task.limit
        largest = max(float(row[~task.excluded].max(initial=0.0)), bound, 1e-30)
        row = np.append(np.where(task.excluded, 0.0, row), [0.0] * height)
        matrices.append(sparse.csr_array(row[None] / largest))
        bounds.append(np.array([bound / largest]))
    if not matrices:
        return sparse.csr_array((0, len(program.sizes) + height)), np.zeros(0)
    return sparse.vstack(matrices, format="csr"), np.concatenate(bounds)


def _objective(task: _Task) -> tuple[Array, Array, sparse.csr_array]:
    """(cost, upper bounds, rules) over all columns."""
    program, height = task.program, int(task.cost is None)
    cost = np.zeros(len(program.sizes)) if task.cost is None else task.cost
    cost = np.append(np.where(task.excluded, 0.0, cost), [1.0] * height)
    upper = np.append(np.where(task.excluded, 0.0, 1.0), [np.inf] * height)
    empty = sparse.csr_array((program.rules.A.shape[0], height))
    return cost, upper, sparse.hstack([program.rules.A, empty], format="csr")


def _relaxed(task: _Task, positions: list[int]) -> OptimizeResult | None:
    """The program with shares of options; None if there is no time left."""
    if (remaining := task.deadline - time.monotonic()) <= 0:
        return None
    cost, upper, rules = _objective(task)
    matrix, bounds = _rows(task, positions)
    equal = task.program.rules.lb == task.program.rules.ub
    return linprog(
        cost,
        A_ub=sparse.vstack([matrix, -rules[~equal]], format="csr"),
        b_ub=np.concatenate([bounds, -task.program.rules.lb[~equal]]),
        A_eq=rules[equal],
        b_eq=task.program.rules.lb[equal],
        bounds=np.stack([np.zeros_like(upper), upper], axis=1),
        method="highs",
        options={"time_limit": remaining},
    )


def _whole(task: _Task, positions: list[int]) -> OptimizeResult | None:
    """The program in integers; None if there is no time left."""
    if (remaining := task.deadline - time.monotonic()) <= 0:
        return None
    cost, upper, rules = _objective(task)
    matrix, bounds = _rows(task, positions)
    integrality = np.zeros(len(cost))
    integrality[: len(task.program.options)] = 1
    constraints = [LinearConstraint(rules, task.program.rules.lb, task.program.rules.ub)]
    if len(bounds):
        constraints.append(LinearConstraint(matrix, -np.inf, bounds - TOLERANCE))
    with _quiet():
        return milp(
            cost,
            integrality=integrality,
            bounds=Bounds(0, upper),
            constraints=constraints,
            options={"time_limit": remaining, "mip_rel_gap": GAP},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No output of C code: the HiGHS of SciPy 1.17 prints ``HighsMipSolverData::transformNew…`` to
    the process's stdout when it polishes a solution, in the midst of somebody's JSON."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    try:
        sys.stdout.flush()
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError, AttributeError):  # no stdout to keep clean
        yield
        return
    try:
        os.dup2(nowhere, 1)
        yield
        if libc is not None:
            libc.fflush(None)  # what C has buffered would come out later
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _round(task: _Task, taken: Array) -> Array | None:
    """A plan near a relaxed one. Of a tensor's options in part, take the cheapest (without a cost,
    the one that keeps to the limit) and bring down what is too high; or take the smallest, and then
    cheaper ones again as far as they fit: the better of the two."""
    program = task.program
    price = task.cost
    if price is None:
        price = program.sizes if task.limit is None else task.limit[0]
    parts = [[i for i in own if taken[i] > 1e-6] for views in program.units for own in views]
    cheap = _plan(program, [min(part, key=lambda i: price[i]) for part in parts])
    small = _plan(program, [min(part, key=lambda i: program.sizes[i]) for part in parts])
    if task.cost is None or task.allows(cheap):
        return cheap
    saved = None if task.limit is None else task.limit[1]
    lowered = greedy.within(program, task.peak, saved, start=cheap)
    if not task.allows(small):
        return lowered
    for part in parts:
        better = small.copy()
        better[part] = 0.0
        better[min(part, key=lambda i: price[i])] = 1.0
        better = _settled(program, better)
        if len(part) > 1 and task.allows(better):
            small = better
    return _better(task, lowered, small)


def _plan(program: Program, options: list[int]) -> Array:
    """One option a tensor; what would be rebuilt and lacks a root takes another."""
    chosen = set(options)
    for each in program.rebuilt:
        lacks = any(chosen.isdisjoint(usable) for usable in each.roots)
        if chosen.intersection(each.columns) and (lacks or not chosen.issuperset(each.columns)):
            at = [int(np.searchsorted(program.starts, i, side="right")) - 1 for i in each.columns]
            for place, column in zip(at, each.instead, strict=True):
                options[place] = column
            chosen = set(options)
    taken = np.zeros(len(program.sizes))
    taken[options] = 1.0
    return _settled(program, taken)


def _settled(program: Program, taken: Array) -> Array:
    """Whole numbers, each mask and each product where choices need it and nowhere else."""
    count = len(program.options)
    end = count + len(program.masks)
    taken = np.append(np.round(taken[:count]), np.zeros(len(taken) - count))
    taken[end:] = [taken[p.rebuilt] * taken[p.coded] for p in program.products]
    short = (program.rules.A @ taken < program.rules.lb - 0.5).astype(float)
    taken[count:end] = (program.rules.A[:, count:end].T @ short) > 0
    return taken


def _is_lawful(program: Program, taken: Array) -> bool:
    found = program.rules.A @ taken
    return bool(((found >= program.rules.lb - 0.5) & (found <= program.rules.ub + 0.5)).all())


def _solution(program: Program, found: _Found) -> Solution:
    assert found.taken is not None
    noise = float(program.noise @ found.taken)
    return Solution(program.choices(found.taken), found.gap, noise)
