"""Pareto: what a model's memory could be, before anything is compiled or trained.

The model is traced on fake tensors, which have shapes and no memory, so a batch that would not fit
can be planned for. Points of a curve are plans of the very pipeline that compiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress import torch_private
from fxcompress.calibrate import calibrate, call
from fxcompress.costs import added_seconds, rates, step_seconds
from fxcompress.decision import MARGIN
from fxcompress.errors import BudgetError, FxCompressError, SettingsError
from fxcompress.evidence import Calibration
from fxcompress.joint import Part, plan_together
from fxcompress.passes.analyse import analyse
from fxcompress.passes.capture import Cut, pair
from fxcompress.pipeline import Planned, Role, plan_graph, shares_a_budget
from fxcompress.plan import Plan, merge
from fxcompress.settings import Settings, make

LARGEST = 1 << 24  # samples that max_batch looks at
_NOTHING = 1e-6  # MB: a budget that no step meets


@dataclass(frozen=True)
class Point:
    """One plan of a curve.

    Attributes:
        peak_bytes: planned peak of activation memory over a step.
        saved_bytes: what passes from the forward to the backward.
        variance: predicted squared error of the gradient over its squared norm.
        overhead: predicted share by which encoding and decoding lengthen a step.
        plan: the plan itself; ``fxcompress.backend(plan=point.plan)`` compiles it.
    """

    peak_bytes: int
    saved_bytes: int
    variance: float
    overhead: float
    plan: Plan


def pareto(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    points: int = 8,
    calibration: Calibration | None = None,
    **settings: Any,
) -> list[Point]:
    """Plans from the lowest feasible peak to plain Inductor's, evenly spaced.

    >>> for point in fxcompress.pareto(model, batch, loss=loss_of):  # doctest: +SKIP
    ...     print(point.peak_bytes, point.variance, point.overhead)

    Args:
        model: uncompiled module in training mode; left as it was.
        batch: a tensor, or the positional (tuple) or keyword (dict) arguments of the model.
        loss, calibration: see :func:`fxcompress.calibrate`, which is run on the batch (an
            uncompressed step) if no calibration is given.
        points: how many budgets to plan for, 2 or more. Of a model in several graphs, budgets are
            left out at which an early graph takes what a later one needs, as a compile would.
        settings: as for :func:`fxcompress.backend`, bounds and policies excepted.

    Raises:
        SettingsError: a bad setting. FxCompressError: the model cannot be traced or calibrated.
    """
    if points < 2:
        raise SettingsError(f"points={points} must be 2 or more")
    found = calibration or calibrate(model, batch, loss=loss)
    given = make(**settings, calibration=found)
    if given.is_bounded or given.policy != "auto" or given.plan is not None:
        raise SettingsError("a curve has its own bounds and plans: drop them, and any policy")
    cuts = trace(model, batch)
    plain = _plans(cuts, replace(given, ratio=1.0))
    lowest = _smallest(cuts, given) or plain.plan.planned_peak_bytes * MARGIN / 1e6
    highest = max(plain.plan.planned_peak_bytes * MARGIN / 1e6, lowest)
    budgets = np.linspace(lowest, highest, points)[:-1]
    curve = []
    for budget in budgets:
        try:
            curve.append(_plans(cuts, replace(given, budget_mb=float(budget))))
        except BudgetError:  # an earlier graph has taken what a later one needs
            continue
    return [_point(each) for each in (*curve, plain)]


def max_batch(model: nn.Module, batch: Any, budget_mb: float, **settings: Any) -> int:
    """The most samples whose training step can be planned within ``budget_mb``.

    Only planned: nothing of that size is allocated, and no noise is bounded. The batch's size is
    the first size of its largest tensor; tensors of that first size grow with it.

    Args:
        model: uncompiled module in training mode.
        batch: any batch, as for :func:`pareto`.
        budget_mb, settings: as for :func:`fxcompress.backend`.

    Raises:
        BudgetError: not even a single sample fits.
        FxCompressError: the model cannot be traced, or no batch is too large for the budget.
    """
    given = make(budget_mb=budget_mb, **settings)
    size = _batch_size(batch)
    refusals: dict[int, BudgetError] = {}

    def fits(count: int) -> bool:
        try:
            _plans(trace(model, batch, (size, count)), given)
        except BudgetError as error:
            refusals[count] = error
            return False
        return True

    # Memory grows with the batch along a line, almost: two points of it give a first guess.
    near, far = (_smallest(trace(model, batch, (size, n * size)), given) for n in (1, 2))
    guess = size
    if near is not None and far is not None and far > near:
        guess = int(size + (budget_mb - near) / (far - near) * size)
    guess = min(max(guess, 1), LARGEST)
    low, high, step = 0, LARGEST + 1, 1
    while high - low > 1:
        if fits(guess):
            low = guess
            guess = min(low + step, (low + high) // 2) if high > LARGEST else (low + high) // 2
        else:
            high = guess
            guess = max(high - step, (low + high) // 2) if low == 0 else (low + high) // 2
        step *= 2
    if low == LARGEST:
        raise FxCompressError(f"{LARGEST} samples fit into {budget_mb:g} MB: nothing grows")
    if low == 0:
        raise refusals[1]
    return low


def trace(model: nn.Module, batch: Any, resize: tuple[int, int] = (1, 1)) -> list[Cut]:
    """Forward and backward graphs of a training step, as PyTorch's own partitioner cuts them.

    Args:
        model, batch: see :func:`pareto`.
        resize: (n, m): tensors whose first size is n get m instead.

    Raises:
        FxCompressError: the model cannot be traced without data.
    """
    collector = _Collector()

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return torch_private.compile_interpreted(
            module,
            inputs,
            collector,
            lambda graph, _: lambda args: fx.Interpreter(graph).run(*args),
        )

    torch._dynamo.reset()
    with torch_private.new_fake_mode() as mode:
        compiled = torch.compile(_faked(model, mode), backend=backend)
        try:
            call(compiled, _resized(batch, mode, resize))
        except Exception as error:
            raise FxCompressError(
                f"the model cannot be traced without data, which planning ahead needs: {error}"
            ) from error
        finally:
            torch._dynamo.reset()
    if not collector.cuts:
        raise FxCompressError("nothing is trained: no parameter of the model requires a gradient")
    return collector.cuts


class _Collector(torch_private.partitioner_base()):  # type: ignore[misc]
    """PyTorch's own cut, noted."""

    def __init__(self) -> None:
        self.cuts: list[Cut] = []

    def uuid(self) -> None:
        return None

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        plain = torch_private.min_cut(gm, joint_inputs, **kwargs)
        static = kwargs.get("static_lifetime_input_indices") or ()
        self.cuts.append(pair(*plain, kwargs["num_fwd_outputs"], static).copy())
        return plain


@dataclass(frozen=True)
class _Plans:
    graphs: tuple[Planned, ...]

    @property
    def plan(self) -> Plan:
        return merge(g.plan for g in self.graphs)


def _plans(cuts: Sequence[Cut], settings: Settings) -> _Plans:
    """Every graph's plan, as compiles make them: one by one, then together."""
    is_part = len(cuts) > 1 and shares_a_budget(settings)
    found: list[Planned] = []
    for i, cut in enumerate(cuts):
        role = Role(is_part, is_early=is_part and i + 1 < len(cuts))
        found.append(plan_graph(cut.copy(), settings, *_others(found), role))
    if not is_part:
        return _Plans(tuple(found))
    given = plan_together([Part(each, settings) for each in found])
    for i, (cut, choices) in enumerate(zip(cuts, given, strict=True)):
        if choices is not None:
            role = Role(is_part, given=choices)
            found[i] = plan_graph(cut.copy(), settings, *_others(found[:i]), role)
    return _Plans(tuple(found))


def _others(before: Sequence[Planned]) -> tuple[int, int]:
    """Bytes that graphs keep saved meanwhile: as planned, and under plain Inductor."""
    plans = [each.plan for each in before]
    return sum(p.saved_bytes for p in plans), sum(p.saved_bytes_before for p in plans)


def _smallest(cuts: Sequence[Cut], settings: Settings) -> float | None:
    """The smallest budget in MB that every graph can meet; None if there is nothing to save."""
    smallest, bound = None, _NOTHING
    while True:
        try:
            _plans(cuts, replace(settings, budget_mb=bound))
        except BudgetError as error:
            if error.smallest_mb is None or error.smallest_mb <= bound:
                raise
            smallest = bound = error.smallest_mb
        else:
            return smallest


def _point(found: _Plans) -> Point:
    plan = found.plan
    return Point(
        plan.planned_peak_bytes,
        plan.saved_bytes,
        plan.predicted_variance,
        _overhead(found),
        plan,
    )


def _overhead(found: _Plans) -> float:
    added = whole = 0.0
    for graph in found.graphs:
        candidates = analyse(graph.cut, 0, channels_last=graph.channels_last)
        if not candidates:
            continue
        measured = rates(candidates[0].fake.device.type)
        whole += step_seconds(graph.cut, candidates, measured)
        choices = graph.decision.choices if graph.decision is not None else ()
        added += sum(added_seconds(choice, measured) for choice in choices)
    return added / whole if whole else 0.0


def _faked(model: nn.Module, mode: Any) -> nn.Module:
    """A copy of the model whose parameters and buffers are fake."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})


def _resized(batch: Any, mode: Any, resize: tuple[int, int]) -> Any:
    before, after = resize

    def one(x: Tensor) -> Tensor:
        fake: Tensor = mode.from_tensor(x)
        if before == after or not x.dim() or x.shape[0] != before:
            return fake
        return fake.new_empty((after, *x.shape[1:]))

    resized = torch.utils._pytree.tree_map_only(Tensor, one, batch)
    return tuple(resized) if isinstance(resized, list) else resized


def _batch_size(batch: Any) -> int:
    tensors = [x for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    sized = [x for x in tensors if x.dim()]
    if not sized:
        raise SettingsError("the batch has no tensor with a first size to grow")
    return int(max(sized, key=lambda x: x.numel()).shape[0])
