"""`fxcompress bench step`: memory, time and gradient error of one training step, by policy."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import fxcompress
from fxcompress import costs, torch_private
from fxcompress.errors import SettingsError
from fxcompress.kernels import cpu
from fxcompress.tools import harness, memory, models
from fxcompress.tools.memory import SavedMemory
from fxcompress.tools.models import Task
from fxcompress.tools.working_set import working_set

MB = 1e6
BASELINE = "inductor"
WARM = 3  # warm compiles of each policy
_RECOMPUTE = "inductor@"  # and a share: PyTorch recomputes the rest


@dataclass(frozen=True)
class Row:
    """What one policy costs. MB are 1e6 bytes, times are seconds of forward and backward.

    `saved_copies_mb`, beside `saved_mb`, are re-laid-out copies of weights and inputs that Inductor
    saves: no activations, but memory (see `memory.measure_saved`). `cold_s` and `warm_s` are those
    of the first step, compile included: with empty caches, and again, the median of three, with
    what they hold after two steps.
    """

    saved_mb: float
    saved_copies_mb: float
    peak_mb: float
    planned_peak_mb: float | None
    step_s: float
    step_min_s: float
    step_max_s: float
    step_ratio: float
    cold_s: float
    warm_s: float
    cold_ratio: float
    warm_ratio: float
    grad_error: float


@dataclass
class Runner:
    """One policy's own copy of the model, compiled."""

    policy: str
    task: Task
    compiled: Callable[..., Any]
    cold_s: float = 0.0
    warm_s: float = 0.0
    planned_peak_bytes: int | None = None

    def step(self) -> None:
        """Forward and backward with fresh gradients."""
        self.task.model.zero_grad(set_to_none=True)
        self.task.forward(self.compiled).backward()

    def seconds(self) -> float:
        """Wall time of one step; its gradients are gone afterwards."""
        taken = harness.seconds(self.step)
        self.task.model.zero_grad(set_to_none=True)
        return taken

    def gradient(self, seed: int) -> Tensor:
        """The whole parameter gradient of one step from a given random state, as one vector."""
        torch.manual_seed(seed)
        fxcompress.manual_seed(seed)
        self.step()
        gradients = [p.grad.flatten() for p in self.task.model.parameters() if p.grad is not None]
        self.task.model.zero_grad(set_to_none=True)
        return torch.cat(gradients)

    def saved(self) -> SavedMemory:
        """What the graph holds between forward and backward."""
        return memory.measure_saved(self.task.forward(self.compiled), self.task.held())

    def peak_bytes(self) -> int:
        """Peak of activation memory over a step."""
        measured = memory.measure_step(self.step, self.task.model.parameters())
        self.task.model.zero_grad(set_to_none=True)
        peak: int = measured.peak_bytes
        return peak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench step`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument(
        "--policies",
        default="inductor,lossless,uniform4,auto",
        help="also auto@100MB and auto@12 (1/12 of the saved bytes), and inductor@0.5: PyTorch's "
        "own recomputation with half of the activations kept",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each policy")
    parser.add_argument("--budget-mb", type=float, help="peak of activations for policy auto, MB")
    parser.add_argument("--ratio-saved", type=float, help="for auto: 1/R of the saved bytes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--grad-seeds", type=int, default=3, help="seeds the error is averaged over"
    )
    parser.add_argument("--warm-steps", type=int, default=0, help="eager SGD steps beforehand")
    harness.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and with --json one line of JSON."""
    policies = _policies(args.policies)
    if args.steps < 1 or args.grad_seeds < 1:
        raise SettingsError("--steps and --grad-seeds must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    seeds = [args.seed + 1 + index for index in range(args.grad_seeds)]
    done = harness.results(
        args,
        *("model", "batch", "size", "budget_mb", "ratio_saved", "device", "seed", "warm_steps"),
        policies=policies,
        grad_seeds=seeds,
        gpu=harness.machine(args.device)["gpu"],
    )
    with harness.bars() as bars:
        # Only if something is missing: a finished benchmark is printed again at once.
        compiled = cache(partial(_compile, policies, args, bars))
        exact = cache(lambda seed: compiled()[BASELINE].gradient(seed))
        facts = {
            name: done.part(name, _facts, name, compiled, exact, seeds)
            for name in bars.track(policies, description="memory and gradients")
        }
        task = cache(lambda: compiled()[BASELINE].task)
        largest = done.part("working set", lambda: {"bytes": working_set(task())})["bytes"]
        timed = {name: partial(_seconds, name, compiled) for name in policies}
        seconds = harness.interleaved(timed, args.steps, done=done, bars=bars)

    baseline = harness.spread(seconds[BASELINE]).median
    rows = {}
    for name, taken in seconds.items():
        step = harness.spread(taken)
        rows[name] = Row(
            **facts[name],
            step_s=step.median,
            step_min_s=step.low,
            step_max_s=step.high,
            step_ratio=step.median / baseline,
            cold_ratio=facts[name]["cold_s"] / facts[BASELINE]["cold_s"],
            warm_ratio=facts[name]["warm_s"] / facts[BASELINE]["warm_s"],
        )
    about = {
        "model": args.model,
        "batch": args.batch,
        "size": args.size,
        "steps": args.steps,
        "seed": args.seed,
        "grad_seeds": seeds,
        "warm_steps": args.warm_steps,
        "budget_mb": args.budget_mb,
        "ratio_saved": args.ratio_saved,
        "working_set_mb": None if largest is None else largest / MB,
        "machine": harness.machine(args.device),
    }
    _print(rows, about)
    if args.json:
        print(json.dumps({"policies": {name: asdict(row) for name, row in rows.items()}, **about}))
    return 0


def _policies(text: str) -> list[str]:
    """The policies asked for, each once, the baseline first."""
    asked = harness.split_policies(text)
    for name in asked:
        if name.startswith(_RECOMPUTE):
            _share(name)
        else:
            harness.settings_of(name)
    return list(dict.fromkeys([BASELINE, *asked]))


def _compile(policies: list[str], args: argparse.Namespace, bars: Progress) -> dict[str, Runner]:
    """A compiled copy for each policy, and the seconds of first steps."""
    torch.manual_seed(args.seed)
    task = models.load(args.model, args.batch, args.size, args.device)
    models.warm(task, args.warm_steps)
    torch._dynamo.reset()
    # Every policy compiles the same code object once: more than the default number of versions.
    torch._dynamo.config.recompile_limit = 8 * len(policies) + 8
    _import_inductor(args.device)
    runners = {}
    for policy in bars.track(policies, description="compiling"):
        runner = _runner(policy, task, args)
        with torch_private.fresh_compile_caches():
            runner.cold_s = runner.seconds()
            # The second settles what is allocated once, and some models are compiled again for it.
            runner.step()
            runner.warm_s = median(_warm_seconds(policy, task, args) for _ in range(WARM))
            if not policy.startswith(BASELINE):  # now: it is filed beside the compiled graphs
                plan = fxcompress.explain(runner.compiled)
                runner.planned_peak_bytes = plan.planned_peak_bytes
        runners[policy] = runner
    return runners


def _warm_seconds(policy: str, task: Task, args: argparse.Namespace) -> float:
    """Of the first step of another copy. What earlier compiles left is collected before: that takes
    half as long as such a compile, and one compile in two or three would be billed for it."""
    runner = _runner(policy, task, args)
    gc.collect()
    return runner.seconds()


def _runner(policy: str, task: Task, args: argparse.Namespace) -> Runner:
    """A copy of the model in a function of its own: Dynamo would take the code that it compiled for
    one copy for another one too, and there would be no second compile to time."""
    copy = task.copy()
    model = copy.model

    def forward(*inputs: Any, **keywords: Any) -> Any:
        return model(*inputs, **keywords)

    forward.__code__ = forward.__code__.replace()  # an equal one, but another object
    return Runner(policy, copy, torch.compile(forward, backend=_backend(policy, args)))


def _backend(policy: str, args: argparse.Namespace) -> Any:
    if policy == BASELINE:
        # The real one, not ours doing nothing; another backend each time, as all others are.
        return torch_private.inductor_of_its_own()
    if policy.startswith(_RECOMPUTE):
        return torch_private.inductor_with_memory_budget(_share(policy))
    if policy == "auto":
        return fxcompress.backend(args.budget_mb, policy=policy, ratio_saved=args.ratio_saved)
    return fxcompress.backend(**harness.settings_of(policy))


def _share(name: str) -> float:
    """Of the activations that ``inductor@0.5`` keeps by PyTorch's own activation memory budget."""
    try:
        share = float(name.removeprefix(_RECOMPUTE))
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SettingsError(f"{name!r}: write a share from 0 to 1 after @, as inductor@0.5")
    return share


def _import_inductor(device: str) -> None:
    """Imports, compiler checks, and what is made once a machine (our CPU kernels, the table of
    codec times), so that the first policy is not billed for them."""
    for family in cpu.FAMILIES:
        cpu.available(family)
    costs.rates(device)
    with torch_private.fresh_compile_caches():
        x = torch.ones(64, requires_grad=True, device=device)
        torch.compile(lambda value: value.sin().sum(), backend="inductor")(x).backward()


def _facts(
    name: str,
    compiled: Callable[[], dict[str, Runner]],
    exact: Callable[[int], Tensor],
    seeds: Sequence[int],
) -> dict[str, float | None]:
    """What a row has besides times. The error is |g - g0| / |g0|, the mean over seeds; g0 is plain
    Inductor's in fp32, from the same random state.
    """
    runner = compiled()[name]
    saved, planned = runner.saved(), runner.planned_peak_bytes
    peak = runner.peak_bytes()
    errors = [float((runner.gradient(s) - exact(s)).norm() / exact(s).norm()) for s in seeds]
    return {
        "saved_mb": saved.activation_bytes / MB,
        "saved_copies_mb": saved.copy_bytes / MB,
        "peak_mb": peak / MB,
        "planned_peak_mb": None if planned is None else planned / MB,
        "cold_s": runner.cold_s,
        "warm_s": runner.warm_s,
        "grad_error": mean(errors),
    }


def _seconds(name: str, compiled: Callable[[], dict[str, Runner]]) -> float:
    return compiled()[name].seconds()


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "saved MB": lambda row: f"{row.saved_mb:.2f}",
    "copies MB": lambda row: f"{row.saved_copies_mb:.2f}",
    "peak MB": lambda row: f"{row.peak_mb:.2f}",
    "planned MB": lambda row: "-" if row.planned_peak_mb is None else f"{row.planned_peak_mb:.2f}",
    "step s": lambda row: f"{row.step_s:.4f}",
    "ratio": lambda row: f"{row.step_ratio:.3f}",
    "cold s": lambda row: f"{row.cold_s:.1f}",
    "×": lambda row: f"{row.cold_ratio:.2f}",
    "warm ×": lambda row: f"{row.warm_ratio:.2f}",
    "grad error": lambda row: f"{row.grad_error:.2e}",
}


def _print(rows: dict[str, Row], about: dict[str, Any]) -> None:
    table = Table(title=f"{about['model']}, batch {about['batch']}, size {about['size']}")
    table.add_column("policy")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(text(row) for text in _COLUMNS.values()))
    # Where the output is no terminal, rich takes 80 columns and would cut figures off.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(harness.describe(about["machine"]), highlight=False)
    seeds = ", ".join(str(seed) for seed in about["grad_seeds"])
    console.print(
        f"seed {about['seed']}; gradient seeds {seeds}; {about['steps']} timed steps each"
    )
    if about["working_set_mb"] is not None:
        console.print(f"the largest operator reads and writes {about['working_set_mb']:.1f} MB")
