"""The largest layer's working set: what one call of plain Inductor's step reads and writes."""

from __future__ import annotations

from torch import fx

from fxcompress import torch_private
from fxcompress.errors import FxCompressError
from fxcompress.pareto import trace
from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut, placeholders
from fxcompress.tools.models import Task


def working_set(task: Task) -> int | None:
    """Bytes of activations that the largest operator of the step reads and writes; None where the
    model cannot be traced without data. No step can do with less beside what it keeps saved."""
    try:
        cuts = trace(task.model, dict(task.keywords) or task.inputs)
    except FxCompressError:
        return None
    return max(_largest(cut) for cut in cuts)


def _largest(cut: Cut) -> int:
    inputs = placeholders(cut.forward)
    static = {inputs[i].name for i in cut.static_inputs}  # parameters, under both graphs' names
    most = 0
    for module in (cut.forward, cut.backward):
        for node in module.graph.nodes:
            if node.op != "call_function" or prop.is_view(node):
                continue
            read = {prop.storage_root(n) for n in node.all_input_nodes if n.name not in static}
            most = max(most, sum(map(_bytes, read)) + _bytes(node))
    return most


def _bytes(node: fx.Node) -> int:
    if not prop.is_tensor(node):
        return 0
    value = prop.value(node)
    return torch_private.size_hint(value.numel()) * value.element_size()
