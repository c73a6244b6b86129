"""Joint: one program for all graphs of a model that a graph break, say, has cut in several.

Graphs come one by one, each when the step gets there, and the first has to be planned before the
second is known. Meanwhile a graph that ends in a break saves as little as a bound on its noise
allows. Once a graph is called again, all of the step are known: then their options solve one
program, in which what a graph saves is alive at every position of the others, and graphs that get
other choices are compiled anew, each before its next call. So the budget holds at every moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import LinearConstraint

from fxcompress import torch_private
from fxcompress.costs import clock_of
from fxcompress.decision import MARGIN
from fxcompress.evidence import signature
from fxcompress.passes.rewrite import Choice, hoisted_nodes
from fxcompress.peak import timeline
from fxcompress.pipeline import Planned
from fxcompress.planner import Given, weighed
from fxcompress.program import Array, Product, Program, Rebuilt, build
from fxcompress.settings import Settings
from fxcompress.solve import least_noise

log = logging.getLogger("fxcompress")

_Compile = Callable[[Sequence[Any], Given, Planned], tuple[Callable[..., Any], Planned | None]]


@dataclass(eq=False)
class Graph:
    """One graph of a model.

    Attributes:
        settings: those it was planned with, calibration included.
        planned: what was decided for it.
        run: what was compiled.
        compile: makes it anew, from inputs, what it is given and what was decided before.
        is_early: others of the step come after it.
        frame: which compile of which piece of user code it comes from.
        given: what it is to become before its next call.
    """

    settings: Settings
    planned: Planned
    run: Callable[..., Any]
    compile: _Compile
    is_early: bool
    frame: tuple[object, object] | None = None
    given: Given | None = None


@dataclass
class Whole:
    """All graphs of a model; see the module docstring.

    Attributes:
        graphs: in order of their first compile.
        called: in the step under way; one that is called again begins the next.
        is_settled: they have been planned together.
    """

    graphs: list[Graph] = field(default_factory=list)
    called: list[Graph] = field(default_factory=list)
    is_settled: bool = True

    def add(self, graph: Graph) -> Callable[..., Any]:
        """A graph that is new; what runs in its place."""
        for old in [g for g in self.graphs if _is_replaced(g, graph)]:
            self.graphs.remove(old)
        self.graphs.append(graph)
        self.is_settled = False

        def run(*args: Any) -> Any:
            self._before(graph, list(args))
            return graph.run(*args)

        return run

    def _before(self, graph: Graph, inputs: list[Any]) -> None:
        if graph in self.called:
            self.called.clear()
            if not self.is_settled and not all(g.is_early for g in self.graphs):
                self.is_settled = True
                try:
                    with torch_private.outside_compile():
                        plan_together(self.graphs)
                except Exception as error:  # never the reason why a training stops
                    log.warning("graphs keep the plans they have: %s", error)
        self.called.append(graph)
        if graph.given is None:
            return
        given, graph.given = graph.given, None
        try:
            with torch_private.outside_compile():
                run, planned = graph.compile(inputs, given, graph.planned)
        except Exception as error:
            log.warning("a graph keeps the plan it has: %s", error)
            return
        if planned is not None:
            graph.run, graph.planned = run, planned


def _is_replaced(old: Graph, new: Graph) -> bool:
    """The same piece of user code was compiled again, for other shapes."""
    if old.frame is None or new.frame is None:
        return False
    return old.frame[0] == new.frame[0] and old.frame[1] != new.frame[1]


def plan_together(graphs: Sequence[Graph]) -> None:
    """Give each graph what the best plan for all of them has for it, where that is anything new."""
    graphs = [g for g in graphs if g.planned.candidates]
    if len(graphs) < 2:
        return
    programs = [_program(g) for g in graphs]
    budget = _budget(graphs)
    found = least_noise(merged(programs), peak=budget / MARGIN)
    if found is None:
        log.info("no better plan for %d graphs together than one by one", len(graphs))
        return
    choices = list(found.choices)
    shares: list[tuple[Choice, ...]] = []
    for graph in graphs:
        count = len(graph.planned.candidates)
        shares.append(tuple(choices[:count]))
        del choices[:count]
    sizes = [
        float(program.sizes @ _taken(program, share))
        for program, share in zip(programs, shares, strict=True)
    ]
    for graph, share, size in zip(graphs, shares, sizes, strict=True):
        now = graph.planned.decision
        if now is None or [c.representation for c in now.choices] != [
            c.representation for c in share
        ]:
            graph.given = Given(share, int(sum(sizes) - size), found.gap)
    log.info(
        "%d graphs planned together: noise %.3g, %d compiled anew",
        *(len(graphs), found.noise, sum(g.given is not None for g in graphs)),
    )


def _program(graph: Graph) -> Program:
    planned, settings = graph.planned, graph.settings
    memory = timeline(
        planned.cut,
        planned.candidates,
        channels_last=planned.channels_last,
        repeats=settings.repeats,
    )
    clock = clock_of(planned.cut, planned.plain.candidates)
    known = settings.calibration
    evidence = None if known is None else known.of(signature(planned.cut))
    ladders, _ = weighed(planned.candidates, planned.plain, settings, evidence, clock)
    return build(ladders, memory)


def _budget(graphs: Sequence[Graph]) -> float:
    """Bytes that the step may take."""
    settings = graphs[0].settings
    if settings.budget_bytes is not None:
        return settings.budget_bytes
    assert settings.ratio is not None
    saved = [g.planned.plain.saved_bytes for g in graphs]
    alone = [g.planned.plain.peak - g.planned.reserved for g in graphs]
    whole = max(a + sum(saved) - s for a, s in zip(alone, saved, strict=True))
    return whole / settings.ratio


def _taken(program: Program, choices: Sequence[Choice]) -> Array:
    """The columns of these choices, and of the masks that they need."""
    taken = np.zeros(len(program.sizes))
    chosen = {(c.candidate.name, c.representation) for c in choices}
    for i, option in enumerate(program.options):
        taken[i] = (option.choice.candidate.name, option.choice.representation) in chosen
    needed = hoisted_nodes(choices)
    for j, mask in enumerate(program.masks, len(program.options)):
        taken[j] = mask in needed
    return taken


def merged(programs: Sequence[Program]) -> Program:
    """One program over the positions of all, in which what one saves is alive in the others."""
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
    """As Program.changes: at the ends of a graph's positions, from or to what it keeps saved."""
    blocks = []
    for i, program in enumerate(programs):
        own = sparse.lil_array(_moved(program.changes, places[i], columns))
        first = np.zeros(columns)
        for j, (other, place) in enumerate(zip(programs, places, strict=True)):
            if j == i - 1:  # at its end it held what was alive there, from now on what it saves
                first[place] += other.sizes - np.asarray(other.changes.sum(axis=0)).ravel()
            elif j == i and i > 0:  # until now it held what it will save
                first[place] -= other.sizes
            elif j > i and i == 0:
                first[place] += other.sizes
        own = own.tocsr()
        if own.shape[0]:
            top = sparse.coo_array((first, (np.zeros(columns, int), np.arange(columns))))
            top = sparse.coo_array((top.data, (top.row, top.col)), shape=own.shape)
            own = own + top.tocsr()
        blocks.append(own)
    found = sparse.vstack(blocks, format="csr")
    found.eliminate_zeros()
    found.sort_indices()
    return found
