"""Export: a plan for viewers made by others: Google's Model Explorer, and Perfetto."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from fxcompress.plan import Plan, TensorPlan
from fxcompress.tools.dump import readers
from fxcompress.tools.viz_tree import KINDS, tensor_kind

GRAPH = "plan"  # id of the one graph: node data name it


def explorer_graph(plan: Plan, title: str) -> str:
    """The saved tensors as a graph that Model Explorer opens, nested by module.

    Each tensor is a node, in the order of the forward; every module's backward is one more, which
    reads what the module saved.
    """
    nodes = []
    backward: dict[str, list[str]] = {}
    for name, tensor in _named(plan):
        backward.setdefault(tensor.module, []).append(name)
        facts = {
            "representation": tensor.representation,
            "shape": "×".join(map(str, tensor.shape)) or "scalar",
            "dtype": tensor.dtype.removeprefix("torch."),
            "bytes before": tensor.storage_bytes,
            "bytes after": tensor.bytes_after,
            "readers": ", ".join(readers(tensor)),
            "source": tensor.source,
            "reason": tensor.reason,
        }
        attributes = [{"key": k, "value": str(v)} for k, v in facts.items() if v not in ("", None)]
        label = f"{name} ({tensor.op})"
        nodes.append(_node(name, label, f"forward.{tensor.module}", [], attributes))
    for module, saved in reversed(backward.items()):
        name = f"backward of {module or 'the model'}"
        nodes.append(_node(name, "backward", f"backward.{module}", saved, []))
    modules = [f"backward of {module or 'the model'}" for module in reversed(backward)]
    by_name = {node["id"]: node for node in nodes}
    for first, second in pairwise(modules):
        edges = by_name[second]["incomingEdges"]
        assert isinstance(edges, list)
        edges.append({"sourceNodeId": first, "targetNodeInputId": "gradient"})
    return json.dumps({"label": title, "graphs": [{"id": GRAPH, "nodes": nodes}]}, indent=1)


def explorer_bits(plan: Plan) -> str:
    """Node data for :func:`explorer_graph`: bits an element, in the colours of the other views."""
    results = {
        name: {"value": round(tensor.bits, 3), "bgColor": KINDS[tensor_kind(tensor)].colour}
        for name, tensor in _named(plan)
    }
    return json.dumps({GRAPH: {"results": results}}, indent=1)


def perfetto(plan: Plan) -> str:
    """Counter tracks of live bytes, as a JSON trace (Perfetto, chrome://tracing).

    A plan knows an order, not times: one microsecond stands for one moment of its timeline.
    """
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "fxcompress plan"}}
    ]
    for at, moment in enumerate(plan.timeline):
        live = {"planned": moment.planned_bytes, "all kept": moment.plain_bytes}
        if plan.measured:
            live["measured (by time)"] = plan.measured[at]
        events += [
            {"ph": "C", "pid": 1, "ts": at, "name": f"live bytes, {name}", "args": {"bytes": size}}
            for name, size in live.items()
        ]
        place = {"name": moment.module or moment.node, "args": {"node": moment.node}}
        events.append({"ph": "X", "pid": 1, "tid": moment.phase, "ts": at, "dur": 1, **place})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})


def _node(
    name: str, label: str, path: str, inputs: list[str], attributes: list[dict[str, str]]
) -> dict[str, object]:
    return {
        "id": name,
        "label": label,
        "namespace": path.strip(".").replace(".", "/"),
        "attrs": attributes,
        "incomingEdges": [
            {"sourceNodeId": source, "targetNodeInputId": str(i)} for i, source in enumerate(inputs)
        ],
    }


def _named(plan: Plan) -> Iterator[tuple[str, TensorPlan]]:
    """Tensors by unique names: the graphs of one model may use a name again."""
    seen: Counter[str] = Counter()
    for tensor in plan.tensors:
        seen[tensor.name] += 1
        again = seen[tensor.name]
        yield (tensor.name if again == 1 else f"{tensor.name} ({again})"), tensor
