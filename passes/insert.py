"""Insert: encode nodes in the forward, decode nodes in the backward, each where memory is least.

An encode stands directly after its tensor's last forward reader, so that the tensor dies there; a
decode stands directly before its reader. Readers with a matrix product, convolution or attention
between them get a decode each: decoding twice is cheaper than keeping a full tensor alive, except
where the step has room for it (passes/decodes.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

import fxcompress.ops  # noqa: F401  (registers torch.ops.fxcompress)
from fxcompress import rng, torch_private
from fxcompress.codecs import codec
from fxcompress.passes import properties as prop
from fxcompress.passes.standardise import Units, restore

_PROVENANCE = ("stack_trace", "nn_module_stack", "seq_nr", "autograd_backward", "custom")


def insert_key(forward: fx.GraphModule, plan_key: str, like: fx.Node) -> fx.Node:
    """The step's random key, drawn at the top of the forward on the device of ``like``."""
    graph, value = forward.graph, prop.value(like)
    with graph.inserting_after(_last_placeholder(graph)):
        node = graph.call_function(torch.ops.fxcompress.next_key.default, (plan_key, value.device))
    with torch_private.fake_mode_of(value):
        node.meta["val"] = torch.empty(2, dtype=torch.int64, device=value.device)
    return node


def insert_encode(
    forward: fx.GraphModule,
    node: fx.Node,
    spec: str,
    key: fx.Node | None,
    stream: int,
    order: tuple[int, ...],
    *,
    at_once: bool = False,
    units: Units | None = None,
) -> fx.Node:
    """Encode ``node`` after its last reader, or after itself if ``at_once``; the payload node.

    Args:
        units: statistics to standardise it with in the same pass.
    """
    name = "encode" if units is None else "encode_standardised"
    before = () if units is None else (units.mean, units.rstd)
    return _encode(forward, name, node, before, (key, spec, stream, list(order)), at_once=at_once)


def insert_encode_filled(
    forward: fx.GraphModule,
    node: fx.Node,
    fill: fx.Node,
    spec: str,
    key: fx.Node,
    stream: int,
    order: tuple[int, ...],
) -> tuple[fx.Node, fx.Node]:
    """(payload of a ReLU's output with its zeros filled, that of the mask of them), in one pass."""
    graph, arguments = forward.graph, (key, spec, stream, list(order))
    both = _encode(forward, "encode_filled", node, (fill,), arguments)
    with graph.inserting_after(both):
        mask = graph.call_function(operator.getitem, (both, 1))
        payload = graph.call_function(operator.getitem, (both, 0))
    for part, value in zip((payload, mask), both.meta["val"], strict=True):
        part.meta = {**_provenance(node), "val": value}
    return payload, mask


def _encode(
    forward: fx.GraphModule,
    name: str,
    node: fx.Node,
    before: tuple[fx.Node, ...],
    arguments: tuple[Any, ...],
    *,
    at_once: bool = False,
) -> fx.Node:
    graph, target = forward.graph, getattr(torch.ops.fxcompress, name).default
    readers = [] if at_once else [u for u in node.users if u.op != "output"]
    nodes = [node, *before, *arguments[:1]]
    with graph.inserting_after(_last([*(n for n in nodes if n is not None), *readers])):
        payload = graph.call_function(target, (node, *before, *arguments))
    with torch_private.fake_mode_of(prop.value(node)):
        given = [n if n is None else prop.value(n) for n in nodes]
        encoded = target(*given, *arguments[1:])
    payload.meta = {**_provenance(node), "val": encoded}
    return payload


def insert_to_host(
    forward: fx.GraphModule, node: fx.Node, order: tuple[int, ...] = (0,)
) -> fx.Node:
    """Copy a tensor or a payload to host memory after its last reader; the node to be saved."""
    readers = [u for u in node.users if u.op != "output"]
    with forward.graph.inserting_after(_last([node, *readers])):
        target = torch.ops.fxcompress.to_host.default
        moved = forward.graph.call_function(target, (node, list(order)))
    with torch_private.fake_mode_of(prop.value(node)):
        value = target(prop.value(node), order)
    moved.meta = {**_provenance(node), "val": value}
    return moved


def insert_fetches(
    backward: fx.GraphModule, node: fx.Node, moved: fx.Node, order: tuple[int, ...]
) -> None:
    """Let every reader of ``node`` read a copy of ``moved`` on the device instead."""
    graph, value = backward.graph, prop.value(node)
    for cluster in clusters([u for u in node.users if u.op != "output"]):
        with graph.inserting_before(cluster[0]):
            shape = torch_private.size_arguments(graph, value)
            fetched = _to_device(graph, moved, value.device, shape, order)
        fetched.meta["val"] = _laid_out(value, order, value.dtype)
        for reader in cluster:
            reader.replace_input_with(node, fetched)


def insert_decodes(
    backward: fx.GraphModule,
    node: fx.Node,
    payload: fx.Node,
    spec: str,
    key: fx.Node | None,
    stream: int,
    order: tuple[int, ...],
    *,
    coded: torch.dtype | None = None,
    units: Units | None = None,
    mask: fx.Node | None = None,
    host: bool = False,
    inline: bool = False,
) -> None:
    """Let every reader of ``node`` read a decode of ``payload`` instead.

    Args:
        coded: dtype of what was encoded, where that is not the one of ``node``.
        units: statistics to undo a standardisation with.
        mask: payload of the mask of what is zero, where the decode is to see to that.
        host: the payload lies in host memory.
        inline: decode by operations on each element, for Inductor to fuse with the readers.
    """
    graph, value = backward.graph, prop.value(node)
    coded = value.dtype if coded is None else coded
    name, masks = ("decode", ()) if mask is None else ("decode_filled", (mask,))
    readers = [u for u in node.users if u.op != "output"]
    for cluster in clusters(readers):
        with graph.inserting_before(cluster[0]):
            shape = torch_private.size_arguments(graph, value)
            here = _to_device(graph, payload, value.device) if host else payload
            if inline:
                like = _laid_out(value, order, coded)
                decoded = _inlined(graph, here, key, spec, stream, order, like, cluster[0])
            else:
                decoded = graph.call_function(
                    getattr(torch.ops.fxcompress, name).default,
                    (here, *masks, key, spec, stream, shape, list(order), coded),
                )
                found = _laid_out(value, order, coded)
                decoded.meta = {**_provenance(cluster[0]), "val": found}
            if units is not None:
                decoded = restore(graph, decoded, units, value.dtype)
        for reader in cluster:
            reader.replace_input_with(node, decoded)


def insert_fence(graph: fx.Graph, tensors: Sequence[fx.Node]) -> fx.Node:
    """A call at the insertion point that is said to write to the tensors: see ``ops.fence``."""
    fence = graph.call_function(torch.ops.fxcompress.fence.default, (list(tensors),))
    fence.meta["val"] = None
    return fence


def advance_views(forward: fx.GraphModule, saved: Iterable[fx.Node]) -> None:
    """Bring saved views to what they view: AOTAutograd leaves them at the end of the forward, where
    they would be encoded, and all the memory under them would wait for it."""
    for node in saved:
        chain = []
        while prop.is_view(node) and isinstance(node.args[0], fx.Node):
            chain.append(node)
            node = node.args[0]
        for view in reversed(chain):
            _last(view.all_input_nodes).append(view)


def insert_blank(backward: fx.GraphModule, node: fx.Node) -> None:
    """Give readers that look at sizes only a tensor without memory: one zero, expanded."""
    graph, value = backward.graph, prop.value(node)
    readers = sorted(u for u in node.users if u.op != "output")
    if not readers:
        return
    with graph.inserting_before(readers[0]):
        shape = torch_private.size_arguments(graph, value)
        zero = graph.call_function(
            torch.ops.aten.full.default,
            ([], 0.0),
            {"dtype": value.dtype, "device": value.device, "pin_memory": False},
        )
        blank = graph.call_function(torch.ops.aten.expand.default, (zero, shape))
    with torch_private.fake_mode_of(value):
        zero.meta["val"] = torch.full([], 0.0, dtype=value.dtype, device=value.device)
        blank.meta["val"] = zero.meta["val"].expand(value.shape)
    for reader in readers:
        reader.replace_input_with(node, blank)


def clusters(readers: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Readers in graph order, split where an op that does not fuse stands between two of them."""
    found: list[list[fx.Node]] = []
    for reader in sorted(set(readers)):
        if found and not _is_parted(found[-1][-1], reader):
            found[-1].append(reader)
        else:
            found.append([reader])
    return found


def _is_parted(first: fx.Node, second: fx.Node) -> bool:
    node = first.next
    while node is not second:
        if prop.is_extern(node):
            return True
        node = node.next
    return False


def _inlined(
    graph: fx.Graph,
    payload: fx.Node,
    key: fx.Node | None,
    spec: str,
    stream: int,
    order: tuple[int, ...],
    coded: torch.Tensor,
    reader: fx.Node,
) -> fx.Node:
    """A decode as operations on each element, at the graph's insertion point."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    stored = [coded.shape[d] for d in order]

    def decode(payload: torch.Tensor, *key: torch.Tensor) -> torch.Tensor:
        keys = rng.stream_keys(key[0], stream) if key else None
        flat = codec(spec).pointwise(payload, coded.numel(), coded.dtype, keys)
        return flat.view(stored).permute(inverse)

    given = [node for node in (payload, key) if node is not None]
    with torch_private.fake_mode_of(prop.value(payload)):
        traced = torch_private.traced(decode, [prop.value(node) for node in given])
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    (result,) = traced.graph.output_node().args
    for node in traced.graph.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {**_provenance(reader), "val": node.meta["val"]}
    return copies[result]


def _laid_out(value: torch.Tensor, order: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor of the shape of ``value`` whose memory is contiguous in ``order``."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    with torch_private.fake_mode_of(value):
        dense = torch.empty([value.shape[d] for d in order], dtype=dtype, device=value.device)
        return dense.permute(inverse)


def _to_device(
    graph: fx.Graph,
    moved: fx.Node,
    device: torch.device,
    shape: Sequence[Any] = (-1,),
    order: Sequence[int] = (0,),
) -> fx.Node:
    """A copy on the device of a payload or, given its shape and order, of a tensor."""
    arguments = (moved, device, list(shape), list(order))
    node = graph.call_function(torch.ops.fxcompress.to_device.default, arguments)
    with torch_private.fake_mode_of(prop.value(moved)):
        node.meta["val"] = torch.empty_like(prop.value(moved), device=device)
    return node


def _last(nodes: Sequence[fx.Node]) -> fx.Node:
    """The last of some nodes, after which others may be inserted: inputs come first."""
    last = max(nodes)
    return _last_placeholder(last.graph) if last.op == "placeholder" else last


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return max(graph.find_nodes(op="placeholder"))


def _provenance(node: fx.Node) -> dict[str, Any]:
    return {k: node.meta[k] for k in _PROVENANCE if k in node.meta}
