"""Rebase: a buffer saved twice under two views is saved once; the views are taken again.

Attention, for one, saves its output both as the fused backward wants it and as the next matrix
product read it: one buffer for plain Inductor, two payloads if each view were encoded.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut, Saved, output_node, pair, receive


def rebase(cut: Cut) -> Cut:
    """Where saved views of one buffer overlap, save the buffer instead, in place."""
    by_root: dict[fx.Node, list[Saved]] = defaultdict(list)
    for saved in cut.saved:
        by_root[prop.storage_root(saved.forward)].append(saved)
    held = {prop.storage_root(node) for node in cut.outputs if isinstance(node, fx.Node)}
    changed = False
    for root, views in by_root.items():
        if root.op == "placeholder" or root in held or not prop.is_tensor(root):
            continue
        total = sum(_numel(v.forward) for v in views)
        if (
            len(views) > 1
            and total > _numel(root)
            and all(_is_chain(v.forward, root) for v in views)
        ):
            _save_root(cut, root, views)
            changed = True
    if not changed:
        return cut
    torch_private.describe_saved(output_node(cut.forward), cut.num_outputs)
    return pair(cut.forward, cut.backward, cut.num_outputs, cut.static_inputs)


def _save_root(cut: Cut, root: fx.Node, views: list[Saved]) -> None:
    graph = cut.backward.graph
    first = views[0]
    received = receive(cut.backward, root, first.backward)
    torch_private.copy_unchecked_mark(first.forward, root)
    torch_private.copy_unchecked_mark(first.forward, received)
    for view in views:
        readers = sorted(u for u in view.backward.users if u.op != "output")
        current = received
        if readers:
            with graph.inserting_before(readers[0]):
                for step in _chain(view.forward, root):
                    args = (current, *step.args[1:])
                    taken = graph.call_function(step.target, args, dict(step.kwargs))  # type: ignore[arg-type]
                    taken.meta = dict(step.meta)
                    current = taken
        view.backward.replace_all_uses_with(current)
        graph.erase_node(view.backward)
    output = output_node(cut.forward)
    values = list(output.args[0])  # type: ignore[arg-type]
    replaced = {v.forward for v in views}
    place = values.index(first.forward, cut.num_outputs)
    before = [n for n in values[cut.num_outputs : place] if n not in replaced]
    after = [n for n in values[place + 1 :] if n not in replaced]
    output.args = ((*values[: cut.num_outputs], *before, root, *after),)


def _chain(view: fx.Node, root: fx.Node) -> list[fx.Node]:
    """View ops from ``root`` to ``view``, in order."""
    steps: list[fx.Node] = []
    while view is not root:
        steps.append(view)
        view = view.args[0]  # type: ignore[assignment]
    return steps[::-1]


def _is_chain(view: fx.Node, root: fx.Node) -> bool:
    """Every step has the tensor as its only node argument, so that it can be taken again."""
    return all(
        prop.is_tensor(step) and step.all_input_nodes == [step.args[0]]
        for step in _chain(view, root)
    )


def _numel(node: fx.Node) -> int:
    return torch_private.size_hint(prop.value(node).numel())
