"""Graphs that share a budget: one program for all of them."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import torch_private
from fxcompress.joint import Part, changing, merged, plan_together
from fxcompress.ladder import ladder
from fxcompress.pareto import trace
from fxcompress.peak import timeline
from fxcompress.pipeline import Role, plan_graph
from fxcompress.plan import Plan
from fxcompress.program import Program, build
from fxcompress.settings import make

ROWS = 1024
BUDGET_MB = 1.0


class Thirds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.parts
        x = first(x)
        torch._dynamo.graph_break()
        x = second(x)
        torch._dynamo.graph_break()
        return self.loss(third(x))

    def loss(self, y: Tensor) -> Tensor:
        return y.square().mean()


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    settings = make(policy="uniform4", inner="aot_eager")
    found = []
    for cut in trace(Thirds(), torch.randn(ROWS, 32)):
        planned = plan_graph(cut.copy(), settings, role=Role(is_part=True))
        ladders = [ladder(c, settings.group, None, None, 1.0) for c in planned.candidates]
        found.append(build(ladders, timeline(planned.cut, planned.candidates, channels_last=False)))
    return found


def test_what_a_graph_saves_is_alive_in_those_after_it(programs: list[Program]) -> None:
    whole = merged(programs)
    draw = np.random.default_rng(0)
    for _ in range(10):
        taken, totals, saved = np.zeros(len(whole.sizes)), [], []
        place = 0  # options of all programs come first, in order
        for program in programs:
            own = np.zeros(len(program.sizes))
            ends = [*program.starts[1:], len(program.options)]
            for start, end in zip(program.starts, ends, strict=True):
                own[draw.integers(start, end)] = 1
            taken[place : place + len(program.options)] = own[: len(program.options)]
            place += len(program.options)
            totals.append(program.total(own))
            saved.append(float(program.sizes @ own))
        held = [0.0, *accumulate(saved[:-1])]
        expected = np.concatenate([t + h for t, h in zip(totals, held, strict=True)])
        assert np.allclose(whole.total(taken), expected)


def test_an_ample_budget_changes_nothing() -> None:
    settings = make(budget_mb=1000, inner="aot_eager")
    cuts = trace(Thirds(), torch.randn(ROWS, 32))
    parts = [
        Part(plan_graph(cut, settings, role=Role(is_part=True, is_early=True)), settings)
        for cut in cuts
    ]
    assert all(part.planned.decision is None for part in parts)
    found = plan_together(parts)
    assert not any(changing([p.planned for p in parts], found))


# --- what later processes know of it --------------------------------------------------------------


def planned_at_each_step(model: nn.Module, budget_mb: float, steps: int) -> list[Plan]:
    """The plans in force after each of these steps of a model that is compiled anew."""
    torch._dynamo.reset()
    backend = fxcompress.backend(budget_mb, inner="aot_eager")
    compiled, found = torch.compile(model, backend=backend), []
    for _ in range(steps):
        compiled(torch.ones(ROWS, 32)).backward()
        found.append(backend.plan())
    return found


def rows(plan: Plan) -> list[tuple[str, str]]:
    return [(t.name, t.representation) for t in plan.tensors]


def kinds(plan: Plan) -> list[tuple[str, str]]:
    """Without the parameters of codecs, which hang on what was drawn to measure."""
    return [(name, representation.partition("(")[0]) for name, representation in rows(plan)]


class Squares(Thirds):
    """Its last graph is another one."""

    def loss(self, y: Tensor) -> Tensor:
        return y.square().sum()


def test_a_later_process_begins_with_what_was_planned_together() -> None:
    with torch_private.fresh_compile_caches():
        first, _, last = planned_at_each_step(Thirds(), BUDGET_MB, 3)
        assert rows(first) != rows(last), "nothing was planned together"
        again, later = planned_at_each_step(Thirds(), BUDGET_MB, 2)
        assert rows(again) == rows(later) == rows(last)
        assert again.planned_peak_bytes == last.planned_peak_bytes
        assert again.predicted_variance == pytest.approx(last.predicted_variance)


def test_a_graph_among_others_is_planned_anew() -> None:
    """The budget holds at once; the next process finds the best plan for the graphs it has."""
    with torch_private.fresh_compile_caches():
        planned_at_each_step(Thirds(), BUDGET_MB, 3)
        (among_others,) = planned_at_each_step(Squares(), BUDGET_MB, 1)
        assert among_others.planned_peak_bytes <= BUDGET_MB * 1e6
        anew = planned_at_each_step(Squares(), BUDGET_MB, 3)
    with torch_private.fresh_compile_caches():
        expected = planned_at_each_step(Squares(), BUDGET_MB, 3)
    assert [kinds(p) for p in anew] == [kinds(p) for p in expected]
    assert kinds(anew[0]) != kinds(anew[-1])
