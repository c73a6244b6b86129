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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import report, torch_private
from fxcompress.agree import agreed
from fxcompress.calibrate import evidence_of
from fxcompress.evidence import Calibration
from fxcompress.policies import policy
from fxcompress.record import Recorder, Recording
from fxcompress.settings import Settings

log = logging.getLogger("fxcompress")

PART = 8  # of the batch: an uncompressed step and its double backward then take less than a budget
# The double backward holds about this many times what the step saves (ResNet-18, GPT; measured).
HELD = 6.5


Step = tuple[Recording, ...]  # one of a part of the batch


def automatic(
    module: fx.GraphModule, inputs: Sequence[Any], settings: Settings, graph: str
) -> tuple[Calibration | None, Step]:
    """A calibration for one Dynamo graph on its first inputs, and the step it was made on, if one
    was recorded; None, with a reason logged, if there can be none.

    Args:
        module, inputs: as Dynamo passes them.
        settings: of the compile.
        graph: name of the graph under these settings (:func:`fxcompress.report.graph_key`).
    """
    asked = policy(settings.policy)
    solves = asked.solves and settings.is_bounded and settings.plan is None
    wanted = asked.calibrated or solves
    if not wanted or settings.calibration is not None or not _is_trained(inputs):
        return None, ()
    alone = torch_private.job_store() is None
    if not alone and _communicates(module, inputs):
        # Ranks that have one stored would leave the others waiting in a collective.
        log.warning(
            "no calibration on the first batch of a graph with collectives: pass "
            "calibration=fxcompress.calibrate(model, batch), made before the model was distributed"
        )
        return None, ()
    steps: list[Step] = []
    found = report.recall_calibration(graph)
    if found is not None and alone:
        return (found if found.graphs else None), ()
    if found is None:
        found, steps = _attempt(module, inputs, settings)
    if not alone:
        text = agreed(f"calibration-{graph}", "" if found is None else found.to_json())
        found = Calibration.from_json(text) if text else None
    if found is not None:
        report.remember_calibration(graph, found)
    # Ranks would have to agree on what they see in a trial.
    step = steps[-1] if steps and alone else ()
    return (found if found is not None and found.graphs else None), step


def record_part(module: fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> Step:
    """A step of a part of the batch, run op by op; nothing, with a reason logged, if it cannot be
    or if the loss is outside the graph: measurements were made with its real gradients.

    Args:
        module, inputs: as Dynamo passes them; while a compile is under way, or not.
    """
    if torch_private.job_store() is not None:  # ranks would have to agree on what they see
        return ()
    try:
        with torch_private.outside_compile(), torch.enable_grad():
            if not _is_trained(inputs):
                return ()
            slices = slices_of_batch(module, inputs, PART)
            if slices is None or not _ends_in_loss(slices):
                return ()
            steps = record_slices(slices, settings)
    except Exception as error:  # never the reason why a training does not start
        log.info("the plan is not tried on the first batch: %s", error)
        return ()
    return steps[-1] if steps else ()


def _attempt(
    module: fx.GraphModule, inputs: Sequence[Any], settings: Settings
) -> tuple[Calibration | None, list[Step]]:
    try:
        with torch_private.outside_compile(), torch.random.fork_rng():
            steps = _recorded(module, inputs, settings)
            # An empty one is remembered too: a later process need not find out again.
            return evidence_of(*steps, group=settings.group) if steps else Calibration(()), steps
    except Exception as error:  # never the reason why a training does not start
        log.warning("no calibration on the first batch, plans are made by guesses: %s", error)
        return None, []


def _communicates(module: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Its operators talk to other ranks: collectives, or tensors that are spread over ranks."""
    spread = any(torch_private.is_subclass(x) for x in inputs)
    return spread or any(torch_private.is_collective(node) for node in module.graph.nodes)


def _is_trained(inputs: Sequence[Any]) -> bool:
    """Real tensors, with something to train among them, and no symbolic sizes."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    real = len(tensors) == len(inputs) and not any(torch_private.is_fake(x) for x in tensors)
    return real and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _recorded(module: fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> list[Step]:
    if settings.budget_bytes is None:
        slices = slices_of_batch(module, inputs, PART) or slices_of_batch(module, inputs, 1)
        assert slices is not None
        return record_slices(slices, settings) or []
    for part in (PART, 4 * PART):
        slices = slices_of_batch(module, inputs, part)
        if slices is None:
            log.info("the batch cannot be taken in part; give fxcompress.calibrate a smaller one")
            return []
        found = record_slices(slices, settings)
        if found is not None:
            return found
    log.info("the budget leaves no room to calibrate; see fxcompress.calibrate")
    return []


@dataclass(frozen=True)
class Slices:
    """Parts of one batch.

    Attributes:
        graph: the Dynamo graph for their size.
        size: samples in each.
        share: of the batch in each.
        arguments: inputs of the graph, for each part.
    """

    graph: fx.GraphModule
    size: int
    share: float
    arguments: tuple[list[Tensor], ...]


def slices_of_batch(
    module: fx.GraphModule, inputs: Sequence[Any], parts: int, most: int = 1
) -> Slices | None:
    """The first ``most`` of so many parts of the batch; None where the graph resists.

    The batch is the common first size of the inputs that need no gradient. Where the graph has that
    number written into views and the like, it is replaced there too.
    """
    if parts == 1:
        return Slices(torch_private.copy_dynamo_graph(module), 0, 1.0, (list(inputs),))
    data = [
        x
        for x in inputs
        if not x.requires_grad and x.dim() > 0 and not torch_private.is_static_input(x)
    ]
    sizes = {x.shape[0] for x in data}
    for batch in sorted(sizes, reverse=True):
        fewer = max(2, batch // parts)
        if fewer >= batch:
            continue
        arguments = tuple(
            [x[start : start + fewer] if _has_first(x, batch) else x for x in inputs]
            for start in range(0, batch - fewer + 1, fewer)[:most]
        )
        for graph in _for_fewer(module, batch, fewer):
            if _runs(graph, arguments[0]):
                return Slices(
                    torch_private.copy_dynamo_graph(graph), fewer, fewer / batch, arguments
                )
    return None


def measured_on(
    slices: Slices,
    settings: Settings,
    gradients: Mapping[int, Tensor] | None = None,
    used: Mapping[str, str] | None = None,
) -> Calibration | None:
    """The calibration that these parts of a batch give; None where the budget leaves no room.

    Args:
        gradients: see :func:`record_slices`.
        used: see :func:`fxcompress.calibrate.evidence_of`.
    """
    with torch.random.fork_rng():
        steps = record_slices(slices, settings, gradients)
        return None if steps is None else evidence_of(*steps, group=settings.group, used=used)


def record_slices(
    slices: Slices, settings: Settings, gradients: Mapping[int, Tensor] | None = None
) -> list[Step] | None:
    """A step of each part; None where the budget leaves no room to measure on one.

    Args:
        gradients: of the graph's outputs for the whole batch, by position. A loss outside the graph
            sends gradients that cannot be known before the first step: random directions.
    """
    # What is small in a part is what is small in the batch: else other tensors are rebuilt.
    recorder = Recorder(int(settings.min_bytes * slices.share), settings.inner)
    recorded = []
    with torch.random.fork_rng():
        run = None
        for i, part in enumerate(slices.arguments):
            arguments = [_own(x) for x in part]
            run = recorder(slices.graph, arguments) if run is None else run
            leaves = [x for x in arguments if x.requires_grad]
            outputs = {
                at: y
                for at, y in enumerate(torch.utils._pytree.tree_leaves(run(*arguments)))
                if isinstance(y, Tensor) and y.requires_grad
            }
            start = i * slices.size
            seeds = [_seed((gradients or {}).get(at), y, start) for at, y in outputs.items()]
            torch.autograd.grad(list(outputs.values()), leaves, seeds, allow_unused=True)
            recorded.append(recorder.recordings())
            need = HELD * sum(r.plain_saved_bytes for r in recorded[0])
            if settings.budget_bytes is not None and need > settings.budget_bytes:
                return None
    return recorded


def _own(x: Tensor) -> Tensor:
    """An input that a run may change, without the history of the user's."""
    if isinstance(x, torch.nn.Parameter) and not x.requires_grad:
        return x  # a frozen weight, which no model changes: a copy could be most of the memory
    return x.detach().requires_grad_() if x.requires_grad else x.detach().clone()


def _has_first(x: Tensor, size: int) -> bool:
    return not x.requires_grad and x.dim() > 0 and x.shape[0] == size


def _seed(gradient: Tensor | None, y: Tensor, start: int) -> Tensor:
    """What to start the backward of a part of the batch with."""
    if gradient is not None and gradient.shape == y.shape:
        return gradient
    if gradient is not None and y.dim() > 0 and gradient.shape[1:] == y.shape[1:]:
        return gradient[start : start + y.shape[0]]
    return torch.ones_like(y) if y.numel() == 1 else _signs(y)


_RESHAPES = frozenset({"view", "reshape", "expand", "repeat"})


def _for_fewer(module: fx.GraphModule, batch: int, fewer: int) -> Iterator[fx.GraphModule]:
    """Guesses at the graph for a smaller batch: as it is, then with multiples of the batch size
    replaced where a shape begins, then wherever they stand. Other sizes may be multiples too."""
    yield module
    for is_first_only in (True, False):
        changed = torch_private.copy_dynamo_graph(module)
        for node in changed.graph.nodes:
            if node.op not in {"call_method", "call_function"}:
                continue
            if not is_first_only:
                node.args = fx.node.map_aggregate(node.args, lambda a: _scaled(a, batch, fewer))
            elif node.target in _RESHAPES and len(node.args) > 1:
                tensor, first, *rest = node.args
                if isinstance(first, tuple | list) and first:
                    first = type(first)([_scaled(first[0], batch, fewer), *first[1:]])
                node.args = (tensor, _scaled(first, batch, fewer), *rest)
        changed.recompile()
        yield changed


def _scaled(argument: Any, batch: int, fewer: int) -> Any:
    is_size = isinstance(argument, int) and not isinstance(argument, bool)
    if is_size and argument >= batch and argument % batch == 0:
        return argument // batch * fewer
    return argument


def _runs(module: fx.GraphModule, arguments: Sequence[Tensor]) -> bool:
    """The graph runs on tensors of these shapes, and its outputs depend on the smaller batch."""
    try:
        with torch_private.new_fake_mode() as mode, torch_private.fake_errors_unlogged():
            module(*[mode.from_tensor(x) for x in arguments])
    except Exception as error:
        log.debug("not on a part of the batch: %s", error)
        return False
    return True


def _ends_in_loss(slices: Slices) -> bool:
    """All that the graph returns, and that has a gradient, is a scalar."""
    with torch_private.new_fake_mode() as mode:
        outputs = slices.graph(*[mode.from_tensor(x) for x in slices.arguments[0]])
    found = [y for y in torch.utils._pytree.tree_leaves(outputs) if isinstance(y, Tensor)]
    return all(y.numel() == 1 for y in found if y.requires_grad)


def _signs(like: Tensor) -> Tensor:
    signs = torch.randint(0, 2, like.shape, device=like.device) * 2 - 1
    return signs.to(like.dtype) / max(like.numel(), 1) ** 0.5
