"""Booleans: packed masks pass Inductor's CPU code as bytes.

That code moves a boolean tensor from and to memory element by element: writing a mask beside the
ReLU that it belongs to took 31 ms where the ReLU took 2, and reading it in a `where` 12 ms instead
of 1.2 (3.2 M elements, one Zen 5 core, AVX-512, torch 2.14). Bytes that come from fp32, or go to
it, move in vectors, and a comparison with 0 makes them a mask again, in registers. The payload is
the same.

Only where Inductor computes the mask itself and fuses it with all of its readers: what a call
writes or wants is in memory as booleans anyway.
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut
from fxcompress.passes.standardise import call

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default


def masks_as_bytes(cut: Cut) -> None:
    """Let encodes of masks on CPU take bytes, and decodes give them, in place."""
    for node in cut.forward.graph.find_nodes(
        op="call_function", target=torch.ops.fxcompress.encode.default
    ):
        mask = node.args[0]
        if _is_mask(mask) and prop.is_pointwise(mask):
            with cut.forward.graph.inserting_before(node):
                numbers = call(cut.forward.graph, _CONVERT, mask, torch.float32)
                given = call(cut.forward.graph, _CONVERT, numbers, torch.uint8)
            node.replace_input_with(mask, given)
    for node in cut.backward.graph.find_nodes(
        op="call_function", target=torch.ops.fxcompress.decode.default
    ):
        if _is_mask(node) and not any(prop.is_extern(reader) for reader in node.users):
            _decode_bytes(cut.backward.graph, node)
    for module in (cut.forward, cut.backward):
        module.graph.lint()
        module.recompile()


def _decode_bytes(graph: fx.Graph, node: fx.Node) -> None:
    readers, value = list(node.users), prop.value(node)
    node.args = (*node.args[:-1], torch.uint8)
    with torch_private.fake_mode_of(value):
        node.meta["val"] = value.to(torch.uint8)
    with graph.inserting_after(node):
        end = call(graph, aten.alias.default, node)
    with graph.inserting_before(end):
        mask = call(graph, aten.ne.Scalar, call(graph, _CONVERT, node, torch.float32), 0)
    graph.erase_node(end)
    for reader in readers:
        reader.replace_input_with(node, mask)


def _is_mask(node: object) -> bool:
    if not isinstance(node, fx.Node) or not prop.is_tensor(node):
        return False
    value = prop.value(node)
    return value.dtype == torch.bool and value.device.type == "cpu"
