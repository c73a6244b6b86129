"""`fxcompress bench accuracy`: train with several policies side by side, over several seeds."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from rich.progress import Progress

import fxcompress
from fxcompress.calibrate import evidence_of
from fxcompress.errors import FxCompressError, SettingsError
from fxcompress.evidence import Calibration
from fxcompress.passes.rewrite import KEEP
from fxcompress.policies import policy
from fxcompress.sensitivity import WEIGHTING, WEIGHTINGS
from fxcompress.tools import harness, memory, models, output
from fxcompress.tools.bench_noise import MIN_BYTES
from fxcompress.tools.feed import Feed, feed, recorded
from fxcompress.tools.models import Task

BATCHES = 20  # of held-out data at the end


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        losses: of each step after the warm-up.
        validation_loss, accuracy: on held-out data; accuracy of classifiers, else None.
        saved_mb, plain_saved_mb: saved tensors of a step, under the policy and plain.
        seconds: median of a step.
        peak_mb: measured over one more step (:func:`fxcompress.tools.memory.measure_step`).
    """

    policy: str
    seed: int
    losses: tuple[float, ...]
    validation_loss: float
    accuracy: float | None
    saved_mb: float
    plain_saved_mb: float
    seconds: float
    peak_mb: float | None = None


@dataclass(frozen=True)
class Start:
    """Where all policies of a seed set out: after some exact steps, with a calibration."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    calibration: Calibration
    plain_saved_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench accuracy`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument(
        "--policies",
        default="inductor,uniform2,transform2,transform1",
        help="the first is what the others are held against; auto@12 is auto at 1/12 of the bytes",
    )
    parser.add_argument("--data", type=Path, help="JPEG folders, or a text file for the GPT")
    parser.add_argument(
        "--steps", type=int, default=600, help="AdamW steps, the exact ones counted"
    )
    parser.add_argument("--warm-steps", type=int, default=50, help="exact steps, then calibrate")
    parser.add_argument(
        "--weighting", choices=WEIGHTINGS, default=WEIGHTING, help="of parameters, to calibrate"
    )
    parser.add_argument(
        "--replan-every", type=int, metavar="STEPS", help="calibrate again, where a policy does"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of the rate after the exact steps; cosine falls to zero at the last step",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="loss against saved bytes, and the curves")
    harness.add_arguments(parser, seed=False)


def run(args: argparse.Namespace) -> int:
    """Train, print the table, and with --json one line of JSON."""
    names = harness.split_policies(args.policies)
    for name in names:
        harness.settings_of(name)
    if args.seeds < 1 or args.warm_steps < 1 or args.steps <= args.warm_steps:
        raise SettingsError(
            "--seeds and --warm-steps must be 1 or more, --steps above --warm-steps"
        )
    about = ("model", "batch", "size", "data", "steps", "warm_steps", "lr", "weighting")
    done = harness.results(args, *about, "replan_every", "schedule")
    runs = []
    with harness.bars() as bars:
        for seed in bars.track(range(args.seeds), description="seeds"):
            start = cache(partial(_warm_start, args, seed))  # only if a run is missing
            for name in names:
                kept = done.part(f"{name}, seed {seed}", _train, args, name, seed, start, bars)
                runs.append(Run(**{**kept, "losses": tuple(kept["losses"])}))
    rows = summary(runs, names)
    output.write_table(list(rows[0]), rows, f"{args.model}, {args.steps} steps, {args.seeds} seeds")
    print(harness.describe(harness.machine()))
    if args.plot:
        from fxcompress.tools.plots import accuracy

        accuracy(runs, names, args.plot, args.model)
    if args.json:
        print(json.dumps({"policies": rows, **done.about}))
    return 0


def summary(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a policy: means over seeds with standard errors, and against the first policy."""
    base = {r.seed: r for r in runs if r.policy == names[0]}
    rows = []
    for name in names:
        own = [r for r in runs if r.policy == name]
        gaps = [r.validation_loss - base[r.seed].validation_loss for r in own if r.seed in base]
        accuracies = [r.accuracy for r in own if r.accuracy is not None]
        peaks = [r.peak_mb for r in own if r.peak_mb is not None]
        rows.append(
            {
                "policy": name,
                "saved MB": mean(r.saved_mb for r in own),
                "peak MB": mean(peaks) if peaks else None,
                "ratio": mean(r.plain_saved_mb for r in own) / mean(r.saved_mb for r in own),
                "validation loss": mean(r.validation_loss for r in own),
                "± se": standard_error([r.validation_loss for r in own]),
                "gap": mean(gaps) if gaps else None,
                "gap se": standard_error(gaps),
                "accuracy": mean(accuracies) if accuracies else None,
                "accuracy se": standard_error(accuracies),
                "training loss": mean(mean(r.losses[-50:]) for r in own),
                "step s": mean(r.seconds for r in own),
            }
        )
    return rows


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None where one value says nothing about it."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _begin(args: argparse.Namespace, seed: int) -> tuple[Task, torch.optim.Optimizer, Feed]:
    torch.manual_seed(seed)
    task = models.load(args.model, args.batch, args.size)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=args.lr)
    return task, optimizer, feed(task, args.data, args.batch, args.size, seed, "train")[0]


def _warm_start(args: argparse.Namespace, seed: int) -> Start:
    task, optimizer, source = _begin(args, seed)
    torch._dynamo.reset()
    compiled = torch.compile(task.model)
    for _ in range(args.warm_steps):
        _step(source(), compiled, optimizer)
    task.model.zero_grad(set_to_none=True)
    first, second = recorded(source, MIN_BYTES), recorded(source, MIN_BYTES)
    plain = sum(r.plain_saved_bytes for r in first)
    state = copy.deepcopy((task.model.state_dict(), optimizer.state_dict()))
    return Start(*state, evidence_of(first, second, weighting=args.weighting), plain)


def _train(
    args: argparse.Namespace, name: str, seed: int, begun: Callable[[], Start], bars: Progress
) -> Run:
    """The steps after the warm-up. All policies of a seed see the same batches and dropout."""
    start = begun()
    task, optimizer, source = _begin(args, seed)
    task.model.load_state_dict(start.model)
    optimizer.load_state_dict(copy.deepcopy(start.optimizer))
    for _ in range(args.warm_steps + 2):  # what the warm-up and the calibration saw
        source()
    settings = harness.settings_of(name)
    if policy(settings["policy"]).calibrated or policy(settings["policy"]).solves:
        settings["calibration"] = start.calibration
        settings["replan_every"] = args.replan_every
    torch._dynamo.reset()
    compiled = torch.compile(
        task.model, backend=fxcompress.backend(min_bytes=MIN_BYTES, **settings)
    )
    torch.manual_seed(seed)
    fxcompress.manual_seed(seed)
    losses, times = [], []
    steps = range(args.warm_steps, args.steps)
    for step in bars.track(steps, description=f"{name}, seed {seed}"):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * _share_of_rate(args, step)
        before = time.perf_counter()
        losses.append(_step(source(), compiled, optimizer))
        times.append(time.perf_counter() - before)
    loss, accuracy = _validate(args, task)
    task.model.train()
    last = source()
    step_memory = memory.measure_step(
        lambda: last.forward(compiled).backward(), task.model.parameters()
    )
    saved = start.plain_saved_bytes
    if policy(settings["policy"]).enabled:
        plan = fxcompress.explain(compiled)
        if not any(t.representation != KEEP for t in plan.tensors):
            raise FxCompressError(f"{name} compressed nothing: {plan.note or 'all tensors kept'}")
        saved = plan.saved_bytes
    megabytes = (saved / 1e6, start.plain_saved_bytes / 1e6)
    peak = step_memory.peak_bytes / 1e6
    return Run(name, seed, tuple(losses), loss, accuracy, *megabytes, median(times), peak)


def _share_of_rate(args: argparse.Namespace, step: int) -> float:
    """Of --lr, at a step after the exact ones."""
    if args.schedule == "constant":
        return 1.0
    done = (step - args.warm_steps) / (args.steps - args.warm_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _step(task: Task, compiled: Any, optimizer: torch.optim.Optimizer) -> float:
    loss = task.forward(compiled)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _validate(args: argparse.Namespace, task: Task) -> tuple[float, float | None]:
    """Loss and, for classifiers, accuracy on held-out batches, the same for all runs."""
    source, _ = feed(task, args.data, args.batch, args.size, 12345, "validation")
    task.model.eval()
    losses, right = [], []
    for _ in range(BATCHES):
        batch = source()
        found = task.model(*batch.inputs)
        losses.append(float(batch.loss(found)))
        if batch.labels is not None:
            right.append(float((found.argmax(1) == batch.labels).float().mean()))
    return mean(losses), mean(right) if right else None
