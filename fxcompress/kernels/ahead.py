"""Ahead: GPU kernels are built side by side, before the step that needs them all comes by.

Triton compiles a kernel when it is first called, one after the other: a second or more each, where
a model's first step calls dozens. Which ones a graph will call follows from its nodes, so their
compilation starts in threads as soon as the graph is rewritten, while Inductor compiles the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import ops, torch_private
from fxcompress.kernels import triton

log = logging.getLogger("fxcompress")

_CODING: Mapping[Any, Callable[..., object]] = {
    torch.ops.fxcompress.encode.default: ops.encode,
    torch.ops.fxcompress.decode.default: ops.decode,
    torch.ops.fxcompress.encode_filled.default: ops.encode_filled,
    torch.ops.fxcompress.encode_standardised.default: ops.encode_standardised,
    torch.ops.fxcompress.decode_filled.default: ops.decode_filled,
}


def build_for(graphs: Iterable[fx.GraphModule]) -> None:
    """Start building what coding operators of these graphs, on GPUs, will launch."""
    nodes = [n for g in graphs for n in g.graph.nodes if n.target in _CODING and _is_on_gpu(n)]
    build([partial(_called, node) for node in nodes])


def build(calls: Iterable[Callable[[], object]]) -> None:
    """Start building what these calls, of codecs on meta tensors, would launch on a GPU."""
    with torch_private.outside_compile():  # where tensors would be fake, without an address
        with triton.recorded(triton.warp_size()) as launches:
            for call in calls:
                try:
                    call()
                except Exception as error:  # it is built when it is called
                    log.info("a kernel is not built ahead: %s", error)
        triton.build_ahead(launches)


def _is_on_gpu(node: fx.Node) -> bool:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(x, Tensor) and x.device.type == "cuda" for x in leaves)


def _called(node: fx.Node) -> object:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _meta(n.meta["val"]))
    return _CODING[node.target](*args, **kwargs)


def _meta(value: Any) -> Any:
    """A tensor of these sizes without data; a number for a symbolic size."""
    if not isinstance(value, Tensor):
        return torch_private.size_hint(value)
    size, stride = (
        [torch_private.size_hint(x) for x in xs] for xs in (value.shape, value.stride())
    )
    return torch.empty_strided(size, stride, dtype=value.dtype, device="meta")
