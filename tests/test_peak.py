"""The model of the peak, where a measured peak (test_budget.py) does not tell."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, fx, nn

from fxcompress.pareto import trace
from fxcompress.passes.insert import clusters
from fxcompress.pipeline import plan_graph
from fxcompress.settings import make


def test_graphs_deeper_than_python_recurses() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            y = x = x @ self.weight
            for _ in range(sys.getrecursionlimit()):
                y = y + x.sigmoid()
            return (y @ self.weight).square().mean()

    (cut,) = trace(Deep(), torch.randn(32, 32))
    found = plan_graph(cut, make(policy="uniform4", inner="aot_eager", min_bytes=0))
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
