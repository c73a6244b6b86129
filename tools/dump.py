"""`fxcompress dump`: the precision of every saved tensor, and what changed between two plans."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fxcompress.errors import FxCompressError
from fxcompress.plan import Plan, TensorPlan
from fxcompress.tools import output, plan_command
from fxcompress.tools.output import Row, megabytes
from fxcompress.tools.values import errors as measured_errors

EXAMPLES = """\
examples:
  fxcompress dump plan.json --sort bytes
  fxcompress dump gpt:small --budget-mb 20 --values --format csv > precision.csv
  fxcompress dump plan.json --format json | jq '.tensors[] | select(.bits < 4) | .tensor'
  fxcompress dump --diff before.json after.json
"""

FORMAT = 1  # of the JSON: dump.schema.json

_SORTS: dict[str, Callable[[TensorPlan], float]] = {
    "bytes": lambda t: -t.storage_bytes,
    "noise": lambda t: -(t.predicted_variance or 0.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress dump`."""
    parser.add_argument(
        "source", nargs="?", metavar="PLAN.json|MODEL", help="a saved plan, or a model to plan for"
    )
    parser.add_argument(
        "--diff", nargs=2, type=Path, metavar=("A.json", "B.json"), help="what B changes over A"
    )
    parser.add_argument("--format", choices=output.FORMATS, default="table")
    parser.add_argument(
        "--sort", choices=_SORTS, help="largest first (default: the order of the forward pass)"
    )
    parser.add_argument(
        "--values",
        action="store_true",
        help="for a MODEL: each tensor's measured quantization error, over its values",
    )
    plan_command.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print one plan, or the difference of two."""
    if (args.source is None) == (args.diff is None):
        raise FxCompressError("give one plan (or model), or --diff A.json B.json")
    if args.diff is not None:
        first, second = map(plan_command.load, args.diff)
        rows = differences(first, second)
        totals = {"before": _totals(first), "after": _totals(second)}
        title = (
            f"{len(rows)} of {len(_by_name(first) | _by_name(second))} tensors changed; saved "
            f"{megabytes(first.saved_bytes)} → {megabytes(second.saved_bytes)} MB, planned peak "
            f"{megabytes(first.planned_peak_bytes)} → {megabytes(second.planned_peak_bytes)} MB, "
            f"gradient variance {first.predicted_variance:.3g} → {second.predicted_variance:.3g}"
        )
        _write("diff", rows, _DIFF_COLUMNS, args.format, title, totals)
        return 0
    if args.values and args.source.endswith(".json"):
        raise FxCompressError("--values needs a MODEL: a saved plan has no values")
    plan = plan_command.plan_of(args)
    errors = {}
    if args.values:
        task = plan_command.task_of(args.source, args.batch, args.size, args.seed)
        errors = measured_errors(plan, plan_command.recorded(task))
    tensors = sorted(plan.tensors, key=_SORTS[args.sort]) if args.sort else plan.tensors
    title = (
        f"policy {plan.policy}; saved {megabytes(plan.saved_bytes_before)} → "
        f"{megabytes(plan.saved_bytes)} MB, planned peak {megabytes(plan.plain_peak_bytes)} → "
        f"{megabytes(plan.planned_peak_bytes)} MB, gradient variance "
        f"{plan.predicted_variance:.3g} ({'measured' if plan.calibrated else 'guessed'})"
    )
    rows = [row(t, plan.predicted_variance, errors.get(t.name)) for t in tensors]
    _write("dump", rows, _COLUMNS, args.format, title, _totals(plan), plan.remarks)
    return 0


def row(tensor: TensorPlan, whole_variance: float, error: float | None = None) -> dict[str, Any]:
    """One line of the dump; ``whole_variance`` is that of the plan, ``error`` was measured."""
    variance = tensor.predicted_variance
    sizes_known = all(isinstance(size, int) for size in tensor.shape)
    return {
        "tensor": tensor.name,
        "module": tensor.module,
        "source": tensor.source,
        "op": tensor.op,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype.removeprefix("torch."),
        "readers": readers(tensor),
        "recompute_steps": len(tensor.recompute),
        "representation": tensor.representation,
        "lowering": tensor.lowering,
        "bits": round(tensor.bits, 3) if sizes_known else None,
        "bytes_before": tensor.storage_bytes,
        "bytes_after": tensor.bytes_after,
        "variance_share": share(variance, whole_variance),
        "biased": tensor.biased,
        "bias": tensor.predicted_bias,
        "measured_error": error,
        "reason": tensor.reason,
    }


def share(variance: float | None, whole: float) -> float | None:
    """Part of the whole plan's noise; None where nobody weighed the tensor."""
    if variance is None:
        return None
    return variance / whole if whole else 0.0


def readers(tensor: TensorPlan) -> list[str]:
    """Backward ops that read it: ``mul ×2``, and ``le (exact)`` for those that see no decode."""
    marked = [*tensor.smooth_readers, *(f"{name} (exact)" for name in tensor.exact_readers)]
    counted = Counter(marked)
    return [name if count == 1 else f"{name} ×{count}" for name, count in counted.items()]


def differences(first: Plan, second: Plan) -> list[dict[str, Any]]:
    """Tensors that ``second`` treats otherwise than ``first``, or that only one of them has."""
    old, new = _by_name(first), _by_name(second)
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if before is None or after is None or _fate(before) != _fate(after):
            shown = after or before
            assert shown is not None
            found.append(
                {
                    "tensor": shown.name,
                    "module": shown.module,
                    "representation_before": None if before is None else before.representation,
                    "representation_after": None if after is None else after.representation,
                    "bytes_before": None if before is None else before.bytes_after,
                    "bytes_after": None if after is None else after.bytes_after,
                    "variance_before": None if before is None else before.predicted_variance,
                    "variance_after": None if after is None else after.predicted_variance,
                    "reason": shown.reason,
                }
            )
    return found


_COLUMNS = tuple(row(TensorPlan("", "", "", "", (), "", 0, (), (), (), "", 0, ""), 0.0))
_DIFF_COLUMNS = (
    *("tensor", "module", "representation_before", "representation_after"),
    *("bytes_before", "bytes_after", "variance_before", "variance_after", "reason"),
)


def _fate(tensor: TensorPlan) -> tuple[object, ...]:
    return tensor.representation, tensor.bytes_after, tensor.predicted_variance


def _by_name(plan: Plan) -> dict[tuple[str, int], TensorPlan]:
    """Tensors by name; graphs of one model may use a name again, so the how-manieth counts."""
    seen: Counter[str] = Counter()
    found = {}
    for tensor in plan.tensors:
        found[tensor.name, seen[tensor.name]] = tensor
        seen[tensor.name] += 1
    return found


def _totals(plan: Plan) -> dict[str, Any]:
    return {
        "policy": plan.policy,
        "budget_mb": plan.budget_mb,
        "saved_bytes_before": plan.saved_bytes_before,
        "saved_bytes": plan.saved_bytes,
        "plain_peak_bytes": plan.plain_peak_bytes,
        "planned_peak_bytes": plan.planned_peak_bytes,
        "measured_saved_bytes": plan.measured_saved_bytes,
        "measured_peak_bytes": plan.measured_peak_bytes,
        "predicted_variance": float(plan.predicted_variance),
        "calibrated": plan.calibrated,
        "gap": plan.gap,
        "slowdown": plan.slowdown,
    }


def _write(
    kind: str,
    rows: Sequence[Row],
    columns: Iterable[str],
    form: str,
    title: str,
    totals: dict[str, Any],
    note: str = "",
) -> None:
    columns = list(columns)
    if form == "json":
        value = {"format": FORMAT, "kind": kind, "totals": totals, "tensors": list(rows)}
        output.write_json(value, sys.stdout)
    elif form == "csv":
        output.write_csv(columns, rows, sys.stdout)
    elif form == "md":
        output.write_markdown(columns, rows, sys.stdout)
    else:
        output.write_table(columns, [_spelled(r) for r in rows], title, note)


def _spelled(row: Row) -> Row:
    """For reading: a shape as 64×3."""
    if "shape" not in row:
        return row
    return {**row, "shape": "×".join(map(str, row["shape"])) or "scalar"}
