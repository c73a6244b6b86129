"""The model of the peak, where a measured peak (test_budget.py) does not tell."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.pareto import trace
from fxcompress.passes.insert import clusters
from fxcompress.pipeline import plan_graph
from fxcompress.settings import make
from fxcompress.tools.memory import measure_step

DEPTH = 400  # of a graph: more than Python may then recurse


def planned_and_measured(model: nn.Module, x: Tensor, policy: str) -> tuple[int, int]:
    torch._dynamo.reset()
    backend = fxcompress.backend(policy=policy, min_bytes=0)
    compiled = torch.compile(model, backend=backend)

    def step() -> None:
        compiled(x).backward()

    step()
    measured = measure_step(step, model.parameters()).peak_bytes
    return backend.plan().planned_peak_bytes, measured


@pytest.mark.parametrize("policy", ["uniform4", "lossless"])
def test_views_of_weights_are_no_memory(policy: str) -> None:
    """Few rows beside wide layers: their transposes, read by the backward, would show."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(64, 512), nn.Linear(512, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.narrow(F.gelu(self.wide(x)))).square().mean()

    planned, measured = planned_and_measured(Wide(), torch.randn(64, 64), policy)
    assert planned == pytest.approx(measured, rel=0.01)


def test_graphs_deeper_than_python_recurses() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            y = x = x @ self.weight
            for _ in range(DEPTH):
                y = y + x.sigmoid()
            return (y @ self.weight).square().mean()

    (cut,) = trace(Deep(), torch.randn(32, 32))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(DEPTH)  # PyTorch takes a minute to trace as many as the usual limit
    try:
        found = plan_graph(cut, make(policy="uniform4", inner="aot_eager", min_bytes=0))
    finally:
        sys.setrecursionlimit(limit)
    assert any("affine" in t.representation for t in found.plan.tensors)


def test_readers_are_parted_by_what_does_not_fuse() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.call_function(torch.ops.aten.neg.default, (first,))
    second = graph.call_function(torch.ops.aten.cos.default, (x,))
    product = graph.call_function(torch.ops.aten.mm.default, (x, x))
    third = graph.call_function(torch.ops.aten.tan.default, (x,))
    assert clusters([third, first, second]) == [[first, second], [third]]
    assert clusters([first, product, third]) == [[first, product, third]]
    assert clusters([]) == []
