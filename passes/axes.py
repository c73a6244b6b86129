"""Axes: in which order a tensor lies in memory, and which of its axes holds the channels."""

from __future__ import annotations

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop

_MAP_OPS = frozenset(
    """
    convolution native_batch_norm _native_batch_norm_legit_functional max_pool2d_with_indices
    _low_memory_max_pool_with_offsets avg_pool2d _adaptive_avg_pool2d max_pool3d_with_indices
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)


def storage_order(value: torch.Tensor, channels_last: bool) -> tuple[int, ...]:
    """Dimensions from slowest to fastest in memory, as Inductor will lay the tensor out.

    Encoding in this order reads memory front to back. A wrong guess costs a copy, never a wrong
    value: the op permutes by this order and copies only if that is not contiguous.

    Args:
        value: the fake tensor.
        channels_last: Inductor lays feature maps of this graph out with channels fastest.
    """
    strides = [torch_private.size_hint(s) for s in value.stride()]
    sizes = [torch_private.size_hint(s) for s in value.shape]
    by_stride = sorted(range(value.dim()), key=lambda d: (-strides[d], d))
    is_feature_map = value.dim() in (4, 5) and by_stride == list(range(value.dim()))
    if channels_last and is_feature_map and sizes[1] > 1 and max(sizes[2:]) > 1:
        return (0, *range(2, value.dim()), 1)
    return tuple(by_stride)


def feature_maps(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose dimension 1 holds channels: convolutions, poolings, and what is computed
    element by element from or into their maps."""
    found: set[fx.Node] = set()
    pending = []
    for node in graph.nodes:
        if prop.op_name(node) in _MAP_OPS:
            pending += [node, node.args[0], *node.users]
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in found or not prop.is_tensor(node):
            continue
        if prop.value(node).dim() < 3 or prop.is_view(node):
            continue
        found.add(node)
        shape = prop.value(node).shape
        for other in (*node.all_input_nodes, *node.users):
            if prop.is_tensor(other) and prop.value(other).shape == shape:
                pending.append(other)
    return found


def channel_dim(node: fx.Node, maps: set[fx.Node]) -> int:
    """The dimension of a node's value that holds channels or features: 1 for feature maps,
    otherwise the last."""
    return 1 if node in maps else max(prop.value(node).dim() - 1, 0)
