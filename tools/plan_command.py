"""`fxcompress plan`: what would become of a model's saved tensors, without generating code."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fxcompress import report, torch_private
from fxcompress.backend import Backend
from fxcompress.calibrate import evidence_of
from fxcompress.errors import FxCompressError
from fxcompress.evaluate import evaluate
from fxcompress.evidence import Calibration
from fxcompress.ledger import Ledger
from fxcompress.pipeline import Partitioner
from fxcompress.plan import Plan, merge
from fxcompress.policies import policy
from fxcompress.record import Recorder, Recording, record
from fxcompress.settings import Settings
from fxcompress.settings import make as settings_of
from fxcompress.tools import models
from fxcompress.tools.memory import mark, measure_saved, measure_step
from fxcompress.tools.models import Task
from fxcompress.tools.output import console, show

EXAMPLES = """\
examples:
  fxcompress plan gpt:small --batch 16 --size 256 --budget-mb 100
  fxcompress plan torchvision:resnet18 --ratio-saved 8 -o plan.json
  fxcompress plan train.py:make --policy lossless
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress plan`."""
    parser.add_argument("model", help=models.SPECS)
    add_model_options(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="save the plan as JSON")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """A plan to look at: a saved one, or a model to plan for."""
    parser.add_argument(
        "source",
        metavar="PLAN.json|MODEL",
        help="what `fxcompress plan -o` or Plan.save wrote, or a model:\n" + models.SPECS,
    )
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is planned for."""
    group = parser.add_argument_group("planning a MODEL")
    group.add_argument("--batch", type=int, default=16)
    group.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    group.add_argument("--budget-mb", type=float, help="peak of activations, MB")
    group.add_argument("--ratio", type=float, metavar="R", help="1/R of plain Inductor's peak")
    group.add_argument("--ratio-saved", type=float, metavar="R", help="1/R of its saved bytes")
    group.add_argument(
        "--max-grad-error", type=float, metavar="E", help="lowest peak at this relative error"
    )
    group.add_argument(
        "--max-loss-increase",
        type=float,
        metavar="X",
        help="lowest peak at this share of the variance between batches (needs --calibration)",
    )
    group.add_argument("--policy", default=None, help="default: auto")
    group.add_argument("--calibration", type=Path, metavar="FILE", help="a saved calibration")
    group.add_argument("--seed", type=int, default=0, help="of the model's weights and batch")
    group.add_argument(
        "--measure",
        action="store_true",
        help="also compile it, run a step and measure its saved bytes and its peak; slower",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan, and save it with -o."""
    plan = _plan(args.model, args)
    show(plan.__rich__())
    if args.output is not None:
        save(args.output, plan.to_json())
    return 0


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that ``args.source`` names: a file, or one made for a model."""
    if args.source.endswith(".json"):
        return load(Path(args.source))
    return _plan(args.source, args)


def load(path: Path) -> Plan:
    """A saved plan.

    Raises:
        FxCompressError: no such file, or no plan.
    """
    try:
        return Plan.load(path)
    except OSError as error:
        raise FxCompressError(
            f"cannot read the plan {path} ({error.strerror}); make one with "
            f"fxcompress plan MODEL -o {path.name}"
        ) from None


def make(
    spec: str, batch: int, size: int, seed: int = 0, measured: bool = False, **settings: Any
) -> Plan:
    """The plan for one training step of a model, named as on the command line.

    The model is partitioned and planned as for Inductor, but no code is generated. Policies that
    allocate bits by measurements are calibrated on the batch first.

    Args:
        spec, batch, size: see :func:`fxcompress.tools.models.load`.
        seed: of the weights and the batch.
        measured: compile the model too, run a step, and put what it took into the plan.
        settings: of :func:`fxcompress.backend`.

    Raises:
        FxCompressError: a bad setting or model, or a budget out of reach.
    """
    settings_of(**settings)  # refuses bad settings before the model is made
    return plan_for(task_of(spec, batch, size, seed), measured, **settings)


def plan_for(task: Task, measured: bool = False, **settings: Any) -> Plan:
    """As :func:`make`, for a model that is there; it is left as it was unless ``measured``."""
    wanted = settings_of(**settings)
    if wanted.calibration is None and _is_calibrated(wanted):
        wanted = replace(wanted, calibration=_calibration(task, wanted))
    partitioner = Partitioner(wanted, Ledger())

    def compiler(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return torch_private.compile_interpreted(module, inputs, partitioner, _run)

    torch._dynamo.reset()
    try:
        task.forward(torch.compile(task.copy().model, backend=compiler))
    except Exception as error:
        inner = getattr(error, "inner_exception", None)  # of Dynamo's BackendCompilerFailed
        raise (inner if isinstance(inner, FxCompressError) else error) from None
    plan = merge(report.read(key) for key in partitioner.plans)
    return _measured(plan, task, wanted) if measured else plan


def task_of(spec: str, batch: int, size: int, seed: int = 0) -> Task:
    """The model with weights and a batch that follow from the seed."""
    torch.manual_seed(seed)
    return models.load(spec, batch, size)


def recorded(task: Task, min_bytes: int = Settings.min_bytes) -> tuple[Recording, ...]:
    """The graphs of one step of a copy of the model, with their values."""

    def step(recorder: Recorder) -> None:
        torch._dynamo.reset()
        model = task.copy().model
        with torch.random.fork_rng():
            task.forward(torch.compile(model, backend=recorder)).backward()

    return record(step, min_bytes)


def _is_calibrated(wanted: Settings) -> bool:
    """As the backend decides by itself on the first batch."""
    found = policy(wanted.policy)
    return found.calibrated or (found.solves and wanted.is_bounded)


def _calibration(task: Task, wanted: Settings) -> Calibration:
    return evidence_of(recorded(task, wanted.min_bytes), group=wanted.group)


def _run(graph: torch.fx.GraphModule, is_backward: bool) -> Callable[[Sequence[Any]], Any]:
    return lambda arguments: evaluate(graph, arguments)[0]


def _measured(plan: Plan, task: Task, wanted: Settings) -> Plan:
    """The plan with what one compiled step of it took."""
    torch._dynamo.reset()
    compiled = torch.compile(task.model, backend=Backend(wanted))

    def step() -> None:
        with mark(0):
            loss = task.forward(compiled)
        with mark(1):
            loss.backward()

    step()
    step()  # Inductor allocates more on a first call
    found = measure_step(step, task.model.parameters())
    saved = measure_saved(task.forward(compiled), task.held())
    forward = sum(moment.phase == "forward" for moment in plan.timeline)
    counts = (forward, len(plan.timeline) - forward)
    # A plan of several graphs has the timeline of one: nothing says where it lies in the step.
    curve = [found.sampled(part, counts[part]) for part in range(2)] if plan.graphs == 1 else []
    return replace(
        plan,
        measured_saved_bytes=saved.activation_bytes,
        measured_peak_bytes=found.peak_bytes,
        measured=tuple(chain.from_iterable(curve)),
    )


def save(path: Path, text: str) -> None:
    """Write a result where the user asked for it.

    Raises:
        FxCompressError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FxCompressError(f"cannot write {path}: {error.strerror}") from None
    console().print(f"wrote {path}", markup=False, style="dim")


def _plan(spec: str, args: argparse.Namespace) -> Plan:
    names = (
        "budget_mb",
        "ratio",
        "ratio_saved",
        "max_grad_error",
        "max_loss_increase",
        "policy",
        "calibration",
    )
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    with Console(stderr=True).status("planning"):
        return make(spec, args.batch, args.size, args.seed, args.measure, **given)
