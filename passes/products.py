"""Products: a matrix product stays where it is, though its result is added to something later.

Inductor turns ``mm`` and the ``add`` that alone reads it into one ``addmm`` in the place of the
``add`` (torch 2.11 to 2.15, `post_grad.addmm`), and what the product reads lives until then. Where
a weight is used twice, as the embedding of a GPT that is its last layer too, that is from the first
product of the backward to its end: logits and the input of the last layer outlived all else, 4.4 of
70 MB at the peak of a small GPT at 12 times fewer saved bytes. ``mm - (-y)`` is the same number,
and no pattern of Inductor's.
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut, placeholders
from fxcompress.passes.standardise import call

aten = torch.ops.aten


def held_for_sums(cut: Cut) -> list[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """(product, the sum it is put off to, operands held meanwhile) of the backward, where these are
    more than the product itself."""
    received = {s.backward: s.forward for s in cut.saved}
    static = {n for i, n in enumerate(placeholders(cut.forward)) if i in cut.static_inputs}
    place = {node: i for i, node in enumerate(cut.backward.graph.nodes)}
    found = []
    for product in cut.backward.graph.find_nodes(op="call_function", target=aten.mm.default):
        total = next(iter(product.users), None)
        if len(product.users) != 1 or total is None or total.target is not aten.add.Tensor:
            continue
        roots = dict.fromkeys(prop.storage_root(n) for n in product.all_input_nodes)
        held = [
            root
            for root in roots
            if received.get(root) not in static
            and all(place[r] < place[total] for r in prop.readers(root))
        ]
        if sum(map(prop.tensor_bytes, held)) > prop.tensor_bytes(product):
            found.append((product, total, held))
    return found


def keep_products(cut: Cut) -> None:
    """Let no product that :func:`held_for_sums` finds be put off, in place."""
    graph = cut.backward.graph
    for product, total, _ in held_for_sums(cut):
        other = next((n for n in total.all_input_nodes if n is not product), None)
        if other is None or total.kwargs:
            continue
        with graph.inserting_before(total):
            difference = call(graph, aten.sub.Tensor, product, call(graph, aten.neg.default, other))
        difference.meta = {**total.meta, "val": difference.meta["val"]}
        total.replace_all_uses_with(difference)
        graph.erase_node(total)
    graph.lint()
    cut.backward.recompile()
