"""Rebuild: repeat the steps of a recipe in the backward, in place of a saved tensor.

The steps stand directly before the tensor's first reader, and what they make stays until its last
one: to repeat a convolution twice would cost more than to hold its output meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import fx

from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.capture import Cut, output_node


def rebuild(
    cut: Cut,
    candidates: Sequence[Candidate],
    received: Callable[[fx.Node], fx.Node],
    hoisted: Collection[fx.Node] = (),
) -> None:
    """Let the readers of the candidates, each with a recipe, read rebuilt tensors, in place.

    Args:
        received: the backward's placeholder for a node of the forward, made if there is none.
        hoisted: nodes of the backward that will be computed in the forward instead.
    """
    living = _living(cut, hoisted)
    together: dict[fx.Node, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        together[prop.storage_root(candidate.saved.forward)].append(candidate)
    for views in together.values():
        readers = {c: [u for u in c.saved.backward.users if u in living] for c in views}
        if any(readers.values()):
            _repeat(cut.backward.graph, readers, received)


def _living(cut: Cut, hoisted: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes of the backward that its outputs depend on otherwise than through ``hoisted``."""
    pending = [output_node(cut.backward)]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen and node not in hoisted:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen


def _repeat(
    graph: fx.Graph,
    readers: Mapping[Candidate, Sequence[fx.Node]],
    received: Callable[[fx.Node], fx.Node],
) -> None:
    """The steps of all views of one buffer, each once; ``readers``: of each view."""
    made: dict[fx.Node, fx.Node] = {}
    recipes = [c.recipe for c in readers if c.recipe is not None]
    for recipe in recipes:
        made.update({source: received(source) for source in (*recipe.roots, *recipe.inputs)})
    with graph.inserting_before(min(reader for each in readers.values() for reader in each)):
        for step in sorted({step for recipe in recipes for step in recipe.steps}):
            for pinned in step.all_input_nodes:  # a weight as passes/layout.py has it read
                if pinned not in made:
                    made[pinned] = graph.node_copy(pinned, made.__getitem__)
            made[step] = graph.node_copy(step, made.__getitem__)
            made[step].meta["autograd_backward"] = True
    for candidate, users in readers.items():
        for user in users:
            user.replace_input_with(candidate.saved.backward, made[candidate.saved.forward])
