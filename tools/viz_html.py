"""Page: a plan as one HTML file that needs no network: graph, table, memory, ladder of noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from fxcompress.pareto import Point
from fxcompress.plan import Plan, TensorPlan
from fxcompress.tools.dump import readers, share
from fxcompress.tools.viz_tree import (
    KINDS,
    Module,
    height,
    kind_of,
    module_tree,
    readable_depth,
    tensor_kind,
)

_SCRIPTS = ("viz_data.js", "viz_rows.js", "viz_panels.js", "viz_main.js")  # in this order


Histograms = Mapping[str, Sequence[Mapping[str, Any]]]


def page(
    plan: Plan,
    title: str,
    depth: int | None = None,
    histograms: Histograms | None = None,
    points: Sequence[Point] = (),
) -> str:
    """The whole file as text.

    Args:
        plan: what to show.
        title: name of the model or file.
        depth: of modules in the first view; None: as deep as stays readable.
        histograms: by tensor name, from :func:`fxcompress.tools.values.histograms`.
        points: what the slider goes through, from :func:`fxcompress.pareto`; without them it walks
            down the alternatives of ``plan``, an estimate.
    """
    data = json.dumps(payload(plan, title, depth, histograms, points), separators=(",", ":"))
    folder = files("fxcompress.tools")
    parts = {
        "STYLE": folder.joinpath("viz.css").read_text("utf-8"),
        "DATA": data.replace("<", "\\u003c"),  # no "</script>" of a module's name ends the script
        "SCRIPT": "\n".join(folder.joinpath(name).read_text("utf-8") for name in _SCRIPTS),
    }
    whole = folder.joinpath("viz.html").read_text("utf-8")
    for name, text in parts.items():
        before, _, after = whole.partition(f"/*{name}*/")
        whole = before + text + after
    return whole


def payload(
    plan: Plan,
    title: str,
    depth: int | None = None,
    histograms: Histograms | None = None,
    points: Sequence[Point] = (),
) -> dict[str, Any]:
    """What the page's scripts read; see viz_data.js."""
    root = module_tree(plan)
    specs: dict[str, int] = {}
    tensors = [_tensor(t, plan.predicted_variance, specs) for t in plan.tensors]
    for tensor in tensors:
        tensor["histograms"] = (histograms or {}).get(tensor["name"], [])
    curve = sorted(points, key=lambda point: -point.peak_bytes)
    stands = [_point(point, plan, specs) for point in curve]
    return {
        "title": title,
        "depth": readable_depth(root) if depth is None else depth,
        "deepest": height(root),
        "plan": {
            "policy": plan.policy,
            "budget_mb": plan.budget_mb,
            "before": plan.saved_bytes_before,
            "after": plan.saved_bytes,
            "plain_peak": plan.plain_peak_bytes,
            "planned_peak": plan.planned_peak_bytes,
            "measured_saved": plan.measured_saved_bytes,
            "measured_peak": plan.measured_peak_bytes,
            "variance": plan.predicted_variance,
            "calibrated": plan.calibrated,
            "gap": plan.gap,
            "slowdown": plan.slowdown,
            "graphs": plan.graphs,
            "note": plan.remarks,
        },
        "kinds": {name: [kind.colour, kind.meaning] for name, kind in KINDS.items()},
        "specs": list(specs),
        "tensors": tensors,
        "tree": _module(root),
        "points": stands,
        "timeline": {
            "nodes": [m.node for m in plan.timeline],
            "modules": [m.module for m in plan.timeline],
            "forward": sum(m.phase == "forward" for m in plan.timeline),
            "plain": [m.plain_bytes for m in plan.timeline],
            "planned": [m.planned_bytes for m in plan.timeline],
            "measured": plan.measured,
        },
    }


def _point(point: Point, plan: Plan, specs: dict[str, int]) -> dict[str, Any]:
    """A plan of the curve: for each tensor of the page [index into specs, bytes, noise, kind]."""
    own = {tensor.name: tensor for tensor in point.plan.tensors}
    return {
        "peak": point.peak_bytes,
        "saved": point.saved_bytes,
        "variance": point.variance,
        "overhead": point.overhead,
        "planned": [m.planned_bytes for m in point.plan.timeline],
        "fates": [
            [
                specs.setdefault(t.representation, len(specs)),
                t.bytes_after,
                t.predicted_variance or 0.0,
                tensor_kind(t),
            ]
            for t in (own.get(shown.name, shown) for shown in plan.tensors)
        ],
    }


def _tensor(tensor: TensorPlan, whole_variance: float, specs: dict[str, int]) -> dict[str, Any]:
    def bits(size: int) -> float:
        return 8 * size / max(tensor.numel, 1)

    alternatives = [
        [
            specs.setdefault(a.representation, len(specs)),
            a.bytes,
            a.noise,
            kind_of(a.representation, bits(a.bytes)),
        ]
        for a in tensor.alternatives
    ]
    return {
        "name": tensor.name,
        "module": tensor.module,
        "source": tensor.source,
        "op": tensor.op,
        "shape": "×".join(map(str, tensor.shape)) or "scalar",
        "dtype": tensor.dtype.removeprefix("torch."),
        "before": tensor.storage_bytes,
        "after": tensor.bytes_after,
        "readers": readers(tensor),
        "masked": bool(tensor.exact_readers),
        "recompute": list(tensor.recompute),
        "alive": tensor.alive,
        "rep": tensor.representation,
        "kind": tensor_kind(tensor),
        "numel": tensor.numel,
        "variance": tensor.predicted_variance,
        "share": share(tensor.predicted_variance, whole_variance),
        "reason": tensor.reason,
        "alts": alternatives,
    }


def _module(module: Module) -> dict[str, Any]:
    return {
        "path": module.path,
        "label": module.label,
        "tensors": module.tensors,
        "children": [_module(child) for child in module.children],
        "members": [_module(member) for member in module.members],
    }
