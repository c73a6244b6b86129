"""Booleans: packed masks pass Inductor's code in the order of their payload, and on CPU as bytes.

A mask of a channels-last tensor was written with its channels slowest, by a loop of its own that
turned it, and turned back before it was packed: its layout was decided when that of the ReLU was
still open. So Inductor is told.

The CPU code moves a boolean tensor from and to memory element by element: writing a mask beside the
ReLU that it belongs to took 31 ms where the ReLU took 2, and reading it in a `where` 12 ms instead
of 1.2 (3.2 M elements, one Zen 5 core, AVX-512, torch 2.14). Bytes that come from fp32, or go to
it, move in vectors, and a comparison with 0 makes them a mask again, in registers. The payload is
the same.

Only where Inductor computes the mask itself and fuses it with all of its readers: what a call
writes or wants is in memory as booleans anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut
from fxcompress.passes.standardise import call

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default


def masks_as_bytes(cut: Cut) -> None:
    """Let encodes take masks as their payload has them, in place; those on CPU take bytes, and
    decodes give them."""
    for node in cut.forward.graph.find_nodes(
        op="call_function", target=torch.ops.fxcompress.encode.default
    ):
        if _is_mask(node.args[0]) and prop.is_pointwise(node.args[0]):
            with cut.forward.graph.inserting_before(node):
                _give_stored(cut.forward.graph, node)
    for node in cut.backward.graph.find_nodes(
        op="call_function", target=torch.ops.fxcompress.decode.default
    ):
        if not (_is_mask(node) and _on_cpu(node)):
            continue
        if not any(prop.is_extern(reader) for reader in node.users):
            _decode_bytes(cut.backward.graph, node)
    for module in (cut.forward, cut.backward):
        module.graph.lint()
        module.recompile()


def _give_stored(graph: fx.Graph, node: fx.Node) -> None:
    arguments: tuple[Any, ...] = node.args
    given, key, codec, stream, order = arguments
    if _on_cpu(given):
        numbers = call(graph, _CONVERT, given, torch.float32)
        given = call(graph, _CONVERT, numbers, torch.uint8)
    if order != sorted(order) and not prop.has_symbols(given):
        given = torch_private.laid_out_as(graph, given, _strides(prop.value(given).shape, order))
    node.args = (given, key, codec, stream, order)


def _strides(shape: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """Of a tensor whose memory is dense, `order` from its slowest axis to its fastest."""
    strides, step = [0] * len(order), 1
    for axis in reversed(order):
        strides[axis], step = step, step * shape[axis]
    return strides


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
    return prop.value(node).dtype == torch.bool


def _on_cpu(node: fx.Node) -> bool:
    return prop.value(node).device.type == "cpu"
