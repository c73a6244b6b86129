"""Replan: measure again as training goes, and change what has grown old.

A plan is right for the gradients it was made from, and those change as a model learns. Every so
many steps of a graph (``replan_every``) one step is watched: its inputs, and the gradients that
come back to its outputs. Before the next one the saved tensors are measured on that batch, in parts
that keep within the memory of a step. Then
- bases of transform codecs are renewed under their old names, which needs no compile and changes no
  size (fxcompress/codecs/states.py), and
- if a plan made from the new measurements has less than `WORTH` of the noise, the graph is compiled
  again in place of the old one. A backward that is still to come runs the old one to its end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import torch_private
from fxcompress.automatic import HELD, Slices, measured_on, slices_of_batch
from fxcompress.evidence import Calibration, signature
from fxcompress.ladder import cost
from fxcompress.passes.rewrite import RECOMPUTE, Choice
from fxcompress.pipeline import Planned
from fxcompress.planner import make_plan
from fxcompress.settings import Settings

log = logging.getLogger("fxcompress")

WORTH = 0.7
MOST_PARTS = 8  # measured at one time


@dataclass
class Replanner:
    """The state of one compiled graph between its steps.

    Attributes:
        module: the Dynamo graph.
        settings: those it was compiled with, calibration included.
        planned: what was decided for it.
        compile: makes it anew, from settings, inputs and what was decided before; gives what runs
            and what was decided.
        steps: how many steps were run.
        seen: inputs of the step that was watched, with the gradients of its outputs as they come.
    """

    module: fx.GraphModule
    settings: Settings
    planned: Planned
    compile: Callable[[Settings, Sequence[Any], Planned], tuple[Callable[..., Any], Planned | None]]
    steps: int = 0
    seen: tuple[list[Tensor], dict[int, Tensor]] | None = None
    used: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.used = _used(self.planned)

    def before(self, inputs: Sequence[Any]) -> Callable[..., Any] | None:
        """Called before each step; what is to run from now on, None if that stays."""
        self.steps += 1
        if self.seen is None:
            return None
        values, gradients = self.seen
        self.seen = None
        # Parameters as they are now; of the batch, what the watched step had.
        given = [now if now.requires_grad else v for now, v in zip(inputs, values, strict=True)]
        try:
            with torch_private.outside_compile():
                return self._replan(given, gradients)
        except Exception as error:  # never the reason why a training stops
            log.warning("not planned again: %s", error)
            return None

    def after(self, inputs: Sequence[Any], outputs: Any) -> None:
        """Called after each step's forward."""
        assert self.settings.replan_every is not None
        if self.steps % self.settings.replan_every:
            return
        values = [x if x.requires_grad else x.detach().clone() for x in inputs]
        gradients: dict[int, Tensor] = {}
        self.seen = values, gradients
        for i, y in enumerate(torch.utils._pytree.tree_leaves(outputs)):
            if isinstance(y, Tensor) and y.requires_grad:
                y.register_hook(_keep(gradients, i))

    def _replan(
        self, inputs: list[Tensor], gradients: dict[int, Tensor]
    ) -> Callable[..., Any] | None:
        begun = time.perf_counter()
        slices = self._slices(inputs)
        if slices is None:
            log.info("not planned again: the batch cannot be taken in parts as small as needed")
            return None
        calibration = measured_on(slices, self.settings, gradients, used=self.used)
        if calibration is None:
            return None
        calibration = _completed(calibration, self.settings.calibration)
        before, after = self._noise(calibration)
        seconds = time.perf_counter() - begun
        log.info(
            "step %d: measured again in %.1f s; noise %.3g, planned anew %.3g",
            *(self.steps, seconds, before, after),
        )
        if not after < WORTH * before:
            return None
        settings = replace(self.settings, calibration=calibration)
        compiled, planned = self.compile(settings, inputs, self.planned)
        if planned is None:
            return None
        self.settings, self.planned, self.used = settings, planned, _used(planned)
        return compiled

    def _slices(self, inputs: list[Tensor]) -> Slices | None:
        """The batch in parts, each measured within the budget or what plain Inductor saves."""
        plain = self.planned.plan.saved_bytes_before
        allowed = self.settings.budget_bytes or plain
        parts = 1
        while HELD * plain > allowed * parts:
            parts *= 2
        return slices_of_batch(self.module, inputs, parts, most=MOST_PARTS)

    def _noise(self, calibration: Calibration) -> tuple[float, float]:
        """Noise of the plan in force and of the best one, by the new measurements."""
        assert self.planned.decision is not None
        evidence = calibration.of(signature(self.planned.cut))
        if evidence is None:
            return 0.0, 0.0
        context = self.planned
        fresh = make_plan(
            context.cut,
            context.candidates,
            context.plain,
            self.settings,
            context.reserved,
            channels_last=context.channels_last,
            evidence=evidence,
        )

        def noise(choices: Sequence[Choice]) -> float:
            rebuilt = {c.candidate.name for c in choices if c.representation == RECOMPUTE}
            total = 0.0
            for choice in choices:
                known, spec = evidence.get(choice.candidate.name), choice.codec_spec
                if known is not None and spec is not None and spec in known.prices:
                    total += (1 + known.again(rebuilt, spec)) * cost(known.prices[spec])
            return total

        return noise(self.planned.decision.choices), noise(fresh.choices)


def _completed(fresh: Calibration, before: Calibration | None) -> Calibration:
    """With what only an earlier measurement knows: of a part of a batch, PyTorch may save other
    tensors than of the whole."""
    if before is None:
        return fresh
    graphs = tuple(
        replace(graph, tensors={**(before.of(graph.signature) or {}), **graph.tensors})
        for graph in fresh.graphs
    )
    scatter = before.scatter if fresh.scatter is None else fresh.scatter
    return replace(fresh, graphs=graphs, scatter=scatter)


def _used(planned: Planned) -> dict[str, str]:
    """Codec specs in force by tensor name."""
    assert planned.decision is not None
    return {
        c.candidate.name: c.codec_spec for c in planned.decision.choices if c.codec_spec is not None
    }


def _keep(gradients: dict[int, Tensor], index: int) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        gradients.setdefault(index, gradient.detach().clone())

    return hook
