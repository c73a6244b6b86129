"""Whole: the compiled graphs of one model, planned together once a step has shown all of them.

A graph that is called again begins another step: then all are known. Those that get other choices
(fxcompress/joint.py) are compiled anew, each before its next call. As an early graph saves little
until then, the budget holds at every moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxcompress import shares, torch_private
from fxcompress.evidence import Calibration, signature
from fxcompress.joint import Part, changing, plan_together
from fxcompress.pipeline import Planned
from fxcompress.planner import Given
from fxcompress.settings import Settings

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
        name: it is kept under for later processes (fxcompress/shares.py).
        frame: which compile of which piece of user code it comes from.
        given: what it is to become before its next call.
    """

    settings: Settings
    planned: Planned
    run: Callable[..., Any]
    compile: _Compile
    is_early: bool
    name: str
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
                self._settle()
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
        if planned is None:
            log.warning("a graph keeps the plan it has: it was refused another one")
            return
        graph.run, graph.planned = run, planned

    def _settle(self) -> None:
        if len(self.graphs) < 2:
            return
        try:
            with torch_private.outside_compile():
                found = plan_together([Part(g.planned, g.settings) for g in self.graphs])
        except Exception as error:  # never the reason why a training stops
            log.warning("graphs keep the plans they have: %s", error)
            return
        changed = changing([g.planned for g in self.graphs], found)
        for graph, given, is_changed in zip(self.graphs, found, changed, strict=True):
            graph.given = given if is_changed else None
        named = {g.name: (given, _measured(g)) for g, given in zip(self.graphs, found, strict=True)}
        if len(named) == len(self.graphs):  # else one name would stand for two
            shares.remember(named)


def _is_replaced(old: Graph, new: Graph) -> bool:
    """The same piece of user code was compiled again, for other shapes."""
    if old.frame is None or new.frame is None:
        return False
    return old.frame[0] == new.frame[0] and old.frame[1] != new.frame[1]


def _measured(graph: Graph) -> Calibration | None:
    """What is known of this graph alone."""
    known = graph.settings.calibration
    if known is None:
        return None
    own = signature(graph.planned.cut)
    return replace(known, graphs=tuple(g for g in known.graphs if g.signature == own))
