"""`fxcompress bench batch`: the largest batch that fits a fixed peak, found by measuring."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fxcompress
from fxcompress.errors import BudgetError, SettingsError
from fxcompress.pareto import max_batch
from fxcompress.policies import policy
from fxcompress.tools import harness, memory, models

MB = 1e6
BASELINE = "inductor"
CLOSE = 0.03  # of the batch: near enough to stop

EXAMPLES = """\
examples:
  fxcompress bench batch torchvision:resnet50 --size 112 --budget-mb 200
  fxcompress bench batch gpt:small --size 256 --budget-mb 100 --policies inductor,auto
"""


@dataclass(frozen=True)
class Row:
    """The largest batch of one policy.

    Attributes:
        batch: that was run and stayed within the budget; 0: none did.
        peak_mb: of activations, measured at that batch.
        seconds: of its step, forward and backward, over the batch: of one sample.
        too_large: the smallest batch that was tried and did not fit, or was refused; None: none.
        tried: how many batches were compiled and run, or refused.
    """

    batch: int
    peak_mb: float
    seconds: float
    too_large: int | None
    tried: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench batch`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--budget-mb", type=float, required=True, help="peak of activations, MB")
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument("--batch", type=int, default=8, help="to begin with")
    parser.add_argument("--policies", default="inductor,actnn-l3,uniform2,auto")
    parser.add_argument("--tries", type=int, default=4, help="batches to run for each policy")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    harness.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and with --json one line of JSON."""
    policies = list(dict.fromkeys([BASELINE, *harness.split_policies(args.policies)]))
    for name in policies:
        policy(name)
    if args.tries < 2 or args.batch < 1:
        raise SettingsError("--tries must be 2 or more, --batch 1 or more")
    done = harness.results(args, "model", "size", "batch", "budget_mb", "tries", "device", "seed")
    with harness.bars() as bars:
        rows = {
            name: Row(**done.part(name, _row, name, args))
            for name in bars.track(policies, description="largest batches")
        }
    about = {
        "model": args.model,
        "size": args.size,
        "budget_mb": args.budget_mb,
        "seed": args.seed,
        "machine": harness.machine(args.device),
    }
    _print(rows, about)
    if args.json:
        print(json.dumps({"policies": {name: asdict(row) for name, row in rows.items()}, **about}))
    return 0


def _row(name: str, args: argparse.Namespace) -> Row:
    """Peaks grow along a line, almost: each guess is where the last two points meet the budget."""
    fits, too_large = Row(0, 0.0, 0.0, None, 0), None
    points: list[tuple[int, float]] = []
    guess = _planned(name, args) or args.batch
    tried = 0
    while tried < args.tries and guess > fits.batch and (too_large is None or guess < too_large):
        tried += 1
        measured = _measure(name, guess, args)
        if measured is not None:
            points.append((guess, measured[0]))
        if measured is not None and measured[0] <= args.budget_mb * MB:
            fits = Row(guess, measured[0] / MB, measured[1] / guess, None, 0)
        else:
            too_large = guess
        guess = _next(points, fits.batch, too_large, args.budget_mb * MB)
        if too_large is not None and too_large - fits.batch <= max(1, CLOSE * fits.batch):
            break
    return Row(fits.batch, fits.peak_mb, fits.seconds, too_large, tried)


def _planned(name: str, args: argparse.Namespace) -> int | None:
    """Of a policy that plans for the budget: the batch that it says is the largest."""
    if not policy(name).solves:
        return None
    task = models.load(args.model, args.batch, args.size)
    batch: Any = dict(task.keywords) or task.inputs
    try:
        return max_batch(task.model, batch, args.budget_mb, policy=name)
    except BudgetError:
        return None


def _next(points: list[tuple[int, float]], fits: int, too_large: int | None, budget: float) -> int:
    """Where the line through the last two points meets the budget, or halfway."""
    (a, low), (b, high) = sorted([(0, 0.0), *points])[-2:] if points else ((0, 0.0), (1, 0.0))
    slope = (high - low) / max(b - a, 1)
    guess = int(b + (budget - high) / slope) if slope > 0 else 2 * b
    if too_large is not None and not fits < guess < too_large:
        guess = (fits + too_large) // 2
    return max(guess, 1)


def _measure(name: str, batch: int, args: argparse.Namespace) -> tuple[float, float] | None:
    """(peak in bytes, seconds of a step); None: the planner refuses."""
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(args.seed)
    task = models.load(args.model, batch, args.size, args.device)
    backend: Any = BASELINE
    if name != BASELINE:
        budget = args.budget_mb if policy(name).solves else None
        backend = fxcompress.backend(budget, policy=name)
    compiled = torch.compile(task.model, backend=backend)

    def step() -> None:
        task.model.zero_grad(set_to_none=True)
        task.forward(compiled).backward()

    try:
        step()
    except BudgetError:
        return None
    step()
    peak = memory.measure_step(step, task.model.parameters()).peak_bytes
    return float(peak), harness.seconds(step)


def _print(rows: dict[str, Row], about: dict[str, Any]) -> None:
    table = Table(title=f"{about['model']}, size {about['size']}, within {about['budget_mb']:g} MB")
    table.add_column("policy")
    for heading in ("largest batch", "× plain", "peak MB", "ms a sample", "too large", "tried"):
        table.add_column(heading, justify="right")
    plain = rows[BASELINE].batch
    for name, row in rows.items():
        table.add_row(
            name,
            str(row.batch),
            f"{row.batch / plain:.2f}" if plain else "-",
            f"{row.peak_mb:.1f}",
            f"{1e3 * row.seconds:.1f}",
            str(row.too_large or "-"),
            str(row.tried),
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(harness.describe(about["machine"]), highlight=False)
    console.print(f"seed {about['seed']}")
