"""`fxcompress bench soak`: thousands of steps, after which all is as it was in the first hundreds.

A small model is trained under a budget. At even distances along the way: memory of the process,
live tensors and Python objects, time of a step on the processor's own clock, and the step's peak of
activation memory beside the budget. The first tenth of the steps is left out of comparisons: caches
of PyTorch and of the allocator fill up there.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fxcompress
from fxcompress.errors import FxCompressError
from fxcompress.tools import models, output
from fxcompress.tools.harness import machine
from fxcompress.tools.memory import measure_step
from fxcompress.tools.models import Task

MB = 1e6
WARM = 0.1  # of the steps
# What counts as growth, between the medians of the first and the last third of the samples.
MEMORY_GROWTH = 0.01
TIME_GROWTH = 0.1
EXAMPLES = """\
examples:
  fxcompress bench soak
  fxcompress bench soak cifar:resnet20 --batch 8 --size 32 --steps 5000 --ratio 2 --json
"""


@dataclass(frozen=True)
class Sample:
    """The process after so many steps. MB are 1e6 bytes.

    Attributes:
        step: how many were done.
        rss_mb: resident memory of the process.
        tensors, objects: alive, as Python sees them.
        step_ms: median time of the steps since the last sample, by the processor's clock.
        peak_mb: activation memory of one step.
        loss: of the last step.
    """

    step: int
    rss_mb: float
    tensors: int
    objects: int
    step_ms: float
    peak_mb: float
    loss: float


@dataclass(frozen=True)
class Verdict:
    """What changed from the first to the last third of the samples, and whether that is growth."""

    rss_growth: float
    tensor_growth: int
    object_growth: float
    time_growth: float
    highest_peak_mb: float
    budget_mb: float

    @property
    def failures(self) -> list[str]:
        """What went wrong, in words; empty if nothing did."""
        checks = {
            "resident memory grew": self.rss_growth > MEMORY_GROWTH,
            "tensors piled up": self.tensor_growth > 0,
            "Python objects piled up": self.object_growth > MEMORY_GROWTH,
            "steps became slower": self.time_growth > TIME_GROWTH,
            "the budget was exceeded": self.highest_peak_mb > self.budget_mb,
        }
        return [text for text, failed in checks.items() if failed]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench soak`."""
    parser.add_argument("model", nargs="?", default="gpt:tiny", help=models.SPECS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="image side, or sequence length")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=50, help="how often to look")
    parser.add_argument(
        "--ratio", type=float, default=1.5, help="plain Inductor's modelled peak over the budget"
    )
    parser.add_argument("--inner", default="inductor", help="inductor or aot_eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the samples or, with --json, one JSON object; 1 if something grew."""
    if args.samples < 6 or args.steps < 10 * args.samples:
        raise FxCompressError("--samples 6 or more, and 10 steps or more for each")
    torch.manual_seed(args.seed)
    task = models.load(args.model, args.batch, args.size)
    budget, plan, samples = soak(task, args.steps, args.samples, args.ratio, args.inner)
    verdict = judge(samples, budget, args.steps)
    about = {
        "model": args.model,
        "batch": args.batch,
        "size": args.size,
        "inner": args.inner,
        "steps": args.steps,
        "saved_mb": plan.saved_bytes / MB,
        "plain_saved_mb": plan.saved_bytes_before / MB,
        "machine": machine(),
    }
    rows = [asdict(s) for s in samples]
    if args.json:
        result = {**asdict(verdict), "failures": verdict.failures}
        output.write_json({**about, "verdict": result, "samples": rows}, sys.stdout)
    else:
        caption = ", ".join(verdict.failures) or "nothing grew"
        title = f"{args.model}: {args.steps} steps within {budget:.2f} MB"
        output.write_table(list(rows[0]), rows, title, caption)
    return int(bool(verdict.failures))


def soak(
    task: Task, steps: int, count: int, ratio: float, inner: str
) -> tuple[float, fxcompress.Plan, list[Sample]]:
    """(budget in MB, the plan under it, ``count`` samples along ``steps`` steps).

    Raises:
        FxCompressError: no budget of that ratio is feasible.
    """
    budget = _plain_peak(task.copy(), inner) / ratio / MB
    backend = fxcompress.backend(budget, inner=inner)
    compiled = torch.compile(task.model, backend=backend)
    parameters = list(task.model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    samples, times, every = [], [], steps // count

    def once() -> Tensor:
        loss = task.forward(compiled)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    for step in range(1, steps + 1):
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = once()
        optimizer.step()
        times.append(time.process_time() - start)
        if step % every == 0:
            samples.append(_sample(step, times, once, parameters, float(loss)))
            times.clear()
    return budget, backend.plan(), samples


def judge(samples: Sequence[Sample], budget_mb: float, steps: int) -> Verdict:
    """Compare the samples' ends."""
    settled = [s for s in samples if s.step > WARM * steps]
    third = max(len(settled) // 3, 1)
    first, last = settled[:third], settled[-third:]

    def growth(of: Any) -> float:
        return median(map(of, last)) / median(map(of, first)) - 1

    return Verdict(
        growth(lambda s: s.rss_mb),
        max(s.tensors for s in last) - max(s.tensors for s in first),
        growth(lambda s: s.objects),
        growth(lambda s: s.step_ms),
        max(s.peak_mb for s in samples),
        budget_mb,
    )


def _plain_peak(task: Task, inner: str) -> int:
    """As the planner models it, so that the budget is the same from run to run."""
    backend = fxcompress.backend(policy="lossless", inner=inner)
    task.forward(torch.compile(task.model, backend=backend)).backward()  # type: ignore[no-untyped-call]
    peak = backend.plan().plain_peak_bytes
    torch._dynamo.reset()
    return peak


def _sample(
    step: int, times: Sequence[float], once: Any, parameters: Sequence[Tensor], loss: float
) -> Sample:
    peak = measure_step(once, parameters).peak_bytes
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), Tensor) for o in objects)
    return Sample(
        step, _resident() / MB, tensors, len(objects), median(times) * 1e3, peak / MB, loss
    )


def _resident() -> int:
    """Bytes of this process in memory.

    Raises:
        FxCompressError: only Linux tells so.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError as error:
        raise FxCompressError("bench soak reads /proc/self/statm: run it on Linux") from error
    import resource

    return pages * resource.getpagesize()
