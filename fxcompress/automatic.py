"""Automatic: calibrate on the first real batch, when a model is compiled for a budget.

Dynamo hands a backend the real inputs of the frame it compiles. A part of the batch is run once,
op by op and uncompressed, so that even this keeps within the budget; what it tells about each saved
tensor is relative and holds for the whole batch. Where the graph has the batch size built in and
cannot be made smaller, or the budget leaves no room, the planner falls back to its guesses.

The result is kept beside Inductor's cache under the graph's name: a later process plans from the
same measurements, and so finds the same compiled graph in the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import report, torch_private
from fxcompress.calibrate import evidence_of
from fxcompress.evidence import Calibration
from fxcompress.policies import policy
from fxcompress.record import Recorder
from fxcompress.settings import Settings

log = logging.getLogger("fxcompress")

PART = 8  # of the batch: an uncompressed step and its double backward then take less than a budget
# The double backward holds about this many times what the step saves (ResNet-18, GPT; measured).
HELD = 6.0


def automatic(
    module: fx.GraphModule, inputs: Sequence[Any], settings: Settings, graph: str
) -> Calibration | None:
    """A calibration for one Dynamo graph on its first inputs; None, with a reason logged, if there
    can be none.

    Args:
        module, inputs: as Dynamo passes them.
        settings: of the compile.
        graph: name of the graph under these settings (:func:`fxcompress.report.graph_key`).
    """
    found = policy(settings.policy)
    solves = found.solves and settings.is_bounded and settings.plan is None
    wanted = found.calibrated or solves
    if not wanted or settings.calibration is not None or not _is_trained(inputs):
        return None
    stored = report.recall_calibration(graph)
    if stored is not None:
        return stored
    try:
        with torch_private.outside_compile():
            calibration = _measured(module, inputs, settings)
    except Exception as error:  # never the reason why a training does not start
        log.warning("no calibration on the first batch, plans are made by guesses: %s", error)
        return None
    if calibration is not None:
        report.remember_calibration(graph, calibration)
    return calibration


def _is_trained(inputs: Sequence[Any]) -> bool:
    """Real tensors, with something to train among them, and no symbolic sizes."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    real = len(tensors) == len(inputs) and not any(torch_private.is_fake(x) for x in tensors)
    return real and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _measured(
    module: fx.GraphModule, inputs: Sequence[Any], settings: Settings
) -> Calibration | None:
    smaller = part_of_batch(module, inputs, PART)
    if smaller is None and settings.budget_bytes is not None:
        log.info("the batch cannot be taken in part; call fxcompress.calibrate on a smaller one")
        return None
    part, arguments = smaller or (torch_private.copy_dynamo_graph(module), list(inputs))
    arguments = [
        x.detach().requires_grad_() if x.requires_grad else x.detach().clone() for x in arguments
    ]
    recorder = Recorder(settings.min_bytes, settings.inner)
    with torch.random.fork_rng():
        run = recorder(part, arguments)
        outputs = [
            y for y in torch.utils._pytree.tree_leaves(run(*arguments)) if _is_differentiable(y)
        ]
        leaves = [x for x in arguments if x.requires_grad]
        # A loss outside the graph sends gradients we cannot know yet: random directions.
        seeds = [torch.ones_like(y) if y.numel() == 1 else _signs(y) for y in outputs]
        torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
        recordings = recorder.recordings()
        need = HELD * sum(r.plain_saved_bytes for r in recordings)
        if settings.budget_bytes is not None and need > settings.budget_bytes:
            log.info("the budget leaves no room to calibrate; see fxcompress.calibrate")
            return None
        return evidence_of(recordings, group=settings.group)


def part_of_batch(
    module: fx.GraphModule, inputs: Sequence[Any], part: int
) -> tuple[fx.GraphModule, list[Tensor]] | None:
    """The graph and its inputs for a fraction of the batch; None where the graph resists.

    The batch is the common first size of the inputs that need no gradient. Where the graph has that
    number written into views and the like, it is replaced there too.
    """
    data = [x for x in inputs if not x.requires_grad and x.dim() > 0]
    sizes = {x.shape[0] for x in data}
    for batch in sorted(sizes, reverse=True):
        fewer = max(2, batch // part)
        if fewer >= batch:
            continue
        arguments = [
            x[:fewer].clone() if not x.requires_grad and x.dim() and x.shape[0] == batch else x
            for x in inputs
        ]
        for graph in (module, _renumbered(module, batch, fewer)):
            if _runs(graph, arguments):
                return torch_private.copy_dynamo_graph(graph), arguments
    return None


def _renumbered(module: fx.GraphModule, batch: int, fewer: int) -> fx.GraphModule:
    """The graph with multiples of the batch size among its sizes replaced."""
    changed = torch_private.copy_dynamo_graph(module)
    for node in changed.graph.nodes:
        if node.op in {"call_method", "call_function"}:
            node.args = fx.node.map_aggregate(node.args, lambda a: _scaled(a, batch, fewer))
    changed.recompile()
    return changed


def _scaled(argument: Any, batch: int, fewer: int) -> Any:
    is_size = isinstance(argument, int) and not isinstance(argument, bool)
    if is_size and argument >= batch and argument % batch == 0:
        return argument // batch * fewer
    return argument


def _runs(module: fx.GraphModule, arguments: Sequence[Tensor]) -> bool:
    """The graph runs on tensors of these shapes, and its outputs depend on the smaller batch."""
    try:
        with torch_private.new_fake_mode() as mode:
            module(*[mode.from_tensor(x) for x in arguments])
    except Exception as error:
        log.debug("not on a part of the batch: %s", error)
        return False
    return True


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _signs(like: Tensor) -> Tensor:
    signs = torch.randint(0, 2, like.shape, device=like.device) * 2 - 1
    return signs.to(like.dtype) / max(like.numel(), 1) ** 0.5
