"""Capture: the forward and backward graphs as one value, each saved tensor with both its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxcompress import torch_private
from fxcompress.errors import FxCompressError
from fxcompress.passes.properties import is_tensor


class CaptureError(FxCompressError):
    """The two graphs do not have the shape we know; the caller compiles them as they are."""


@dataclass(frozen=True)
class Saved:
    """One value passed from the forward to the backward.

    Attributes:
        forward: the node of the forward graph that is saved.
        backward: the placeholder of the backward graph that receives it.
    """

    forward: fx.Node
    backward: fx.Node

    @property
    def name(self) -> str:
        return self.backward.name


@dataclass(frozen=True)
class Cut:
    """A partitioned joint graph.

    Attributes:
        forward, backward: the two graph modules.
        num_outputs: the first outputs of the forward are the user's (mutated inputs included);
            the rest are saved.
        saved: saved tensors in order, version-checked ones first.
        static_inputs: indices of forward placeholders whose memory outlives the step (parameters
            and buffers).
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_outputs: int
    saved: tuple[Saved, ...]
    static_inputs: frozenset[int]

    @property
    def outputs(self) -> tuple[fx.Node | None, ...]:
        """What the user's code gets: outputs of the forward that are not saved tensors."""
        return output_args(self.forward)[: self.num_outputs]

    def copy(self) -> Cut:
        """A deep copy of both graphs (fake values shared)."""
        forward, backward = _copy(self.forward), _copy(self.backward)
        return pair(forward, backward, self.num_outputs, self.static_inputs)


def output_args(module: fx.GraphModule) -> tuple[fx.Node | None, ...]:
    return tuple(output_node(module).args[0])  # type: ignore[arg-type]


def output_node(module: fx.GraphModule) -> fx.Node:
    return next(iter(module.graph.find_nodes(op="output")))


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def pair(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    num_outputs: int,
    static_inputs: Sequence[int] | frozenset[int],
) -> Cut:
    """Match what the forward saves with what the backward receives.

    The forward returns ``user outputs | tensors | opaque | symints``; the backward takes
    ``symints | tensors | opaque | tangents`` (torch/_functorch/partitioners.py,
    ``_extract_fwd_bwd_modules``).

    Raises:
        CaptureError: the order or the names are not those.
    """
    saved = output_args(forward)[num_outputs:]
    if not all(isinstance(node, fx.Node) for node in saved):
        raise CaptureError("a saved value is not a node of the forward graph")
    nodes = [node for node in saved if isinstance(node, fx.Node)]
    symbols = [node for node in nodes if torch_private.is_sym_node(node)]
    others = [node for node in nodes if not torch_private.is_sym_node(node)]
    received = placeholders(backward)[len(symbols) : len(symbols) + len(others)]
    if len(received) != len(others):
        raise CaptureError("the backward graph takes fewer values than the forward saves")
    for source, target in zip(others, received, strict=True):
        if source.name != target.name:
            raise CaptureError(f"saved value {source.name} arrives as {target.name}")
    tensors = [
        Saved(source, target)
        for source, target in zip(others, received, strict=True)
        if is_tensor(source)
    ]
    return Cut(forward, backward, num_outputs, tuple(tensors), frozenset(static_inputs))


def receive(backward: fx.GraphModule, value: fx.Node, after: fx.Node) -> fx.Node:
    """A placeholder of the backward for one more value of the forward, under its name.

    The name is what :func:`pair` knows it by. Where the backward computes the same value again, a
    node of its own has that name already: it gets another.
    """
    names = {node.name: node for node in backward.graph.nodes}
    if value.name in names:
        other = f"{value.name}_again"
        while other in names:
            other += "_"
        names[value.name].name = other
    with backward.graph.inserting_after(after):
        node = backward.graph.placeholder(value.name)
    node.name = value.name
    node.meta = dict(value.meta)
    return node


def save(cut: Cut, now: Sequence[fx.Node], joined: Sequence[fx.Node]) -> None:
    """Have the forward save ``now``, in order, ``joined`` after its version-checked tensors."""
    output = output_node(cut.forward)
    checked = sum(is_tensor(n) and not torch_private.is_unchecked(n) for n in now)
    output.args = ((*cut.outputs, *now[:checked], *joined, *now[checked:]),)
    torch_private.describe_saved(output, cut.num_outputs)


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, mapping)
    old = output_node(module)
    graph.output(result).meta = dict(old.meta)
    for source, target in mapping.items():
        target.meta = dict(source.meta)
    copied = torch_private.graph_module(module, graph)
    copied.meta = dict(module.meta)
    return copied
