"""Attention: give the fused backward a softmax statistic that agrees with decoded q and k.

The backward rebuilds probabilities as ``exp(q·k − lse)``. With decoded q, k and the exact lse
these exceed 1 without bound (DESIGN, fact 12). Running the fused forward again on the decoded
tensors gives an lse under which every row sums to 1 whatever the noise; its output replaces the
saved one, so the row-wise correction ``Σ dO·O`` agrees too.
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
