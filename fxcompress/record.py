"""Record: the graphs of one real training step, with the real values that went through them.

The step is traced and partitioned exactly as for Inductor, and prepared as the pipeline prepares
it, but run op by op. What the planner wants to know of real data (sensitivities, ranges, band
energies) is measured on recordings; so is what a plan does to the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import torch_private
from fxcompress.errors import FxCompressError
from fxcompress.evaluate import evaluate
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate, analyse, saved_bytes
from fxcompress.passes.capture import Cut, output_args, pair, placeholders
from fxcompress.passes.pieces import exact_pieces
from fxcompress.passes.rebase import rebase
from fxcompress.passes.recompute import recompute


@dataclass(frozen=True)
class Recording:
    """One graph of a step.

    Attributes:
        cut: forward and backward as the planner gets them; :meth:`Cut.copy` before changing them.
        candidates: their saved tensors.
        channels_last: Inductor will lay feature maps out with channels fastest.
        plain_saved_bytes: what plain Inductor saves.
        inputs: real values of the forward's placeholders.
        tangents: real values of the backward's tangent placeholders, by name.
        random_state: of PyTorch's CPU generator when the forward ran, for the same dropout.
        gpu_states: of those of GPUs, by index.
        min_bytes: smaller tensors are no candidates.
    """

    cut: Cut
    candidates: tuple[Candidate, ...]
    channels_last: bool
    plain_saved_bytes: int
    inputs: tuple[Any, ...]
    tangents: dict[str, Any]
    random_state: Tensor
    min_bytes: int
    gpu_states: Mapping[int, Tensor] = field(default_factory=dict)

    def parameter_gradients(self) -> list[int]:
        """Positions, among the backward's outputs, of gradients of parameters."""
        inputs = placeholders(self.cut.forward)
        return [
            i
            for i, node in enumerate(output_args(self.cut.backward))
            if i in self.cut.static_inputs and node is not None and prop.is_tensor(inputs[i])
        ]


def run_forward(
    recording: Recording, cut: Cut, watch: Sequence[str] = ()
) -> tuple[list[Any], dict[str, Any]]:
    """(what ``cut``'s forward saves, watched values), on the recorded inputs.

    Inputs that the forward writes to (running statistics) are given as copies.
    """
    mutated = {n.name for n in torch_private.mutated_inputs(cut.forward)}
    inputs = [
        value.clone() if isinstance(value, Tensor) and node.name in mutated else value
        for node, value in zip(placeholders(cut.forward), recording.inputs, strict=True)
    ]
    with torch.random.fork_rng():
        torch.set_rng_state(recording.random_state)
        for index, state in recording.gpu_states.items():
            torch.cuda.set_rng_state(state, index)
        outputs, watched = evaluate(cut.forward, inputs, watch)
    return outputs[cut.num_outputs :], watched


def backward_inputs(recording: Recording, cut: Cut, saved: Sequence[Any]) -> list[Any]:
    """Arguments of ``cut``'s backward, in order, from what its forward saved."""
    nodes = output_args(cut.forward)[cut.num_outputs :]
    by_name = {n.name: v for n, v in zip(nodes, saved, strict=True) if n is not None}
    by_name.update(recording.tangents)
    return [by_name[node.name] for node in placeholders(cut.backward)]


def gradients(recording: Recording, cut: Cut) -> list[Tensor]:
    """Parameter gradients of one step through ``cut``, a rewriting of the recording's own."""
    saved, _ = run_forward(recording, cut)
    outputs, _ = evaluate(cut.backward, backward_inputs(recording, cut, saved))
    return [outputs[i] for i in recording.parameter_gradients()]


@dataclass
class Recorder:
    """A ``torch.compile`` backend that records the graphs it is given, and runs them op by op."""

    min_bytes: int
    inner: str = "inductor"
    prepared: list[tuple[Cut, tuple[Candidate, ...], bool, int]] = field(default_factory=list)
    inputs: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    random_states: dict[int, tuple[Tensor, dict[int, Tensor]]] = field(default_factory=dict)
    tangents: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return torch_private.compile_interpreted(
            module,
            inputs,
            _RecordingPartitioner(self),
            self._runner,
            fallback_random=self.inner == "aot_eager",
        )

    def recordings(self) -> tuple[Recording, ...]:
        """The graphs that ran forward and backward, in order of compilation.

        Raises:
            FxCompressError: none did.
        """
        found = tuple(
            Recording(
                *(*self.prepared[i], self.inputs[i], self.tangents[i], self.random_states[i][0]),
                min_bytes=self.min_bytes,
                gpu_states=self.random_states[i][1],
            )
            for i in sorted(self.tangents)
        )
        if not found:
            raise FxCompressError(
                "nothing was recorded: run the model forward and backward once, in training mode "
                "and with a parameter that requires a gradient"
            )
        return found

    def prepare(self, forward: fx.GraphModule, backward: fx.GraphModule, **kwargs: Any) -> Cut:
        """Bring a fresh cut to the form in which the planner sees it, and note it."""
        static = kwargs.get("static_lifetime_input_indices") or ()
        cut = rebase(pair(forward, backward, kwargs["num_fwd_outputs"], static))
        lays_out = self.inner == "inductor"
        channels_last = lays_out and torch_private.prefers_channels_last(cut.forward)
        plain = saved_bytes(analyse(cut, self.min_bytes, channels_last=channels_last))
        cut = exact_pieces(recompute(cut, self.min_bytes))
        candidates = analyse(cut, self.min_bytes, channels_last=channels_last)
        index = len(self.prepared)
        self.prepared.append((cut, candidates, channels_last, plain))
        copied = cut.copy()
        for part in (copied.forward, copied.backward):
            part.meta["fxcompress_recording"] = index
        return copied

    def _runner(
        self, graph: fx.GraphModule, is_backward: bool
    ) -> Callable[[Sequence[Any]], list[Any]]:
        index = graph.meta.get("fxcompress_recording")

        def run(arguments: Sequence[Any]) -> list[Any]:
            if index is not None and is_backward:
                saved = {s.name for s in self.prepared[index][0].saved}
                named = zip(placeholders(graph), arguments, strict=True)
                self.tangents[index] = {
                    n.name: v
                    for n, v in named
                    if n.name not in saved and not torch_private.is_sym_node(n)
                }
            elif index is not None:
                self.random_states[index] = torch.get_rng_state(), _gpu_states(arguments)
                self.inputs[index] = _before_mutation(graph, arguments)
            return evaluate(graph, arguments)[0]

        return run


def record(step: Callable[[Recorder], None], min_bytes: int) -> tuple[Recording, ...]:
    """Recordings of what ``step(recorder)`` compiles with the recorder as backend and runs.

    Raises:
        FxCompressError: no graph was trained.
    """
    recorder = Recorder(min_bytes)
    step(recorder)
    return recorder.recordings()


def _gpu_states(arguments: Sequence[Any]) -> dict[int, Tensor]:
    """Of the generators of the GPUs that these tensors are on."""
    on = {x.device.index for x in arguments if isinstance(x, Tensor) and x.is_cuda}
    return {index: torch.cuda.get_rng_state(index) for index in sorted(on)}


def _before_mutation(graph: fx.GraphModule, arguments: Sequence[Any]) -> tuple[Any, ...]:
    mutated = {n.name for n in torch_private.mutated_inputs(graph)}
    return tuple(
        value.clone() if isinstance(value, torch.Tensor) and node.name in mutated else value
        for node, value in zip(placeholders(graph), arguments, strict=True)
    )


class _RecordingPartitioner(torch_private.partitioner_base()):  # type: ignore[misc]
    """PyTorch's own cut, prepared and noted."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def uuid(self) -> None:
        return None  # never from a cache: the partitioner must see the graph

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        plain = torch_private.min_cut(gm, joint_inputs, **kwargs)
        cut = self.recorder.prepare(*plain, **kwargs)
        return cut.forward, cut.backward
