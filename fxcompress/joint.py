"""Joint: one program for all graphs of a model that a graph break, say, has cut in several.

Graphs come one by one, each when the step gets there, and the first has to be planned before the
second is known. Meanwhile one that others follow saves as little as a bound on its noise allows
(planner.MEANWHILE). Once all are known (fxcompress/whole.py) their options solve one program, in
which what a graph saves is alive throughout the graphs that the step runs after it: their backwards
come before its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import LinearConstraint

from fxcompress.costs import clock_of
from fxcompress.decision import MARGIN
from fxcompress.evidence import signature
from fxcompress.passes.rewrite import KEEP, Choice, hoisted_nodes
from fxcompress.peak import timeline
from fxcompress.pipeline import Planned
from fxcompress.planner import Given, chosen, weighed
from fxcompress.program import Array, Product, Program, Rebuilt, build
from fxcompress.settings import Settings
from fxcompress.solve import least_noise

log = logging.getLogger("fxcompress")

WORTH = 0.7  # of the noise: what a better plan may leave of it to be worth another compile


@dataclass(frozen=True)
class Part:
    """One of the graphs: what was decided for it, and the settings it was planned with."""

    planned: Planned
    settings: Settings


def plan_together(parts: Sequence[Part]) -> list[Given]:
    """For each graph what the best plan for all of them has for it; what it does now if that is
    about as good.

    Args:
        parts: in the order in which a step runs them.
    """
    now = [_choices(p.planned) for p in parts]
    unchanged = _given(parts, now, [p.planned.plan.saved_bytes for p in parts])
    budget, plain = _budget(parts), _plain_peak(parts)
    margin = MARGIN if parts[0].settings.ratio is None else 1.0  # a share of this very figure
    if all(p.planned.decision is None for p in parts) and plain * margin <= budget:
        return unchanged
    programs = [_program(p) for p in parts]
    found = least_noise(merged(programs), peak=budget / MARGIN)
    if found is None:
        log.info("no better plan for %d graphs together than one by one", len(parts))
        return unchanged
    noise = sum(
        float(program.noise @ _taken(program, choices))
        for program, choices in zip(programs, now, strict=True)
    )
    log.info(
        "%d graphs planned together: noise %.3g instead of %.3g", len(parts), found.noise, noise
    )
    if found.noise > WORTH * noise:
        return unchanged
    ends = list(accumulate(len(p.planned.candidates) for p in parts))
    starts = [0, *ends[:-1]]
    shares = [found.choices[a:b] for a, b in zip(starts, ends, strict=True)]
    sizes = [
        int(program.sizes @ _taken(program, share))
        for program, share in zip(programs, shares, strict=True)
    ]
    return _given(parts, shares, sizes, found.gap)


def changing(planned: Sequence[Planned], given: Sequence[Given]) -> list[bool]:
    """Which of the graphs are to do something else than they do.

    A graph that was left as plain Inductor has it saves what the program has a few steps rebuild.
    """
    found = [_changes_choices(p, g) for p, g in zip(planned, given, strict=True)]
    return [
        change or (any(found) and each.decision is None and _rebuilds(each))
        for change, each in zip(found, planned, strict=True)
    ]


def _changes_choices(planned: Planned, given: Given) -> bool:
    now, then = chosen(_choices(planned)), given.choices
    return any(now[name].representation != then[name].representation for name in now)


def _rebuilds(planned: Planned) -> bool:
    return {c.name for c in planned.plain.candidates} != {c.name for c in planned.candidates}


def _given(
    parts: Sequence[Part],
    shares: Sequence[Sequence[Choice]],
    sizes: Sequence[int],
    gap: float | None = None,
) -> list[Given]:
    """Each graph's share, beside what those before it keep saved: ``sizes`` bytes."""
    plain = [p.planned.plain.saved_bytes for p in parts]
    before, before_plain = ([0, *accumulate(some[:-1])] for some in (sizes, plain))
    return [
        Given(chosen(share), held, held_plain, gap)
        for share, held, held_plain in zip(shares, before, before_plain, strict=True)
    ]


def _choices(planned: Planned) -> tuple[Choice, ...]:
    """What the graph does now with each of its candidates."""
    if planned.decision is not None:
        return planned.decision.choices
    return tuple(Choice(c, KEEP) for c in planned.candidates)


def _program(part: Part) -> Program:
    planned, settings = part.planned, part.settings
    memory = timeline(
        planned.cut,
        planned.candidates,
        channels_last=planned.channels_last,
        repeats=settings.repeats,
    )
    clock = clock_of(planned.cut, planned.plain.candidates, settings.time_price)
    known = settings.calibration
    evidence = None if known is None else known.of(signature(planned.cut))
    ladders, _ = weighed(planned.candidates, planned.plain, settings, evidence, clock)
    return build(ladders, memory)


def _plain_peak(parts: Sequence[Part]) -> float:
    """Bytes that a step takes if all graphs are left as plain Inductor has them."""
    saved = [p.planned.plain.saved_bytes for p in parts]
    alone = [p.planned.plain.peak - p.planned.reserved for p in parts]
    return max(a + s for a, s in zip(alone, [0, *accumulate(saved[:-1])], strict=True))


def _budget(parts: Sequence[Part]) -> float:
    """Bytes that a step may take."""
    settings = parts[0].settings
    if settings.budget_bytes is not None:
        return settings.budget_bytes
    assert settings.ratio is not None
    return _plain_peak(parts) / settings.ratio


def _taken(program: Program, choices: Sequence[Choice]) -> Array:
    """The columns of these choices, and of the masks that they need."""
    taken = np.zeros(len(program.sizes))
    named = {(c.candidate.name, c.representation) for c in choices}
    for i, option in enumerate(program.options):
        taken[i] = (option.choice.candidate.name, option.choice.representation) in named
    needed = hoisted_nodes(choices)
    for j, mask in enumerate(program.masks, len(program.options)):
        taken[j] = mask in needed
    return taken


def merged(programs: Sequence[Program]) -> Program:
    """One program over the positions of all, in which what one saves is alive in those after it."""
    counts = [(len(p.options), len(p.masks), len(p.products)) for p in programs]
    totals = [sum(c[kind] for c in counts) for kind in range(3)]
    starts = [0, totals[0], totals[0] + totals[1]]
    places = []  # by program, where its columns are
    for count in counts:
        parts = [np.arange(s, s + n) for s, n in zip(starts, count, strict=True)]
        places.append(np.concatenate(parts).astype(int))
        starts = [s + n for s, n in zip(starts, count, strict=True)]
    columns = sum(totals)

    def spread(values: str) -> Array:
        whole = np.zeros(columns)
        for program, place in zip(programs, places, strict=True):
            whole[place] = getattr(program, values)
        return whole

    def at(place: Array, some: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(place[i]) for i in some)

    units, first = [], []
    rebuilt: list[Rebuilt] = []
    products: list[Product] = []
    for program, place in zip(programs, places, strict=True):
        before = len(rebuilt)
        products += [
            Product(p.buffer + before, *at(place, [p.rebuilt, p.coded])) for p in program.products
        ]
        rebuilt += [
            Rebuilt(
                at(place, r.columns),
                at(place, r.instead),
                tuple(at(place, root) for root in r.roots),
                r.passes,
            )
            for r in program.rebuilt
        ]
        units += [tuple(at(place, view) for view in views) for views in program.units]
        first.append(place[program.starts])
    rules = sparse.vstack(
        [_moved(p.rules.A, place, columns) for p, place in zip(programs, places, strict=True)],
        format="csr",
    )
    low, high = (
        np.concatenate([getattr(p.rules, bound) for p in programs]) for bound in ("lb", "ub")
    )
    return Program(
        tuple(o for p in programs for o in p.options),
        tuple(m for p in programs for m in p.masks),
        tuple(products),
        _changes(programs, places, columns),
        np.concatenate([p.base for p in programs]),
        spread("sizes"),
        spread("noise"),
        spread("cost"),
        LinearConstraint(rules, low, high),
        tuple(units),
        np.concatenate(first),
        tuple(rebuilt),
    )


def _moved(matrix: Any, place: Array, columns: int) -> Any:
    found = sparse.coo_array(matrix)
    shape = (found.shape[0], columns)
    return sparse.csr_array((found.data, (found.row, place[found.col])), shape=shape)


def _changes(programs: Sequence[Program], places: Sequence[Array], columns: int) -> Any:
    """As Program.changes. Where one graph's positions end, what it saves stays alive."""
    blocks = []
    for i, program in enumerate(programs):
        own = _moved(program.changes, places[i], columns)
        if i > 0:
            before, place = programs[i - 1], places[i - 1]
            alive = np.asarray(before.changes.sum(axis=0)).ravel()  # at its last position
            step = sparse.csr_array(
                (before.sizes - alive, (np.zeros(len(place), int), place)), shape=own.shape
            )
            own = sparse.csr_array(own + step)
        blocks.append(own)
    found = sparse.vstack(blocks, format="csr")
    found.eliminate_zeros()
    found.sort_indices()
    return found
