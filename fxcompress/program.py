"""Program: the mixed-integer program of a plan as sparse matrices, without its limits.

Columns are options, one binary each; then hoisted masks, one number in [0, 1] each that is at least
as large as every choice that needs the mask; then products of two options, that of rebuilding a
tensor and that of coding a root of it, whose noise reaches the tensor's readers too. A product is 1
where both are taken: at least their sum less 1, and over all options of the root as much as the
first, so that the relaxed program does not get it for nothing. What is alive at each position of
the step is linear in them. A tensor's bytes change at a handful of positions only, so the matrix
holds the *changes* from one position to the next, and a total is a running sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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

TIME_PRICE = 0.05  # what a setting says by default

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Option:
    """One representation of one tensor.

    Attributes:
        noise: what it adds to the gradients (see fxcompress/ladder.py).
        slowdown: what it adds to the time of a step, over that of the plain step.
        weight: what its noise counts (see ladder.hedges).
        passes: of rebuilding: roots that may be coded, each with what its noise adds through this
            tensor's buffer over what it adds by itself (see passing.py).
        passing: by how much more of its noise passes through what is rebuilt than `passes` of those
            say (see evidence.Price).
        time_price: noise that a step of twice the time is worth (see Settings).
    """

    choice: Choice
    noise: float
    slowdown: float = 0.0
    weight: float = 1.0
    passes: tuple[tuple[str, float], ...] = ()
    passing: float = 1.0
    time_price: float = TIME_PRICE

    @property
    def cost(self) -> float:
        """Noise and time as one number."""
        return self.weight * self.noise + self.time_price * self.slowdown


@dataclass(frozen=True)
class Rebuilt:
    """A buffer that may be rebuilt, as columns.

    Attributes:
        columns: the option to rebuild, of each of its views.
        instead: what each takes where they are not.
        roots: for each tensor they are rebuilt from, the options of which one must be taken.
        passes: for each of these, how much of its noise adds through the buffer.
    """

    columns: tuple[int, ...]
    instead: tuple[int, ...]
    roots: tuple[tuple[int, ...], ...]
    passes: tuple[float, ...]


@dataclass(frozen=True)
class Product:
    """A buffer that is rebuilt while a root of it is coded, as columns.

    Attributes:
        buffer: its place in `Program.rebuilt`.
        rebuilt: the option to rebuild.
        coded: the option of the root.
    """

    buffer: int
    rebuilt: int
    coded: int


@dataclass(frozen=True)
class Program:
    """See the module docstring.

    Attributes:
        options: all options, tensor by tensor.
        masks: the hoisted nodes.
        products: pairs of options with a price of their own.
        changes: [positions, columns] sparse, bytes by which each column differs from the position
            before.
        base: bytes at each position that no column changes.
        sizes: saved bytes by column.
        noise, cost: by column, 0 for masks.
        rules: exactly one option a tensor; masks where needed; one buffer coded, kept or rebuilt
            whole; what is rebuilt has its roots, none of them rebuilt itself; products.
        units: options of tensors that share a buffer, tensor by tensor.
        starts: the first option of each tensor.
        rebuilt: buffers that may be rebuilt, roots first.
    """

    options: tuple[Option, ...]
    masks: tuple[fx.Node, ...]
    products: tuple[Product, ...]
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
    own = _own_columns(ladders)
    units = _units(ladders, own)
    rebuilt = _rebuilt(options, own, units)
    products = tuple(
        Product(n, each.columns[0], column)
        for n, each in enumerate(rebuilt)
        for usable in each.roots
        for column in usable
        if options[column].choice.drops_values
    )
    sizes = [float(bytes_of(o.choice, {})) for o in options]
    sizes += [float(step.mask_payload[m]) for m in masks] + [0.0] * len(products)
    alive = (step.of(o.choice) for o in options)
    together = (_alive_together(p, options, rebuilt, step) for p in products)
    changes = _changes(chain(alive, (step.masks[m] for m in masks), together), len(step.base))
    priced = [_price(p, options, rebuilt) for p in products]
    nothing = [0.0] * len(masks)
    return Program(
        options,
        masks,
        products,
        changes,
        step.base,
        np.array(sizes),
        np.array([o.noise for o in options] + nothing + [noise for noise, _ in priced]),
        np.array([o.cost for o in options] + nothing + [cost for _, cost in priced]),
        _rules(options, masks, products, own, units, rebuilt),
        units,
        np.array([columns[0] for columns in own], dtype=int),
        rebuilt,
    )


def _alive_together(
    product: Product, options: Sequence[Option], rebuilt: Sequence[Rebuilt], step: Timeline
) -> Array:
    coded = options[product.coded].choice
    root = coded.candidate.saved.forward
    views = [
        choice
        for choice in (options[i].choice for i in rebuilt[product.buffer].columns)
        if choice.candidate.recipe is not None and root in choice.candidate.recipe.roots
    ]
    return sum((step.of_root(view, coded) for view in views), np.zeros(len(step.base)))


def _price(
    product: Product, options: Sequence[Option], rebuilt: Sequence[Rebuilt]
) -> tuple[float, float]:
    """(noise, cost): the root's noise again, through the buffer, which shares a decode of it."""
    coded, buffer = options[product.coded], rebuilt[product.buffer]
    share = next(p for r, p in zip(buffer.roots, buffer.passes, strict=True) if product.coded in r)
    again = replace(coded, noise=share * coded.passing * coded.noise, slowdown=0.0)
    return again.noise, again.cost


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
        needed = dict.fromkeys(n for r in recipes if r is not None for n in r.roots)
        roots = [n for n in needed if n in columns_of]
        passes = dict(options[again[0][0]].passes)
        shares = [passes.get(options[columns_of[n][0]].choice.candidate.name) for n in roots]
        instead = [
            min(view, key=lambda i: (is_rebuilt(options[i]), not is_kept(options[i])))
            for view in views
        ]
        usable = [
            tuple(i for i in columns_of[n] if _serves(options[i], share is not None))
            for n, share in zip(roots, shares, strict=True)
        ]
        found.append(
            Rebuilt(
                tuple(i for (i,) in again),
                tuple(instead),
                tuple(usable),
                tuple(share or 0.0 for share in shares),
            )
        )
    return tuple(found)


def _rules(
    options: Sequence[Option],
    masks: Sequence[fx.Node],
    products: Sequence[Product],
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
    places = {(p.buffer, p.coded): len(options) + len(masks) + j for j, p in enumerate(products)}
    for column, product in enumerate(products, len(options) + len(masks)):
        rule({column: 1.0, product.rebuilt: -1.0, product.coded: -1.0}, -1.0, np.inf)
        rule({column: -1.0, product.coded: 1.0}, 0.0, np.inf)
    for n, each in enumerate(rebuilt):
        exact = {mask for i in each.columns for mask in options[i].choice.candidate.exact}
        for usable in each.roots:
            coded = [places[n, i] for i in usable if (n, i) in places]
            if not coded:
                continue
            as_it_is = [i for i in usable if not options[i].choice.drops_values]
            row = dict.fromkeys(coded, 1.0) | dict.fromkeys(as_it_is, 1.0)
            rule({**row, each.columns[0]: -1.0}, 0.0, np.inf)
            for mask in exact & place.keys():
                rule({place[mask]: 1.0, **dict.fromkeys(coded, -1.0)}, 0.0, np.inf)
    lengths = [len(row) for row in rows]
    where = [i for row in rows for i in row]
    values = [value for row in rows for value in row.values()]
    matrix = sparse.csr_array(
        (values, where, np.concatenate([[0], np.cumsum(lengths, dtype=int)])),
        shape=(len(rows), len(options) + len(masks) + len(products)),
    )
    return LinearConstraint(matrix, low, high)


def is_kept(option: Option) -> bool:
    return option.choice.representation == KEEP


def is_rebuilt(option: Option) -> bool:
    return option.choice.representation == RECOMPUTE


def _serves(root: Option, may_be_coded: bool) -> bool:
    """What depends on the root can be rebuilt."""
    return is_exact(root) or (may_be_coded and root.choice.codec_spec is not None)


def is_exact(option: Option) -> bool:
    return option.choice.is_exact
