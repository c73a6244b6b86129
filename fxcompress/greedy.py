"""Greedy: a plan without a solver, for when the solver has no time; and a bound for the solver.

Start from the least noisy option of every tensor. While the step is too high somewhere, look at its
highest position and take the options that free the most bytes there for the least noise, until that
position fits. What is rebuilt, is so from exact tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from fxcompress.program import Array, Flags, Program, is_exact, is_kept, is_rebuilt

ROUNDS = 2000  # positions brought down before giving up
HALVINGS = 20  # of the interval in which the lowest peak lies


@dataclass(frozen=True)
class _Moves:
    """What may be taken: tensors of one buffer move together, from kept to coded above all.

    Attributes:
        columns: [moves, columns] sparse, 1 where a move takes a column, its masks included.
        unit: the buffer of each move.
        noise, size: of each move, bytes saved.
        exact: the backward has what the move is about, from the forward.
        roots: buffers that must be exact for a move that rebuilds.
    """

    columns: Any
    unit: Any
    noise: Array
    size: Array
    exact: Flags
    roots: tuple[frozenset[int], ...]


def within(
    program: Program,
    peak: float | None = None,
    saved: float | None = None,
    start: Array | None = None,
) -> Array | None:
    """Columns taken by a plan within ``peak`` bytes at every position and ``saved`` in all; None
    where this way finds none. ``start``: a plan to bring down instead of the least noisy one."""
    moves = _moves(program)
    now = _start(moves)
    if start is not None:
        _move_to(program, moves, now, start)
    for _ in range(ROUNDS):
        taken = _taken(program, moves, now)
        over, row = _worst(program, taken, peak, saved)
        if row is None:
            return taken
        if not _bring_down(moves, now, moves.columns @ row, over):
            return None
    return None


def lowest(program: Program, noise: float | None = None) -> Array | None:
    """Columns taken by a plan of a low peak with at most this much noise; None if none is found."""
    best = _taken(program, moves := _moves(program), _start(moves))
    if noise is not None and program.noise @ best > noise:
        return None
    low, high = 0.0, float(program.total(best).max(initial=0.0))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = within(program, peak=middle)
        if found is None or (noise is not None and program.noise @ found > noise):
            low = middle
        else:
            best, high = found, middle
    return best


def _worst(
    program: Program, taken: Array, peak: float | None, saved: float | None
) -> tuple[float, Array | None]:
    """(bytes too many, bytes of each column there) at the worst place; None if there is none."""
    if peak is not None:
        total = program.total(taken)
        position = int(total.argmax()) if len(total) else 0
        if len(total) and total[position] > peak:
            return float(total[position] - peak), program.row(position)
    if saved is not None and program.sizes @ taken > saved:
        return float(program.sizes @ taken - saved), program.sizes
    return 0.0, None


def _bring_down(moves: _Moves, now: Any, size: Array, over: float) -> bool:
    """Change ``now`` so that ``over`` bytes are freed; False if nothing frees any."""
    freed = size[now][moves.unit] - size
    price = moves.noise - moves.noise[now][moves.unit]
    # Never back to less noise: what one position gains by it, another one loses again.
    smaller = (price == 0) & (moves.size < moves.size[now][moves.unit])
    useful = (freed > 0.5) & ((price > 0) | smaller)
    if not useful.any():
        return False
    ratio = np.where(useful, price / np.where(useful, freed, 1.0), np.inf)
    order = np.lexsort((moves.noise, ratio))
    seen: set[int] = set()
    needed = frozenset[int]().union(*(moves.roots[move] for move in now))
    for move in order:
        if not useful[move] or over <= 0:
            break
        unit = int(moves.unit[move])
        has_roots = all(moves.exact[now[root]] for root in moves.roots[move])
        if unit not in seen and has_roots and (moves.exact[move] or unit not in needed):
            seen.add(unit)
            now[unit] = move
            needed |= moves.roots[move]
            over -= freed[move]
    return bool(seen)


def _start(moves: _Moves) -> Any:
    """The least noisy move of each unit."""
    order = np.lexsort((moves.noise, moves.unit))
    _, first = np.unique(moves.unit[order], return_index=True)
    return order[first]


def _move_to(program: Program, moves: _Moves, now: Any, plan: Array) -> None:
    """The moves of a plan, where its views of one buffer are chosen as some move has them."""
    count = len(program.options)
    chosen = moves.columns[:, :count]
    (whole,) = np.nonzero(chosen @ plan[:count] == chosen.sum(axis=1))
    for move in whole:  # roots come first
        if all(moves.exact[now[root]] for root in moves.roots[move]):
            now[moves.unit[move]] = move


def _taken(program: Program, moves: _Moves, now: Any) -> Array:
    return np.asarray(np.minimum(moves.columns[now].sum(axis=0), 1.0)).ravel()


def _moves(program: Program) -> _Moves:
    rows: list[list[int]] = []
    unit: list[int] = []
    exact: list[bool] = []
    roots: list[frozenset[int]] = []
    at = {i: n for n, views in enumerate(program.units) for view in views for i in view}
    rebuilt = {
        each.columns[0]: frozenset(at[usable[0]] for usable in each.roots if usable)
        for each in program.rebuilt
        if all(each.roots)
    }
    for number, views in enumerate(program.units):
        for columns in _together(program, views):
            if is_rebuilt(program.options[columns[0]]) and columns[0] not in rebuilt:
                continue
            rows.append([*columns, *_masks(program, columns)])
            unit.append(number)
            exact.append(all(is_exact(program.options[i]) for i in columns))
            roots.append(rebuilt.get(columns[0], frozenset()))
    lengths = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=int)])
    flat = [column for row in rows for column in row]
    shape = (len(rows), len(program.sizes))
    matrix = sparse.csr_array((np.ones(len(flat)), flat, lengths), shape=shape)
    noise, size = matrix @ program.cost, matrix @ program.sizes
    return _Moves(matrix, np.array(unit, dtype=int), noise, size, np.array(exact), tuple(roots))


def _together(program: Program, views: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ways in which the views of one buffer may be chosen: all kept, rebuilt, or coded alike."""
    if len(views) == 1:
        return [[column] for column in views[0]]
    kept = [[i for i in view if is_kept(program.options[i])] for view in views]
    again = [[i for i in view if is_rebuilt(program.options[i])] for view in views]
    coded = [[i for i in view if i not in (*kept[j], *again[j])] for j, view in enumerate(views)]
    ways = [[view[0] for view in part] for part in (kept, again) if all(part)]
    if all(coded):
        longest = max(map(len, coded))
        ways += [[view[min(j, len(view) - 1)] for view in coded] for j in range(longest)]
    return ways


def _masks(program: Program, columns: Sequence[int]) -> list[int]:
    needed = {
        mask
        for i in columns
        if program.options[i].choice.drops_values
        for mask in program.options[i].choice.candidate.exact
    }
    return [len(program.options) + j for j, m in enumerate(program.masks) if m in needed]
