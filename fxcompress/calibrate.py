"""Calibrate: run a batch, and price every codec on every saved tensor of the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress import torch_private
from fxcompress.choose import is_codable
from fxcompress.codecs import codec, states
from fxcompress.codecs.transform import Transform
from fxcompress.errors import FxCompressError
from fxcompress.evaluate import evaluate
from fxcompress.evidence import Calibration, GraphEvidence, Price, TensorEvidence, signature
from fxcompress.fit import fit_transforms, is_fitted, renew, transform_prices
from fxcompress.ladder import specs
from fxcompress.moments import Moments, moments, together
from fxcompress.passes.roles import product_of
from fxcompress.record import Recorder, Recording, backward_inputs, run_forward
from fxcompress.sensitivity import Measured, Sensitivity, price, prices, sensitivity

log = logging.getLogger("fxcompress")

NORM_SPEC = "affine(bits=1,group=128)"  # what ALAM perturbs by
_RANGE_GROUP = 256  # ActNN's
# Where few directions of the gradient feel a tensor, as a query of attention, one probe says
# anything between a thirtieth and three times what is true. Plans of a ViT from 1, 2, 4 and 8 had
# noise of 4.7, 2.7, 3.0 and 2.6e-4; the fourth takes as long as one more backward.
PROBES = 4


def calibrate(
    model: nn.Module,
    *batches: Any,
    loss: Callable[[Any], Tensor] | None = None,
    min_bytes: int = 16384,
    group: int = 256,
    weighting: str = "plain",
    probes: int = PROBES,
) -> Calibration:
    """Measure what each codec on each saved tensor would do to the gradients of ``model``.

    The model, its statistics and PyTorch's random state are left as they were. A batch may be
    smaller than the one trained on: what is measured is relative to the gradient's norm. Bases of
    transform codecs are fitted to all batches but the last quarter and priced on that, so give two.

    >>> calibration = fxcompress.calibrate(model, batch1, batch2, loss=loss_of)  # doctest: +SKIP
    >>> backend = fxcompress.backend(4000, calibration=calibration)  # doctest: +SKIP

    Args:
        model: uncompiled module in training mode.
        batches: one or more, alike in shape; each a tensor, or the tuple of positional (or dict of
            keyword) arguments of the model.
        loss: scalar from the model's output; default: the sum of squares of its float tensors.
            Give the one you train with: another loss has other gradients.
        min_bytes, group: as in :func:`fxcompress.backend`.
        weighting: see :func:`fxcompress.sensitivity.sensitivity`.
        probes: random directions to average over, see `PROBES`.

    Raises:
        FxCompressError: the model has nothing to train, or nothing was recorded.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise FxCompressError("the model has no parameter that requires a gradient")
    if not batches:
        raise FxCompressError("give one batch or more: calibrate(model, batch)")
    of_output = loss or sum_of_squares
    copied = copy.deepcopy(model)
    recorder = Recorder(min_bytes)
    compiled = torch.compile(copied, backend=recorder)
    recorded = []
    # A batch smaller than the training's must not make that one's sizes symbolic: another graph.
    with torch.random.fork_rng(), torch_private.sizes_forgotten():
        for batch in batches:
            of_output(call(compiled, batch)).backward()
            recorded.append(recorder.recordings())
    return evidence_of(*recorded, group=group, weighting=weighting, probes=probes)


def evidence_of(
    *recorded: Sequence[Recording],
    group: int = 256,
    weighting: str = "plain",
    probes: int = PROBES,
    used: Mapping[str, str] | None = None,
) -> Calibration:
    """The calibration that recordings of one step or more give; the same graphs in each.

    Bases of transform codecs are fitted to the first three quarters of the steps (one at least) and
    everything is priced on the others (or on the only one).

    Args:
        used: codec specs in use, by tensor name. They are priced too, and their bases are renewed
            first (:func:`fxcompress.fit.renew`).
    """
    by_graph: dict[str, list[Recording]] = {}
    for recordings in recorded:
        for recording in recordings:
            by_graph.setdefault(signature(recording.cut), []).append(recording)
    graphs, spreads = [], []
    for name, found in by_graph.items():
        tensors, spread = _measure(found, group, weighting, probes, used or {})
        graphs.append(GraphEvidence(name, tensors))
        spreads.append(spread)
    return Calibration(tuple(graphs), weighting, len(recorded), _scatter(spreads))


def _measure(
    recordings: Sequence[Recording],
    group: int,
    weighting: str,
    probes: int,
    used: Mapping[str, str],
) -> tuple[dict[str, TensorEvidence], Spread]:
    """Evidence of one graph, and how its gradient differs from batch to batch."""
    held_out = max(1, len(recordings) // 4) if len(recordings) > 1 else 0

    spread = Spread()

    def measured(recording: Recording) -> Sensitivity:
        seen = sensitivity(recording, is_codable, probes=probes, weighting=weighting)
        spread.add(seen)
        return seen

    gathered: dict[str, Moments] = {}
    for recording in recordings[: len(recordings) - held_out]:
        seen = measured(recording)
        _gather(seen, gathered)
    priced = [measured(r) for r in recordings[len(recordings) - held_out :]] if held_out else [seen]
    norms = sensitivity(recordings[0], is_codable, weighting="norm")
    gradients = _layer_gradients(recordings[0])
    found = {}
    for i, tensor in enumerate(norms.tensors):
        name = tensor.candidate.name
        own: dict[str, Price] = {}
        transforms: dict[float, str] = {}
        norm = 0.0
        if all(s.tensors[i].weights is not None for s in priced):
            tables = [prices(s.tensors[i], specs(group), s.gradient_square) for s in priced]
            fitted = fit_transforms(gathered.get(name))
            transforms = {bits: c.spec for bits, c in fitted.items()}
            old = _renewed(used.get(name), gathered.get(name))
            for table, s in zip(tables, priced, strict=True):
                table.update(transform_prices(fitted, s.tensors[i], s.gradient_square))
                if old is not None and old not in table:
                    table[old] = price(s.tensors[i], old, s.gradient_square)
            own = {spec: _mean([table[spec] for table in tables]) for spec in tables[0]}
            if tensor.weights is not None:
                norm = price(tensor, NORM_SPEC, 1.0).variance
        ranges = _sample_ranges(tensor)
        square, count = gradients.get(name, 0.0), tensor.values.numel()
        through = _through([s.passed.get(name, {}) for s in priced])
        found[name] = TensorEvidence(own, transforms, norm, ranges, square, count, through)
    return found, spread


def _through(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the batches, of what was measured on all of them."""
    first, *others = measured
    names = [name for name in first if all(name in other for other in others)]
    return {name: sum(each[name] for each in measured) / len(measured) for name in names}


@dataclass
class Spread:
    """Gradients of one graph on several batches.

    Attributes:
        count: of batches.
        total: the gradients' sum, by parameter, as errors are weighed.
        squares, own: the sum of their squared norms, and of the unweighed ones.
    """

    count: int = 0
    total: tuple[Tensor, ...] = ()
    squares: float = 0.0
    own: float = 0.0

    def add(self, seen: Sensitivity) -> None:
        """One more batch."""
        before = self.total or [torch.zeros_like(g) for g in seen.gradient]
        self.total = tuple(b + g for b, g in zip(before, seen.gradient, strict=True))
        self.count += 1
        self.squares += _square(seen.gradient)
        self.own += seen.gradient_square

    def variance(self) -> float:
        """Of a batch's gradient around the mean of all, squared norms; two batches or more."""
        return max(self.squares - _square(self.total) / self.count, 0.0) / (self.count - 1)


def _scatter(spreads: Sequence[Spread]) -> float | None:
    """Variance of the whole gradient between batches over its squared norm; None of one batch."""
    square = sum(s.own / s.count for s in spreads)
    if square == 0 or any(s.count < 2 for s in spreads):
        return None
    return sum(s.variance() for s in spreads) / square


def _square(tensors: Sequence[Tensor]) -> float:
    return sum(float(t.float().square().sum()) for t in tensors)


def _gather(seen: Sensitivity, found: dict[str, Moments]) -> None:
    """Add the moments of one more batch to those found so far, by tensor name."""
    for tensor in seen.tensors:
        if not is_fitted(tensor):
            continue
        assert tensor.weights is not None
        name = tensor.candidate.name
        one = moments(tensor.values, tensor.readings, tensor.candidate.channels)
        found[name] = together(found[name], one) if name in found else one


def _renewed(spec: str | None, found: Moments | None) -> str | None:
    """The spec in use, its basis renewed if it has one; None if it cannot be priced."""
    used = None if spec is None else codec(spec)
    if isinstance(used, Transform):
        if found is None or tuple(states.arrays(used.basis)["sides"].tolist()) not in found.values:
            return None
        renew(used, found)
    return spec


def _mean(prices: Sequence[Price]) -> Price:
    count, total = len(prices), sum(p.variance for p in prices)
    passing = sum(p.passing * p.variance for p in prices) / total if total > 0 else 1.0
    return Price(total / count, sum(p.bias for p in prices) / count, passing)


def _layer_gradients(recording: Recording) -> dict[str, float]:
    """By layer input: mean over samples of the squared norm of its output's gradient."""
    products = {c.name: p for c in recording.candidates if (p := product_of(c)) is not None}
    saved, _ = run_forward(recording, recording.cut)
    arguments = backward_inputs(recording, recording.cut, saved)
    watch = {p.gradient.name for p in products.values()}
    _, watched = evaluate(recording.cut.backward, arguments, watch)
    samples = {c.name: c.stored_shape[0] for c in recording.candidates if c.stored_shape}
    return {
        name: float(watched[p.gradient.name].float().square().sum()) / samples[name]
        for name, p in products.items()
    }


def _sample_ranges(tensor: Measured) -> tuple[float, ...]:
    """Σ (max − min)² over groups of each sample, short last groups included."""
    values = tensor.values
    if values.dim() == 0:
        return ()
    rows = values.reshape(values.shape[0], -1).float()
    whole = rows.shape[1] // _RANGE_GROUP * _RANGE_GROUP
    total = torch.zeros(rows.shape[0])
    for part in (
        rows[:, :whole].view(rows.shape[0], -1, _RANGE_GROUP),
        rows[:, whole:].unsqueeze(1),
    ):
        if part.numel():
            total += (part.amax(-1) - part.amin(-1)).square().sum(1).cpu()
    return tuple(total.tolist())


def call(model: Callable[..., Any], batch: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*(batch if isinstance(batch, tuple | list) else (batch,)))


def sum_of_squares(output: Any) -> Tensor:
    """Sum of squares of all float tensors in a model's output.

    Raises:
        FxCompressError: there are none.
    """
    leaves: Sequence[Any] = torch.utils._pytree.tree_leaves(output)
    found = [
        x.float().square().sum() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()
    ]
    if not found:
        raise FxCompressError("the model returns no float tensor; pass loss=")
    return sum(found[1:], found[0])
