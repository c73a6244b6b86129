"""`fxcompress demo`: a small ResNet on real images, plain Inductor beside fxcompress."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.errors import SettingsError
from fxcompress.tools import data, memory
from fxcompress.tools.harness import describe, machine

MB = 1e6
BUDGET_SHARE = 0.7
"""Default budget: this share of the peak measured with plain Inductor."""


@dataclass
class Run:
    """One model in training, and what was seen of it."""

    name: str
    model: nn.Module
    backend: Any
    saved_bytes: int = 0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.compiled(images), labels)

    def measure(self, images: Tensor, labels: Tensor) -> None:
        """Compile, then measure saved and peak bytes. Trains nothing."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.loss(images, labels).backward()
        held = [*self.model.parameters(), *self.model.buffers(), images]
        self.saved_bytes = memory.saved_bytes(self.loss(images, labels), held)
        self.peak_bytes = memory.measure_step(
            lambda: self.loss(images, labels).backward(), self.model.parameters()
        ).peak_bytes
        self.model.load_state_dict(before)  # batch norm's running statistics moved

    def train(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step, timed."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress demo`."""
    parser.add_argument("--data", type=Path, help="CIFAR-10 as JPEG folders, or their .tar.gz")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="image side, pixels")
    parser.add_argument("--policy", default="auto")
    parser.add_argument(
        "--budget-mb",
        type=float,
        help="peak of activation memory, MB (auto: "
        f"{100 * BUDGET_SHARE:g} percent of plain Inductor's)",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Train both on the same batches and print what each took."""
    if args.steps < 1 or args.batch < 2 or args.size < 1:
        raise SettingsError("--steps and --size must be 1 or more, --batch 2 or more")
    fxcompress.backend(args.budget_mb, policy=args.policy)  # a wrong setting fails here, at once
    images = data.load(args.data, args.size)
    generator = torch.Generator().manual_seed(args.seed)
    batch = images.batch(args.batch, generator)

    console = Console()
    console.print(f"{images.name}: {len(images.labels)} images, {describe(machine())}")
    notes = Console(stderr=True)
    with notes.status("compiling with plain Inductor"):
        plain = Run("inductor", resnet(images.classes, args.seed), "inductor")
        plain.measure(*batch)
    budget_mb = args.budget_mb
    if budget_mb is None and args.policy == "auto":
        budget_mb = round(BUDGET_SHARE * plain.peak_bytes / MB, 1)
    with notes.status("compiling with fxcompress"):
        backend = fxcompress.backend(budget_mb, policy=args.policy)
        ours = Run(f"fxcompress {args.policy}", resnet(images.classes, args.seed), backend)
        ours.measure(*batch)

    columns = [*Progress.get_default_columns(), TextColumn("{task.fields[losses]}")]
    with Progress(*columns, console=notes) as progress:
        bar = progress.add_task("training both", total=args.steps, losses="")
        for _ in range(args.steps):
            batch = images.batch(args.batch, generator)
            plain.train(*batch)
            ours.train(*batch)
            losses = f"loss {plain.losses[-1]:.3f} plain, {ours.losses[-1]:.3f} compressed"
            progress.update(bar, advance=1, losses=losses)

    budget = "no budget" if budget_mb is None else f"budget {budget_mb} MB"
    console.print(_table([plain, ours], f"{args.steps} steps, batch {args.batch}, {budget}"))
    return 0


def resnet(classes: int, seed: int) -> nn.Module:
    """A ResNet of four basic blocks (10 layers), weights drawn from `seed`."""
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(seed)
    model: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    return model


def _table(runs: list[Run], title: str) -> Table:
    table = Table("", title=title)
    for one in runs:
        table.add_column(one.name, justify="right")
    first = runs[0]
    last = max(1, len(first.losses) // 5)

    def row(name: str, values: list[float], form: str, compare: bool = True) -> None:
        ratios = [f" ({value / values[0]:.2f}x)" if compare else "" for value in values]
        ratios[0] = ""
        cells = (f"{v:{form}}{r}" for v, r in zip(values, ratios, strict=True))
        table.add_row(name, *cells)

    row("saved MB", [one.saved_bytes / MB for one in runs], ".2f")
    row("measured peak MB", [one.peak_bytes / MB for one in runs], ".2f")
    row("step seconds (median)", [median(one.seconds) for one in runs], ".3f")
    row("first loss", [one.losses[0] for one in runs], ".4f", compare=False)
    row(f"loss, mean of last {last}", [mean(o.losses[-last:]) for o in runs], ".4f", compare=False)
    return table
