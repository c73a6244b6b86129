"""`fxcompress bench budget`: whether a budget holds, from easy ones to those that are refused.

Plain Inductor's peak is measured first; then the model is compiled for shares of it. A budget is
either met, or refused before the step has allocated anything.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from rich.progress import Progress

import fxcompress
from fxcompress import Calibration
from fxcompress.errors import BudgetError, FxCompressError, SettingsError
from fxcompress.tools import harness, models, output
from fxcompress.tools.harness import Results
from fxcompress.tools.memory import measure_step
from fxcompress.tools.models import Task

MB = 1e6
SHARES = (0.8, 0.6, 0.4, 0.25, 0.15)
EXAMPLES = """\
examples:
  fxcompress bench budget torchvision:resnet18 --batch 16 --size 64
  fxcompress bench budget gpt:small --batch 4 --size 128 --shares 0.5,0.3 --json
"""


@dataclass(frozen=True)
class Row:
    """One budget. MB are 1e6 bytes; what a refused budget has no value for is None.

    Attributes:
        share: of plain Inductor's measured peak.
        planned_mb, measured_mb: peak of activation memory; of a refused budget, `measured_mb` is
            what was allocated before the refusal.
        accuracy: planned over measured.
        smallest_mb: of a refused budget, the smallest that would do, as the error says.
        variance: predicted squared error of the gradient over its squared norm.
        gap: of the solver.
    """

    share: float
    budget_mb: float
    feasible: bool
    planned_mb: float | None
    measured_mb: float
    accuracy: float | None
    smallest_mb: float | None
    saved_mb: float | None
    variance: float | None
    gap: float | None
    compile_s: float

    @property
    def holds(self) -> bool:
        """Met, or refused with nothing allocated to speak of."""
        return self.measured_mb <= (self.budget_mb if self.feasible else 0.01 * self.budget_mb)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench budget`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    shares = ",".join(f"{share:g}" for share in SHARES)
    parser.add_argument("--shares", default=shares, help=f"of plain Inductor's peak: {shares}")
    parser.add_argument("--inner", default="inductor", help="inductor or aot_eager")
    harness.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table or, with --json, one JSON object; 1 if a budget did not hold."""
    try:
        shares = [float(share) for share in args.shares.split(",")]
    except ValueError:
        raise SettingsError(f"--shares {args.shares!r} is no list of numbers") from None
    torch.manual_seed(args.seed)
    task = models.load(args.model, args.batch, args.size)
    done = harness.results(args, "model", "batch", "size", "inner", "seed")
    with harness.bars() as bars:
        plain, rows = measure(task, shares, args.inner, done, bars)
    about = {
        "model": args.model,
        "batch": args.batch,
        "size": args.size,
        "seed": args.seed,
        "inner": args.inner,
        "plain_peak_mb": plain / MB,
        "machine": harness.machine(),
    }
    table = [{**asdict(row), "holds": row.holds} for row in rows]
    title = f"{args.model}, batch {args.batch}, size {args.size}: plain peak {plain / MB:.1f} MB"
    output.write_table(list(table[0]), table, title)
    print(harness.describe(about["machine"]))
    if args.json:
        print(json.dumps({**about, "budgets": table}))
    return 0 if all(row.holds for row in rows) else 1


def measure(
    task: Task,
    shares: Sequence[float],
    inner: str = "inductor",
    done: Results | None = None,
    bars: Progress | None = None,
) -> tuple[int, list[Row]]:
    """(plain Inductor's measured peak in bytes, a row for each share of it).

    Args:
        task: the model, its batch and loss; left as it was.
        shares: of plain Inductor's peak.
        inner: as for :func:`fxcompress.backend`.
        done, bars: where rows are kept, and progress is shown.

    Raises:
        FxCompressError: a step failed for another reason than its budget.
    """
    done = done or Results()
    peak = done.part("plain", _plain_peak, task, inner)
    calibration = cache(partial(_calibrated, task))
    shown = shares if bars is None else bars.track(shares, description="budgets")
    rows = [done.part(f"{s:g}", _row, task, s, peak, calibration, inner) for s in shown]
    return peak, [Row(**row) for row in rows]


def _plain_peak(task: Task, inner: str) -> int:
    plain = task.copy()
    torch._dynamo.reset()
    backend: Any = (
        "inductor" if inner == "inductor" else fxcompress.backend(policy="inductor", inner=inner)
    )
    compiled = torch.compile(plain.model, backend=backend)
    step(plain, compiled)
    return measure_step(lambda: step(plain, compiled), plain.model.parameters()).peak_bytes


def step(task: Task, compiled: Any) -> None:
    task.forward(compiled).backward()


def _calibrated(task: Task) -> Calibration:
    copied = task.copy()
    batch: Any = dict(task.keywords) if task.keywords else task.inputs
    return fxcompress.calibrate(copied.model, batch, loss=task.loss)


def _row(
    task: Task, share: float, peak: int, calibrated: Callable[[], Calibration], inner: str
) -> Row:
    calibration = calibrated()
    copied = task.copy()
    torch._dynamo.reset()
    budget = share * peak / MB
    backend = fxcompress.backend(budget, inner=inner, calibration=calibration)
    compiled = torch.compile(copied.model, backend=backend)
    parameters = list(copied.model.parameters())
    refusals: list[BudgetError] = []

    def first() -> None:
        try:
            step(copied, compiled)
        except BudgetError as error:
            refusals.append(error)

    start = time.perf_counter()
    before = measure_step(first, parameters).peak_bytes
    seconds = time.perf_counter() - start
    if refusals:
        return Row(
            share, budget, False, None, before / MB, None, _smallest(refusals[0]),
            None, None, None, seconds,
        )  # fmt: skip
    taken = measure_step(lambda: step(copied, compiled), parameters).peak_bytes
    plan = backend.plan()
    return Row(
        share, budget, True, plan.planned_peak_bytes / MB, taken / MB,
        plan.planned_peak_bytes / taken, None, plan.saved_bytes / MB,
        plan.predicted_variance, plan.gap, seconds,
    )  # fmt: skip


def _smallest(error: BudgetError) -> float:
    found = re.search(r"smallest feasible budget is ([\d.]+) MB", str(error))
    if found is None:
        raise FxCompressError(f"a refusal that names no budget: {error}")
    return float(found[1])
