"""Recipes: how a saved tensor follows from other saved tensors, through steps of any kind.

passes/recompute.py rebuilds, before any choice is made, what costs next to nothing. What is left
has a convolution, a matrix product or attention between it and the tensors before it: to rebuild it
costs time, and is one choice among others, which the planner weighs. A recipe starts from saved
tensors, from parameters, and from statistics of a norm, which are saved for it: never from running
statistics, which the forward has changed by then, and nothing random is drawn again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut, Saved, placeholders

LONGEST = 32  # steps
HEAVIEST = 3  # of them calls that do not fuse: beyond, no plan would take the time
SMALL = 64  # a value this much smaller than the tensor is a statistic: saved if it was not


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a saved tensor in the backward.

    Attributes:
        steps: nodes of the forward to repeat, in order; the last one makes the tensor.
        roots: saved tensors that the forward makes, as its nodes, from which they start.
        inputs: what else they read: inputs of the forward, and statistics that are saved for this.
        share: of the steps' time and memory that counts for this tensor: views of one buffer are
            rebuilt together or not at all.
        is_smooth: a small error of a root makes a small error of the tensor.
    """

    steps: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    share: float
    is_smooth: bool

    @property
    def statistics(self) -> tuple[fx.Node, ...]:
        """Inputs that the forward makes."""
        return tuple(n for n in self.inputs if n.op != "placeholder")


def find_recipes(cut: Cut, wanted: Iterable[Saved]) -> dict[fx.Node, Recipe]:
    """Recipes by saved node of the forward, for those of ``wanted`` that have one.

    Each starts from what is saved nearest to the tensor. Of views of one buffer, all have a recipe
    or none.
    """
    views: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for saved in cut.saved:
        views[prop.storage_root(saved.forward)].append(saved.forward)
    asked = {s.forward for s in wanted}
    lasting = _lasting(cut)
    found: dict[fx.Node, Recipe] = {}
    for root, nodes in views.items():
        if not asked.issuperset(nodes):
            continue
        available = {s.forward for s in cut.saved} - set(nodes)
        recipes = [_recipe(n, root, available, lasting, 1 / len(nodes)) for n in nodes]
        found.update((n, r) for n, r in zip(nodes, recipes, strict=True) if r and all(recipes))
    return found


def _lasting(cut: Cut) -> set[fx.Node]:
    """Inputs that are the same, and there, when the backward runs."""
    inputs = placeholders(cut.forward)
    static = {n for i, n in enumerate(inputs) if i in cut.static_inputs and prop.is_tensor(n)}
    return static - torch_private.mutated_inputs(cut.forward)


def _recipe(
    tensor: fx.Node, root: fx.Node, available: set[fx.Node], lasting: set[fx.Node], share: float
) -> Recipe | None:
    """The steps back from a tensor; None where they do not end in time, or cannot be repeated."""
    size = _numel(root)
    steps: set[fx.Node] = set()
    roots: dict[fx.Node, None] = {}
    inputs: dict[fx.Node, None] = {}
    pending = [tensor]
    while pending:
        node = pending.pop()
        if node in steps or node in roots or node in inputs:
            continue
        if node in available and node.op != "placeholder":
            roots[node] = None
        elif node in available or node in lasting or _is_statistic(node, size):
            inputs[node] = None
        elif _is_repeatable(node) and len(steps) < LONGEST:
            steps.add(node)
            pending.extend(node.all_input_nodes)
        else:
            return None
    if sum(map(prop.is_extern, steps)) > HEAVIEST or (not roots and lasting.issuperset(inputs)):
        return None
    ordered = tuple(sorted(steps))
    return Recipe(ordered, tuple(roots), tuple(inputs), share, _is_smooth(ordered, roots))


def _is_statistic(node: fx.Node, size: int) -> bool:
    """Small, in small memory of its own, and made by the forward."""
    root = prop.storage_root(node)
    return (
        node.op == "call_function"
        and prop.is_tensor(node)
        and prop.is_tensor(root)
        and root.op == "call_function"
        and _numel(root) * SMALL <= size
    )


def _is_repeatable(node: fx.Node) -> bool:
    """The same values come out if it is computed again, and nothing else happens."""
    if node.op != "call_function" or torch_private.is_sym_node(node):
        return False
    pure = prop.is_pure(node) or torch_private.is_attention_without_dropout(node)
    if not (pure and prop.is_known(node)) or torch_private.must_recompute(node):
        return False
    # Writes running statistics, whatever its schema says.
    return "batch_norm" not in prop.op_name(node)


def _is_smooth(steps: Iterable[fx.Node], roots: Iterable[fx.Node]) -> bool:
    lineage = {n for n in roots if not prop.is_integer(n)}
    for step in steps:
        sources = [n for n in step.all_input_nodes if n in lineage]
        sources = [n for n in sources if not prop.reads_shape_only(step, n)]
        if not sources:
            continue
        if prop.is_step(step) or prop.is_integer(step) or prop.is_exponential(step):
            return False
        if any(prop.branches_on(step, n) or prop.has_pole(step, n) for n in sources):
            return False
        lineage.add(step)
    return True


def _numel(node: fx.Node) -> int:
    value = prop.value(node)
    if isinstance(value, (tuple, list)):
        return sum(torch_private.size_hint(v.numel()) for v in value if v is not None)
    return torch_private.size_hint(value.numel())
