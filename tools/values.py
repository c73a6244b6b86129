"""Values: what each saved tensor holds, and the error that its codec adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.choose import is_codable
from fxcompress.codecs import codec
from fxcompress.passes.rewrite import UNCODED
from fxcompress.plan import Plan
from fxcompress.record import Recording
from fxcompress.sensitivity import sensitivity

BINS = 48


def histograms(plan: Plan, recordings: Sequence[Recording]) -> dict[str, list[dict[str, Any]]]:
    """By tensor name: its values as its codec sees them, and the error the codec adds.

    Batch-norm inputs are seen standardised. Each histogram: title, low, high (of the values),
    counts.

    Args:
        plan: of the model that was recorded.
        recordings: of one step.
    """
    specs = {tensor.name: tensor.representation for tensor in plan.tensors}
    return {name: list(_of(values, specs.get(name, ""))) for name, values in _values(recordings)}


def errors(plan: Plan, recordings: Sequence[Recording]) -> dict[str, float]:
    """By tensor name: root mean square of its quantization error over that of its values."""
    specs = {tensor.name: tensor.representation for tensor in plan.tensors}
    found = {}
    for name, values in _values(recordings):
        spec = specs.get(name, "")
        if spec and spec not in UNCODED:
            square = float(values.float().square().sum())
            found[name] = (float(_error(values, spec).square().sum()) / max(square, 1e-30)) ** 0.5
    return found


def _error(values: Tensor, spec: str) -> Tensor:
    found, key = codec(spec), torch.tensor([1, 0], device=values.device)
    payload = found.encode(values, key, 0)
    return found.decode(payload, values.shape, values.dtype, key, 0).float() - values.float()


def _values(recordings: Sequence[Recording]) -> Iterator[tuple[str, Tensor]]:
    for recording in recordings:
        for tensor in sensitivity(recording, is_codable, probes=0).tensors:
            yield tensor.candidate.name, tensor.values


def _of(values: Tensor, spec: str) -> Iterator[dict[str, Any]]:
    spread = float(values.float().std())
    yield _histogram(f"Values, standard deviation {spread:.3g}", values)
    if spec and spec not in UNCODED:
        error = _error(values, spec)
        rms = float(error.square().mean().sqrt())
        yield _histogram(f"Quantization error, rms {rms:.3g}", error)


def _histogram(title: str, values: Tensor) -> dict[str, Any]:
    flat = values.float().flatten()
    low, high = float(flat.min()), float(flat.max())
    counts = torch.histc(flat, BINS, low, high).int().tolist()
    return {"title": title, "low": low, "high": high, "counts": counts}
