"""Side by side: the graphs of one real step, plain and rewritten, run op by op on the same values.

A model is traced and cut once, by PyTorch itself; each policy rewrites a copy of what it was cut
into. So every kernel is the same on both sides, and "exact" means the same bits. What is not seen
here (AOTAutograd's handling of what the graphs save, code generation) other tests see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import torch_private
from fxcompress.calibrate import evidence_of
from fxcompress.evaluate import evaluate
from fxcompress.passes.analyse import analyse, saved_bytes
from fxcompress.passes.capture import CaptureError, Cut, pair, placeholders
from fxcompress.passes.pieces import exact_pieces
from fxcompress.passes.rebase import rebase
from fxcompress.passes.recompute import recompute
from fxcompress.passes.rewrite import rewrite
from fxcompress.pipeline import plan_graph
from fxcompress.plan import Plan
from fxcompress.record import Recording
from fxcompress.settings import Settings

SUSPICIOUS = 6.0  # times the squared mean error that chance gives
MORE_DRAWS = 128


class Mismatch(AssertionError):
    """Outputs or gradients are not what they must be; the message says how far off."""


@dataclass(frozen=True)
class Noise:
    """Of the parameter gradients of one graph, squared; bias is what chance does not explain."""

    norm: float
    noise: float
    bias: float
    predicted: float | None


@dataclass
class Graph:
    """One compiled graph: as plain, and rewritten under each policy (None: left as it was).

    Attributes:
        recorded: the first step, on the plain graphs as the planner takes them.
        gradients: of that step, of the plain backward.
    """

    plain: Cut
    plans: dict[str, Plan]
    cuts: dict[str, Cut | None]
    noise: Noise | None = None
    ran: bool = False
    steps: list[Step] = field(default_factory=list)
    recorded: Recording | None = None
    gradients: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A forward that waits for its backward."""

    inputs: tuple[Any, ...]
    random_state: Tensor
    saved: dict[str, list[Any]]


class SideBySide:
    """A ``torch.compile`` backend that runs plain graphs and, beside them, ours.

    Args:
        exact, lossy: settings whose gradients must be equal to plain's, and need not be.
        draws: steps to average the noise of ``lossy`` over.
        predict: calibrate on the step, and say what noise that predicts.
    """

    def __init__(
        self, exact: Settings, lossy: Settings, *, draws: int = 1, predict: bool = False
    ) -> None:
        # Without Inductor nothing lays tensors out anew: payloads must keep the strides of the
        # plain graph, or a sum that follows adds up in another order.
        given = {"exact": exact, "lossy": lossy}
        self.settings = {name: replace(s, inner="aot_eager") for name, s in given.items()}
        self.draws, self.predict = draws, predict
        self.graphs: list[Graph] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return torch_private.compile_interpreted(module, inputs, _Partitioner(self), self._runner)

    def add(self, forward: fx.GraphModule, backward: fx.GraphModule, **kwargs: Any) -> None:
        """Plan and rewrite copies of what PyTorch cut a graph into; mark the originals."""
        static = kwargs.get("static_lifetime_input_indices") or ()
        for part in (forward, backward):
            part.meta["fxcompress_side_by_side"] = len(self.graphs)
        try:
            cut = pair(forward, backward, kwargs["num_fwd_outputs"], static)
        except CaptureError as error:
            raise Mismatch(f"cannot be captured: {error}") from error
        plans, cuts = {}, {}
        for name, settings in self.settings.items():
            found = plan_graph(cut.copy(), settings)
            plans[name] = found.plan
            cuts[name] = found.decision and rewrite(
                found.cut, found.decision.choices, "", channels_last=found.channels_last
            )
        self.graphs.append(Graph(cut, plans, cuts))

    def _runner(
        self, module: fx.GraphModule, is_backward: bool
    ) -> Callable[[Sequence[Any]], list[Any]]:
        index = module.meta.get("fxcompress_side_by_side")

        def run(arguments: Sequence[Any]) -> list[Any]:
            if index is None:  # of inference
                return evaluate(module, arguments)[0]
            graph = self.graphs[index]
            if is_backward:
                return self._backward(graph, arguments)
            return self._forward(graph, arguments)

        return run

    def _forward(self, graph: Graph, arguments: Sequence[Any]) -> list[Any]:
        state, count = torch.get_rng_state(), graph.plain.num_outputs
        before = copies(graph.plain, arguments)
        mine = {n: _forward(c, before, state) for n, c in graph.cuts.items() if c is not None}
        outputs = evaluate(graph.plain.forward, arguments)[0]
        for name, (found, written) in mine.items():
            if not all(map(same, found[:count], outputs[:count])):
                raise Mismatch(f"{name}: the forward returns something else")
            if not all(map(same, written, arguments)):
                raise Mismatch(f"{name}: an input is overwritten by something else")
        graph.steps.append(Step(before, state, {n: o[count:] for n, (o, _) in mine.items()}))
        return outputs

    def _backward(self, graph: Graph, arguments: Sequence[Any]) -> list[Any]:
        step, state = graph.steps.pop(), torch.get_rng_state()
        tangents = _tangents(graph.plain, arguments)
        mine = {}
        for name, saved in step.saved.items():
            cut = graph.cuts[name]
            assert cut is not None
            torch.set_rng_state(state)
            mine[name] = _backward(cut, saved, tangents)
        torch.set_rng_state(state)
        outputs = evaluate(graph.plain.backward, arguments)[0]
        if "exact" in mine and not all(map(same, mine["exact"], outputs)):
            raise Mismatch(f"lossless gradients are off by {_difference(mine['exact'], outputs)}")
        if graph.recorded is None:
            graph.gradients = outputs
            graph.recorded = self._recording(graph, step, tangents)
        lossy = graph.cuts["lossy"]
        if lossy is not None and not graph.ran:
            graph.noise = self._noise(graph, step, tangents, outputs)
        graph.ran = True
        return outputs

    def _noise(
        self, graph: Graph, step: Step, tangents: dict[str, Any], exact: Sequence[Any]
    ) -> Noise:
        cut, count = graph.cuts["lossy"], graph.plain.num_outputs
        assert cut is not None
        places = [i for i, g in enumerate(exact) if isinstance(g, Tensor) and _is_real(g)]
        weights = [i for i in places if i in graph.plain.static_inputs] or places
        norm = _square(exact[i] for i in weights)
        total = {i: torch.zeros_like(exact[i]) for i in weights}
        noise, draws, done = 0.0, self.draws, 0
        while done < draws:
            outputs, _ = _forward(cut, copies(cut, step.inputs), step.random_state)
            found = _backward(cut, outputs[count:], tangents)
            for i in places:
                if exact[i].isfinite().all() and not found[i].isfinite().all():
                    raise Mismatch(f"lossy: gradient {i} is not finite")
            for i in weights:
                total[i] += found[i] - exact[i]
            noise += _square(found[i] - exact[i] for i in weights)
            done += 1
            mean = _square(total.values()) / done**2
            if done == draws < MORE_DRAWS and draws > 1 and mean * done**2 > SUSPICIOUS * noise:
                draws = MORE_DRAWS
        noise /= done
        # E|mean|² = bias² + variance/n, and E|error|² = bias² + variance.
        bias = max((mean - noise / done) / (1 - 1 / done), 0.0) if done > 1 else 0.0
        if mean * done <= SUSPICIOUS * noise:
            bias = 0.0  # chance
        return Noise(
            norm,
            noise,
            bias,
            self._predicted(graph) * norm if self.predict else None,
        )

    def _predicted(self, graph: Graph) -> float:
        """Relative, squared, of the plan under what a calibration on this step measures."""
        settings = self.settings["lossy"]
        assert graph.recorded is not None
        coded = [t for t in graph.plans["lossy"].tensors if "(" in t.representation]
        used = {t.name: t.representation for t in coded}
        calibration = evidence_of([graph.recorded], group=settings.group, used=used)
        found = plan_graph(graph.plain.copy(), replace(settings, calibration=calibration))
        return found.plan.predicted_variance

    def _recording(self, graph: Graph, step: Step, tangents: dict[str, Any]) -> Recording:
        min_bytes = self.settings["lossy"].min_bytes
        cut = exact_pieces(recompute(rebase(graph.plain.copy()), min_bytes))
        candidates = analyse(cut, min_bytes)
        saved = saved_bytes(candidates)
        state = step.random_state
        return Recording(cut, candidates, False, saved, step.inputs, tangents, state, min_bytes)


class _Partitioner(torch_private.partitioner_base()):  # type: ignore[misc]
    def __init__(self, owner: SideBySide) -> None:
        self.owner = owner

    def uuid(self) -> None:
        return None  # never from a cache

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object], **kwargs: Any) -> Any:
        plain = torch_private.min_cut(gm, inputs, **kwargs)
        self.owner.add(*plain, **kwargs)
        return plain


def _forward(cut: Cut, inputs: Sequence[Any], state: Tensor) -> tuple[list[Any], tuple[Any, ...]]:
    """(outputs, inputs after the forward wrote to them)."""
    given = copies(cut, inputs)
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        return evaluate(cut.forward, given)[0], given


def _backward(cut: Cut, saved: Sequence[Any], tangents: Mapping[str, Any]) -> list[Any]:
    """Gradients from what the forward saved: tensors, then symbols."""
    output = next(iter(cut.forward.graph.find_nodes(op="output"))).args[0]
    by_name = dict(tangents)
    for node, value in zip(output[cut.num_outputs :], saved, strict=True):
        by_name[node.name] = value
    return evaluate(cut.backward, [by_name[n.name] for n in placeholders(cut.backward)])[0]


def _tangents(cut: Cut, arguments: Sequence[Any]) -> dict[str, Any]:
    saved = {s.name for s in cut.saved}
    named = zip(placeholders(cut.backward), arguments, strict=True)
    return {n.name: v for n, v in named if n.name not in saved and not torch_private.is_sym_node(n)}


def copies(cut: Cut, values: Sequence[Any]) -> tuple[Any, ...]:
    """The inputs, copied where the forward writes to them."""
    mutated = {n.name for n in torch_private.mutated_inputs(cut.forward)}
    return tuple(
        v.clone() if isinstance(v, Tensor) and n.name in mutated else v
        for n, v in zip(placeholders(cut.forward), values, strict=True)
    )


def same(a: Any, b: Any) -> bool:
    """The same bits, or NaN in the same places."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a is b or bool(((a == b) | ((a != a) & (b != b))).all())


def _difference(found: Sequence[Any], expected: Sequence[Any]) -> str:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(b, Tensor)]
    off = math.sqrt(_square(a - b for a, b in pairs))
    return f"{off / math.sqrt(_square(b for _, b in pairs) or 1.0):.2e}"


def _is_real(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _square(tensors: Any) -> float:
    return sum(float(t.abs().double().square().sum()) for t in tensors)
