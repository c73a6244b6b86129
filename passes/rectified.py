"""Rectified: half of a ReLU's output is known from its mask, which is saved anyway.

Where the backward needs both the mask ``y <= 0`` and the values of ``y = relu(x)``, the values are
coded with every zero replaced by the mean of the positive ones, and what is decoded is set to zero
again under the mask. The zeros come back exact, and the positive values have less spread than all
of them: for a rectified normal half the variance, on half of the elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.insert import clusters
from fxcompress.passes.standardise import call

aten = torch.ops.aten


def mask_of(candidate: Candidate) -> fx.Node | None:
    """The backward's node ``y <= 0`` of a saved ReLU output; None for other tensors."""
    node = candidate.saved.backward
    if candidate.saved.forward.target is not aten.relu.default or not candidate.smooth:
        return None
    return next(
        (m for m in candidate.exact if m.target is aten.le.Scalar and m.args == (node, 0)), None
    )


def filled(values: Tensor) -> Tensor:
    """What is coded of ``values``: zeros replaced by the mean of the positive values."""
    positive = values > 0
    mean = values.sum() / positive.sum().clamp(min=1)
    return torch.where(positive, values, mean.nan_to_num(0.0, 0.0, 0.0).to(values.dtype))


def insert_fill(forward: fx.GraphModule, node: fx.Node, mask: fx.Node) -> fx.Node:
    """What `filled` puts in the place of zeros, as nodes after the last reader of ``node``; 0-dim.

    ``mask``: the node ``node <= 0``.
    """
    graph = forward.graph
    last = max([mask, *(u for u in node.users if u.op != "output")])
    with graph.inserting_after(last):
        end = call(graph, aten.alias.default, node)
    with graph.inserting_before(end):
        positive = call(graph, aten.logical_not.default, mask)
        count = call(graph, aten.clamp_min.default, call(graph, aten.sum.default, positive), 1)
        mean = call(graph, aten.div.Tensor, call(graph, aten.sum.default, node), count)
        # Not nan_to_num: Inductor decomposes it before the cut and cannot lower it after.
        finite = call(graph, aten.lt.Scalar, call(graph, aten.abs.default, mean), math.inf)
        fill = call(graph, aten.where.self, finite, mean, _zero(graph, prop.value(node)))
    graph.erase_node(end)
    return fill


def insert_filled(forward: fx.GraphModule, node: fx.Node, mask: fx.Node) -> fx.Node:
    """`filled` as a node after the last reader of ``node``; ``mask``: the node ``node <= 0``."""
    fill = insert_fill(forward, node, mask)
    with forward.graph.inserting_after(fill):
        return call(forward.graph, aten.where.self, mask, fill, node)


def insert_masked(backward: fx.GraphModule, candidate: Candidate) -> fx.Node:
    """Let readers of a ReLU's output read ``where(mask, 0, y)``, the same value; the mask."""
    graph, node, mask = backward.graph, candidate.saved.backward, mask_of(candidate)
    assert mask is not None
    value = prop.value(node)
    readers = [u for u in node.users if u.op != "output" and u not in candidate.exact]
    for cluster in clusters(readers):
        with graph.inserting_before(cluster[0]):
            masked = call(graph, aten.where.self, mask, _zero(graph, value), node)
        for reader in cluster:
            reader.replace_input_with(node, masked)
    return mask


def _zero(graph: fx.Graph, like: Tensor) -> fx.Node:
    """A scalar of ``like``'s dtype on its device."""
    zero = graph.call_function(
        aten.full.default, ([], 0.0), {"dtype": like.dtype, "device": like.device}
    )
    with torch_private.fake_mode_of(like):
        zero.meta["val"] = like.new_zeros([])
    return zero
