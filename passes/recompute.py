"""Recompute: do not save what a few pointwise steps rebuild from another saved tensor.

Min-cut saves both the input and the output of a GELU or a SiLU, both a convolution's output and the
ReLU of its batch norm: it counts kernels, and reading either is as fast. Here the second one costs
a payload, its encode and its decode, while rebuilding it fuses into the read of the first. Only
steps that do not magnify an error are taken, so the rebuilt tensor is about as far off as its
source. A tensor that a mask tells all about (signs) is rebuilt from the mask; under autocast, the
cast of a weight from the weight, which is there anyway.

This runs before the analysis: comparisons of a rebuilt tensor show up as readers of its source and
are hoisted like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut, Saved, output_args, pair, placeholders, receive, save
from fxcompress.passes.insert import clusters

# Slope about 1 at most (mul and add are bounded by the statistics and parameters they involve).
_TAME = frozenset(
    """
    add sub mul neg relu erf tanh sigmoid where clamp clamp_min clamp_max convert_element_type
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)
LONGEST = 24  # steps
SMALL = 64  # a value this much smaller than the tensor is a statistic: saved if it was not


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a saved tensor: steps of the forward, in order, and what they start from."""

    saved: Saved
    steps: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]


def recompute(cut: Cut, min_bytes: int) -> Cut:
    """Rebuild in the backward every saved tensor that has a recipe, in place."""
    recipes = find_recipes(cut, min_bytes)
    if not recipes:
        return cut
    received = {s.forward: s.backward for s in cut.saved}
    checked = [s for s in cut.saved if not torch_private.is_unchecked(s.forward)]
    last = (checked or cut.saved)[-1].backward
    joined: list[fx.Node] = []
    for node in dict.fromkeys(n for r in recipes for n in r.sources):
        if node not in received:
            received[node] = last = receive(cut.backward, node, last)
            joined.append(node)
    for recipe in recipes:
        _rebuild(cut.backward.graph, recipe, received)
    gone = {r.saved.forward for r in recipes}
    for recipe in recipes:
        cut.backward.graph.erase_node(recipe.saved.backward)
    saved = output_args(cut.forward)[cut.num_outputs :]
    save(cut, [n for n in saved if n is not None and n not in gone], joined)
    return pair(cut.forward, cut.backward, cut.num_outputs, cut.static_inputs)


def find_recipes(cut: Cut, min_bytes: int) -> list[Recipe]:
    """Recipes for saved tensors, none of which needs another one's tensor."""
    held = {prop.storage_root(n) for n in cut.outputs if isinstance(n, fx.Node)}
    inputs = placeholders(cut.forward)
    parameters = {inputs[i] for i in cut.static_inputs if prop.is_tensor(inputs[i])}
    available = {s.forward for s in cut.saved} | parameters
    mutated = torch_private.mutated_inputs(cut.forward)
    recipes = []
    for saved in sorted(cut.saved, key=lambda s: s.forward):
        node = saved.forward
        value = prop.value(node)
        if (
            prop.storage_root(node).op == "placeholder"
            or value.dtype not in prop.FLOATS
            or prop.storage_root(node) in held
            or torch_private.must_save(node)
            or torch_private.size_hint(value.numel()) * value.element_size() < min_bytes
        ):
            continue
        recipe = _recipe(saved, available - {node}, parameters, mutated)
        if recipe is not None:
            available.discard(node)
            recipes.append(recipe)
    return recipes


def _recipe(
    saved: Saved, available: set[fx.Node], parameters: set[fx.Node], mutated: set[fx.Node]
) -> Recipe | None:
    """Steps back from the tensor to one large saved tensor and small values; None if too far.

    A mask will do for the large one, saved or not: it takes a bit where the tensor took a float.
    """
    size = _numel(saved.forward)
    steps: dict[fx.Node, None] = {}
    sources: dict[fx.Node, None] = {}
    large: set[fx.Node] = set()
    pending = [saved.forward]
    while pending:
        node = pending.pop()
        if node in steps or node in sources:
            continue
        if node is not saved.forward and prop.is_tensor(node):
            small = _numel(node) * SMALL <= size
            if node in mutated:
                return None
            if small or node in available or prop.value(node).dtype == torch.bool:
                sources[node] = None
                if not small:
                    large.add(node)
                continue
        if len(steps) == LONGEST or not _is_tame(node):
            return None
        steps[node] = None
        pending.extend(node.all_input_nodes)
    is_one = len(large) == 1 and all(n.op != "placeholder" or n in parameters for n in large)
    return Recipe(saved, tuple(sorted(steps)), tuple(sources)) if is_one else None


def _is_tame(node: fx.Node) -> bool:
    if node.op != "call_function" or not prop.is_tensor(node) or torch_private.must_recompute(node):
        return False
    tame = prop.op_name(node) in _TAME or prop.is_view(node) or prop.is_logistic(node)
    return tame and prop.is_pure(node)


def _rebuild(graph: fx.Graph, recipe: Recipe, received: dict[fx.Node, fx.Node]) -> None:
    """Steps before each cluster of readers, so that nothing rebuilt outlives its use."""
    node = recipe.saved.backward
    readers: Sequence[fx.Node] = [u for u in node.users if u.op != "output"]
    for cluster in clusters(readers):
        made = {source: received[source] for source in recipe.sources}
        with graph.inserting_before(cluster[0]):
            for step in recipe.steps:
                copy = graph.node_copy(step, made.__getitem__)
                copy.meta["autograd_backward"] = True
                made[step] = copy
        for reader in cluster:
            reader.replace_input_with(node, made[recipe.saved.forward])


def _numel(node: fx.Node) -> int:
    return torch_private.size_hint(prop.value(node).numel())
