"""Program: the mixed-integer program of a plan as sparse matrices, without its limits.

Columns are options, one binary each, then hoisted masks, one number in [0, 1] each that is at least
as large as every choice that needs the mask. What is alive at each position of the step is linear
in them. A tensor's bytes change at a handful of positions only, so the matrix holds the *changes*
from one position to the next, and a total is a running sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import LinearConstraint
from torch import fx

from fxcompress.choose import bytes_of
from fxcompress.passes import properties as prop
from fxcompress.passes.rewrite import KEEP, RECOMPUTE, Choice
from fxcompress.peak import Timeline

# A step that takes twice as long is worth avoiding for this much gradient noise: at 0.05 a plan is
# 10 % slower where that halves a variance of 0.01 and more, not to win at the fourth digit.
SLOWDOWN_PRICE = 0.05

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Option:
    """One representation of one tensor.

    Attributes:
        noise: what it adds to the gradients (see fxcompress/ladder.py).
        slowdown: what it adds to the time of a step, over that of the plain step.
        weight: what its noise counts (see ladder.hedges).
    """

    choice: Choice
    noise: float
    slowdown: float = 0.0
    weight: float = 1.0

    @property
    def cost(self) -> float:
        """Noise and time as one number."""
        return self.weight * self.noise + SLOWDOWN_PRICE * self.slowdown


@dataclass(frozen=True)
class Rebuilt:
    """A buffer that may be rebuilt, as columns.

    Attributes:
        columns: the option to rebuild, of each of its views.
        instead: what each takes where they are not.
        roots: for each tensor they are rebuilt from, the options of which one must be taken.
    """

    columns: tuple[int, ...]
    instead: tuple[int, ...]
    roots: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Program:
    """See the module docstring.

    Attributes:
        options: all options, tensor by tensor.
        masks: the hoisted nodes.
        changes: [positions, columns] sparse, bytes by which each column differs from the position
            before.
        base: bytes at each position that no column changes.
        sizes: saved bytes by column.
        noise, cost: by column, 0 for masks.
        rules: exactly one option a tensor; masks where needed; one buffer coded, kept or rebuilt
            whole; what is rebuilt has its roots, exact ones, none of them rebuilt itself.
        units: options of tensors that share a buffer, tensor by tensor.
        starts: the first option of each tensor.
        rebuilt: buffers that may be rebuilt, roots first.
    """

    options: tuple[Option, ...]
    masks: tuple[fx.Node, ...]
    changes: Any
    base: Array
    sizes: Array
    noise: Array
    cost: Array
    rules: LinearConstraint
    units: tuple[tuple[tuple[int, ...], ...], ...]
    starts: npt.NDArray[np.int64]
    rebuilt: tuple[Rebuilt, ...]

    def total(self, taken: Array) -> Array:
        """Bytes alive at each position when the columns are ``taken``."""
        return self.base + np.cumsum(self.changes @ taken)

    def row(self, position: int) -> Array:
        """Bytes of each column alive at one position."""
        end = self.changes.indptr[position + 1]
        columns, steps = self.changes.indices[:end], self.changes.data[:end]
        return np.bincount(columns, steps, minlength=len(self.sizes)).astype(np.float64)

    def choices(self, taken: Array) -> tuple[Choice, ...]:
        pairs = zip(self.options, taken, strict=False)
        return tuple(option.choice for option, share in pairs if share > 0.5)


def build(ladders: Sequence[Sequence[Option]], step: Timeline) -> Program:
    """The program for tensors with these options on this timeline."""
    options = tuple(option for ladder in ladders for option in ladder)
    masks = tuple(step.masks)
    sizes = [float(bytes_of(o.choice, {})) for o in options]
    sizes += [float(step.mask_payload[m]) for m in masks]
    alive = (step.of(o.choice) for o in options)
    changes = _changes(chain(alive, (step.masks[m] for m in masks)), len(step.base))
    own = _own_columns(ladders)
    units = _units(ladders, own)
    rebuilt = _rebuilt(options, own, units)
    return Program(
        options,
        masks,
        changes,
        step.base,
        np.array(sizes),
        np.array([o.noise for o in options] + [0.0] * len(masks)),
        np.array([o.cost for o in options] + [0.0] * len(masks)),
        _rules(options, masks, own, units, rebuilt),
        units,
        np.array([columns[0] for columns in own], dtype=int),
        rebuilt,
    )


def _changes(columns: Iterable[Array], length: int) -> Any:
    """[positions, columns] sparse: differences along the positions."""
    where: list[npt.NDArray[np.int64]] = []
    values: list[Array] = []
    for alive in columns:
        steps = np.diff(alive, prepend=0.0)
        where.append(np.flatnonzero(steps))
        values.append(steps[where[-1]])
    ends = np.concatenate([[0], np.cumsum([len(w) for w in where], dtype=int)])
    flat = (np.concatenate(each) if each else np.zeros(0, int) for each in (values, where))
    return sparse.csc_array((*flat, ends), shape=(length, len(where))).tocsr()


def _own_columns(ladders: Sequence[Sequence[Option]]) -> list[tuple[int, ...]]:
    """Columns of each tensor."""
    ends = np.cumsum([len(ladder) for ladder in ladders], dtype=int)
    pairs = zip(ladders, ends, strict=True)
    return [tuple(range(int(end) - len(ladder), int(end))) for ladder, end in pairs]


def _units(
    ladders: Sequence[Sequence[Option]], own: Sequence[tuple[int, ...]]
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The tensors of each buffer, as columns."""
    found: dict[fx.Node, list[tuple[int, ...]]] = {}
    for ladder, columns in zip(ladders, own, strict=True):
        root = prop.storage_root(ladder[0].choice.candidate.saved.forward)
        found.setdefault(root, []).append(columns)
    return tuple(tuple(views) for views in found.values())


def _rebuilt(
    options: Sequence[Option],
    own: Sequence[tuple[int, ...]],
    units: Sequence[Sequence[tuple[int, ...]]],
) -> tuple[Rebuilt, ...]:
    columns_of = {options[columns[0]].choice.candidate.saved.forward: columns for columns in own}
    found = []
    for views in units:
        again = [[i for i in view if is_rebuilt(options[i])][:1] for view in views]
        if not all(again):
            continue
        recipes = [options[i].choice.candidate.recipe for (i,) in again]
        roots = dict.fromkeys(n for r in recipes if r is not None for n in r.roots)
        instead = [
            min(view, key=lambda i: (is_rebuilt(options[i]), not is_kept(options[i])))
            for view in views
        ]
        found.append(
            Rebuilt(
                tuple(i for (i,) in again),
                tuple(instead),
                tuple(
                    tuple(i for i in columns_of[root] if is_exact(options[i]))
                    for root in roots
                    if root in columns_of
                ),
            )
        )
    return tuple(found)


def _rules(
    options: Sequence[Option],
    masks: Sequence[fx.Node],
    own: Sequence[tuple[int, ...]],
    units: Sequence[Sequence[tuple[int, ...]]],
    rebuilt: Sequence[Rebuilt],
) -> LinearConstraint:
    rows: list[dict[int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def rule(row: dict[int, float], least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    for columns in own:
        rule(dict.fromkeys(columns, 1.0), 1.0, 1.0)
    place = {mask: len(options) + j for j, mask in enumerate(masks)}
    for columns in own:
        dropping = [i for i in columns if options[i].choice.drops_values]
        for mask in options[columns[0]].choice.candidate.exact if dropping else ():
            if mask in place:
                rule({place[mask]: 1.0, **dict.fromkeys(dropping, -1.0)}, 0.0, np.inf)
    for first, *others in units:
        for other in others:
            kept = [[i for i in view if is_kept(options[i])] for view in (first, other)]
            rule(dict.fromkeys(kept[0], 1.0) | dict.fromkeys(kept[1], -1.0), 0.0, 0.0)
    together = {each.columns[0]: each for each in rebuilt}
    for views in units:
        again = [[i for i in view if is_rebuilt(options[i])] for view in views]
        if not any(again):
            continue
        whole = together.get(again[0][0]) if again[0] else None
        if whole is None:  # a view that cannot be rebuilt holds the others back
            for column in chain(*again):
                rule({column: 1.0}, 0.0, 0.0)
            continue
        for column in whole.columns[1:]:
            rule({whole.columns[0]: 1.0, column: -1.0}, 0.0, 0.0)
        for usable in whole.roots:
            rule({whole.columns[0]: -1.0, **dict.fromkeys(usable, 1.0)}, 0.0, np.inf)
    lengths = [len(row) for row in rows]
    where = [i for row in rows for i in row]
    values = [value for row in rows for value in row.values()]
    matrix = sparse.csr_array(
        (values, where, np.concatenate([[0], np.cumsum(lengths, dtype=int)])),
        shape=(len(rows), len(options) + len(masks)),
    )
    return LinearConstraint(matrix, low, high)


def is_kept(option: Option) -> bool:
    return option.choice.representation == KEEP


def is_rebuilt(option: Option) -> bool:
    return option.choice.representation == RECOMPUTE


def is_exact(option: Option) -> bool:
    return option.choice.is_exact
