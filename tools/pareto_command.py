"""`fxcompress pareto`: what less memory costs in gradient noise and time, before any training.

The curve are plans of policy auto, from the lowest feasible peak to plain Inductor's; other
policies are single points beside it. All are priced alike, by one double backward on the batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fxcompress.calibrate import evidence_of
from fxcompress.choose import is_codable
from fxcompress.errors import FxCompressError, SettingsError
from fxcompress.evidence import Calibration
from fxcompress.pareto import pareto
from fxcompress.passes.rewrite import UNCODED
from fxcompress.plan import Plan
from fxcompress.policies import policy
from fxcompress.sensitivity import Measured, price, sensitivity
from fxcompress.tools import models, output, plan_command, plots
from fxcompress.tools.harness import split_policies
from fxcompress.tools.models import Task

EXAMPLES = """\
examples:
  fxcompress pareto gpt:small --batch 16 --size 256 -o pareto.png
  fxcompress pareto torchvision:resnet18 --points 12 --policies actnn-l3,gact-l2,uniform2
  fxcompress pareto gpt:small --format json | jq '.rows[] | select(.variance < 0.01)'
"""

SEEDS = "lossless,uniform4,uniform2,fp8,actnn-l3,gact-l1.2,aq-1.25,alam,division,thesis-stoch"


@dataclass(frozen=True)
class Row:
    """One plan.

    Attributes:
        policy: its name; "auto" for the points of the curve.
        peak_mb, saved_mb: as planned, MB.
        variance: predicted squared error of the gradient over its square, bias included.
        unpriced: tensors whose error could not be predicted and is not in it.
        overhead: share by which coding lengthens the step, predicted; None where nobody did.
    """

    policy: str
    peak_mb: float
    saved_mb: float
    variance: float
    unpriced: int
    overhead: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress pareto`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights and batch")
    parser.add_argument("--points", type=int, default=8, help="of the curve")
    parser.add_argument(
        "--policies", default=SEEDS, help="beside the curve, commas between; default: %(default)s"
    )
    parser.add_argument("--format", choices=output.FORMATS, default="table")
    parser.add_argument("-o", "--output", type=Path, metavar="PLOT", help=".png, .svg, …")


def run(args: argparse.Namespace) -> int:
    """Print the table, and plot with -o."""
    names = [name for name in split_policies(args.policies) if name != "auto"]  # auto is the curve
    for name in names:
        policy(name)  # refuses an unknown one before the work
    if args.points < 2:
        raise SettingsError("--points must be 2 or more")
    if args.output is not None:
        plots.pyplot()
    task = plan_command.task_of(args.model, args.batch, args.size, args.seed)
    notes = Console(stderr=True)
    with notes.status("recording a step") as status:
        recordings = plan_command.recorded(task)
        calibration = evidence_of(recordings)
        found = [sensitivity(r, is_codable, probes=2, seed=1) for r in recordings]
        priced = {t.candidate.name: t for s in found for t in s.tensors}
        square = sum(s.gradient_square for s in found)
        status.update("planning the curve")
        rows = list(_curve(task, args.points, calibration, priced, square))
        for name in names:
            status.update(f"planning {name}")
            try:
                plan = plan_command.plan_for(task, policy=name, calibration=calibration)
            except FxCompressError as error:
                notes.print(f"{name} left out: {error}", markup=False, style="dim")
            else:
                rows.append(_row(name, plan, priced, square, None))
    title = f"{args.model}, batch {args.batch}, size {args.size}"
    _write(rows, args.format, title)
    if args.output is not None:
        plots.pareto(rows, args.output, title)
        notes.print(f"wrote {args.output}", markup=False, style="dim")
    return 0


def _curve(
    task: Task,
    points: int,
    calibration: Calibration,
    priced: Mapping[str, Measured],
    square: float,
) -> Iterator[Row]:
    batch: Any = dict(task.keywords) or task.inputs
    for point in pareto(task.model, batch, points=points, calibration=calibration):
        yield _row("auto", point.plan, priced, square, point.overhead)


def _row(
    name: str,
    plan: Plan,
    priced: Mapping[str, Measured],
    square: float,
    overhead: float | None,
) -> Row:
    variance, unpriced = 0.0, 0
    for tensor in plan.tensors:
        measured = priced.get(tensor.name)
        if tensor.representation in UNCODED or measured is None:
            continue
        if measured.weights is None:
            unpriced += 1
            continue
        found = price(measured, tensor.representation, square)
        variance += found.variance + found.bias
    return Row(
        policy=name,
        peak_mb=plan.planned_peak_bytes / 1e6,
        saved_mb=plan.saved_bytes / 1e6,
        variance=variance,
        unpriced=unpriced,
        overhead=overhead,
    )


def _write(rows: Sequence[Row], form: str, title: str) -> None:
    columns = list(asdict(rows[0]))
    cells = [asdict(row) for row in rows]
    if form == "json":
        output.write_json({"title": title, "rows": cells}, sys.stdout)
    elif form == "csv":
        output.write_csv(columns, cells, sys.stdout)
    elif form == "md":
        output.write_markdown(columns, cells, sys.stdout)
    else:
        output.write_table(columns, cells, title)
