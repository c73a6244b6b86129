"""Hoist: compute in the forward, on exact data, what the backward would have computed from a copy.

The backward holds forward-only nodes (comparisons, pooling indices) that must not see a decoded
tensor. Each has a twin in the forward graph: the same expression over the same values. Most often
it is there already; where it is not, the missing nodes are copied right after their inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import fx

from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut, placeholders


def can_hoist(node: fx.Node, tainted: set[fx.Node]) -> bool:
    """Every node that ``node`` is computed from may be evaluated again."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            continue
        if current in tainted or not prop.is_pure(current):
            return False
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        pending.extend(new)
    return True


def forward_twins(cut: Cut, nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The forward graph's own node for each backward node, copied in where it was missing.

    Args:
        cut: its forward graph is changed in place.
        nodes: backward nodes that pass :func:`can_hoist`.

    Returns:
        backward node → forward node of equal value.
    """
    twins, known = _received(cut), _expressions(cut.forward.graph)

    def twin(node: fx.Node) -> fx.Node:
        if node in twins:
            return twins[node]
        for needed in _in_order(node, twins):
            args = fx.node.map_arg(needed.args, lambda n: twins[n])
            kwargs = fx.node.map_arg(needed.kwargs, lambda n: twins[n])
            key = _key(needed, args, kwargs)
            found = known.get(key) if key is not None else None
            if found is None:
                inputs: list[fx.Node] = []
                fx.node.map_arg((args, kwargs), inputs.append)
                with _after(cut.forward.graph, inputs):
                    found = cut.forward.graph.call_function(needed.target, args, kwargs)  # type: ignore[arg-type]
                found.meta = dict(needed.meta)
                found.meta.pop("autograd_backward", None)
                if key is not None:
                    known[key] = found
            twins[needed] = found
        return twins[node]

    return {node: twin(node) for node in nodes}


def known_twins(cut: Cut) -> dict[fx.Node, fx.Node]:
    """The forward's node of equal value for each node of the backward that has one already."""
    twins, known = _received(cut), _expressions(cut.forward.graph)
    for node in cut.backward.graph.nodes:
        if node.op == "call_function" and all(n in twins for n in node.all_input_nodes):
            args = fx.node.map_arg(node.args, lambda n: twins[n])
            key = _key(node, args, fx.node.map_arg(node.kwargs, lambda n: twins[n]))
            if key in known:
                twins[node] = known[key]
    return twins


def _received(cut: Cut) -> dict[fx.Node, fx.Node]:
    """Backward placeholder → what it holds in the forward: a saved tensor or an input."""
    twins = {s.backward: s.forward for s in cut.saved}
    by_name = {p.name: p for p in placeholders(cut.forward)}
    for received in placeholders(cut.backward):
        if received not in twins and received.name in by_name:
            twins[received] = by_name[received.name]
    return twins


def _expressions(graph: fx.Graph) -> dict[Hashable, fx.Node]:
    """What can be evaluated again, by operator and arguments."""
    return {
        key: node
        for node in graph.nodes
        if node.op == "call_function" and prop.is_pure(node)
        for key in [_key(node, node.args, node.kwargs)]
        if key is not None
    }


def _in_order(node: fx.Node, have: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Nodes missing from ``have`` that ``node`` needs, itself last, in graph order."""
    pending, missing = [node], {node}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in have and source not in missing:
                missing.add(source)
                pending.append(source)
    return sorted(missing)


def _after(graph: fx.Graph, inputs: list[fx.Node]) -> Any:
    last = max(inputs, default=None)
    if last is None or last.op == "placeholder":
        last = max(graph.find_nodes(op="placeholder"))
    return graph.inserting_after(last)


def _key(node: fx.Node, args: Any, kwargs: Any) -> Hashable | None:
    """Equal for two nodes only if they compute the same value from the same inputs."""
    try:
        key = (node.target, _frozen(args), _frozen(kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, (bool, int, float)):
        return (type(value), value)  # 1, 1.0 and True are equal but not the same argument
    return value  # type: ignore[no-any-return]
