"""Attention: give the fused backward results that agree with decoded operands.

The backward rebuilds probabilities as ``exp(q·k − lse)``. With decoded q, k and the exact lse
these exceed 1 without bound (DESIGN, fact 12). Its row-wise correction is ``Σ dO·O``: where O is
not that of the v at hand, noise that it would take out of each row stays (with v alone at 4 bits in
the first layer of a ViT, 25 times the noise; with O alone, 400 times). So wherever one of them is
noisy the fused forward runs again on q, k and v as they are, and gives both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

from fxcompress import torch_private
from fxcompress.passes.properties import value


def repeat_attention(backward: fx.GraphModule, readers: Iterable[fx.Node]) -> None:
    """Recompute output and lse before each of ``readers`` (fused attention backwards), in place."""
    for node in readers:
        found = torch_private.attention_forward(node)
        assert found is not None, "the planner asks only for forms that can be repeated"
        op, rest, keywords = found
        _, query, key, val, *_ = node.args
        out_at, lse_at = torch_private.attention_statistics(node)
        with backward.graph.inserting_before(node):
            again = backward.graph.call_function(op, (query, key, val, *rest), keywords)
            out = backward.graph.call_function(operator.getitem, (again, 0))
            lse = backward.graph.call_function(operator.getitem, (again, 1))
        old_out, old_lse = node.args[out_at], node.args[lse_at]
        assert isinstance(old_out, fx.Node)
        assert isinstance(old_lse, fx.Node)
        again.meta = {**node.meta, "val": (value(old_out), value(old_lse))}
        out.meta = {**node.meta, "val": value(old_out)}
        lse.meta = {**node.meta, "val": value(old_lse)}
        args = list(node.args)
        args[out_at], args[lse_at] = out, lse
        node.args = tuple(args)
