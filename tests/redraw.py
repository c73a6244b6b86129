"""Redraw: the gradients of one step under new noise, thousands of times.

Of the two graphs of a plan, only what follows from the noise is run again: the encodes, and of the
backward what reads a decoded tensor. All else is computed once and bound as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.evaluate import Evaluation
from fxcompress.passes.capture import Cut, output_args, placeholders

aten = torch.ops.aten


def redraw(
    cut: Cut, inputs: Sequence[Any], tangents: Mapping[str, Any], state: Tensor
) -> Callable[[], list[Any]]:
    """Each call of what is returned runs the step with the noise of the next key.

    Args:
        cut: as rewritten under a plan.
        inputs: of its forward, which may write to them.
        tangents: of its backward, by name.
        state: of PyTorch's CPU generator, for the model's own random numbers.
    """
    part = _Noisy()
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        part.add(cut.forward, dict(zip(placeholders(cut.forward), inputs, strict=True)))
    given = {n: tangents[n.name] for n in placeholders(cut.backward) if n.name in tangents}
    saved = {n.name: n for n in output_args(cut.forward)[cut.num_outputs :] if n is not None}
    for node in placeholders(cut.backward):
        if node not in given:
            given[node] = part.values[saved[node.name]]
            if saved[node.name] in part.noisy:
                part.noisy[node] = part.noisy[saved[node.name]]
    part.add(cut.backward, given)
    function = part.function(output_args(cut.backward))

    def run() -> list[Any]:
        with torch.no_grad():
            return list(function())

    return run


class _Noisy:
    """A graph of what follows from the noise.

    Attributes:
        values: of all nodes, in the first run.
        noisy: node of one of the two graphs → node of this one.
    """

    def __init__(self) -> None:
        self.graph, self.constants = fx.Graph(), torch.nn.Module()
        self.values: dict[fx.Node, Any] = {}
        self.noisy: dict[fx.Node, fx.Node] = {}

    def add(self, module: fx.GraphModule, given: Mapping[fx.Node, Any]) -> None:
        nodes = {n.name: n for n in module.graph.nodes}
        run = Evaluation(module, nodes)
        with torch.no_grad():
            run.run(*(given[n] for n in placeholders(module)))
        self.values.update((nodes[name], value) for name, value in run.watched.items())
        for node in module.graph.nodes:
            draws = node.target is torch.ops.fxcompress.next_key.default
            follows = any(n in self.noisy for n in node.all_input_nodes)
            if node.op == "call_function" and (draws or follows):
                target = torch.reshape if node.target is aten.view.default else node.target
                args, kwargs = (fx.node.map_arg(a, self._of) for a in (node.args, node.kwargs))
                self.noisy[node] = self.graph.call_function(target, args, kwargs)

    def function(self, outputs: Sequence[fx.Node | None]) -> fx.GraphModule:
        self.graph.output([n and self._of(n) for n in outputs])
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.constants, self.graph)

    def _of(self, node: fx.Node) -> Any:
        if node in self.noisy:
            return self.noisy[node]
        value = self.values[node]
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(self.graph.nodes)}"
        self.constants.register_buffer(name, value)
        return self.graph.get_attr(name)
