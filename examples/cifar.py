"""Train a torchvision classifier on small images with several policies, and compare the curves.

    python examples/cifar.py --data cifar10_jpeg.tar.gz --policies inductor,uniform4 --seeds 2

Every policy starts from the same weights and sees the same batches for a given seed. What changes
from seed to seed with plain Inductor is the run-to-run noise to hold the gap of a policy against.
"""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
import torchvision
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress.tools import data

Curves = dict[tuple[str, int], list[float]]
"""Loss of every step, by (policy, seed)."""


def train(model: nn.Module, compiled: nn.Module, images: data.Images, seed: int,
          args: argparse.Namespace, progress: Progress, title: str) -> list[float]:  # fmt: skip
    """Losses of one run; weights and batches follow from `seed` alone."""
    torch.manual_seed(seed)
    fxcompress.manual_seed(seed)
    fresh = torchvision.models.get_model(args.model, num_classes=images.classes)
    model.load_state_dict(fresh.state_dict())
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in progress.track(range(args.steps), description=title):
        pixels, labels = images.batch(args.batch, order)
        flip = torch.rand(args.batch, generator=order) < 0.5
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        loss = F.cross_entropy(compiled(pixels.to(args.device)), labels.to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def smooth(losses: list[float], every: int) -> list[float]:
    """Mean of each stretch of `every` steps."""
    return [mean(losses[start : start + every]) for start in range(0, len(losses), every)]


def distance(a: list[float], b: list[float]) -> float:
    """Mean absolute difference of two smoothed curves."""
    return mean(abs(x - y) for x, y in zip(a, b, strict=True))


def report(curves: Curves, policies: list[str], seeds: list[int], every: int) -> None:
    """Curves side by side, then the gap of each policy beside the noise between seeds."""
    smoothed = {run: smooth(losses, every) for run, losses in curves.items()}
    table = Table("steps to", title=f"training loss, mean of {every} steps")
    for policy, seed in smoothed:
        table.add_column(f"{policy}\nseed {seed}", justify="right")
    steps = len(next(iter(curves.values())))
    for index, values in enumerate(zip(*smoothed.values(), strict=True)):
        last = min((index + 1) * every, steps)
        table.add_row(str(last), *(f"{value:.4f}" for value in values))
    console = Console()
    console.print(table)

    base = policies[0]
    final = {run: losses[-1] for run, losses in smoothed.items()}
    for policy in policies:
        values = " ".join(f"{final[policy, seed]:.4f}" for seed in seeds)
        console.print(f"final loss, {policy}: {values}", highlight=False)
    for policy in policies[1:]:
        gap = mean(distance(smoothed[base, seed], smoothed[policy, seed]) for seed in seeds)
        signed = mean(final[policy, seed] - final[base, seed] for seed in seeds)
        console.print(
            f"{policy} against {base}, same seed: mean gap {gap:.4f} (final {signed:+.4f})",
            highlight=False,
        )
    if len(seeds) > 1:
        pairs = list(combinations(seeds, 2))
        noise = mean(distance(smoothed[base, a], smoothed[base, b]) for a, b in pairs)
        ends = mean(abs(final[base, a] - final[base, b]) for a, b in pairs)
        console.print(
            f"{base} between seeds (run-to-run noise): mean gap {noise:.4f} (final {ends:.4f})",
            highlight=False,
        )


def write_csv(path: Path, curves: Curves) -> None:
    """One line a step and run: policy, seed, step, loss."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["policy", "seed", "step", "loss"])
        for (policy, seed), losses in curves.items():
            rows.writerows([policy, seed, step, loss] for step, loss in enumerate(losses, 1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with train/<class>/*.jpg, or a .tar.gz")
    parser.add_argument("--images", type=int, default=10_000, help="how many of them to use")
    parser.add_argument("--policies", "--policy", default="inductor,uniform4",
                        help="the first is what the others are held against")  # fmt: skip
    parser.add_argument("--budget-mb", type=float, help="peak of activations for policy auto, MB")
    parser.add_argument("--model", default="resnet18", help="a torchvision classifier")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="image side, pixels")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each policy")
    parser.add_argument("--every", type=int, default=25, help="steps a line of the curves")
    parser.add_argument("--csv", type=Path, help="write every loss here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.seeds, args.every) < 1:
        parser.error("--steps, --batch, --seeds and --every must be 1 or more")

    images = data.load(args.data, args.size, args.images)
    policies = list(dict.fromkeys(args.policies.split(",")))
    seeds = list(range(args.seeds))
    curves: Curves = {}
    with Progress(console=Console(stderr=True)) as progress:
        for policy in policies:
            # One compile a policy; each seed starts from weights of its own.
            model = torchvision.models.get_model(args.model, num_classes=images.classes)
            model.to(args.device)
            backend = fxcompress.backend(
                args.budget_mb if policy == "auto" else None, policy=policy
            )
            compiled = torch.compile(model, backend=backend)
            for seed in seeds:
                title = f"{policy} seed {seed}"
                curves[policy, seed] = train(model, compiled, images, seed, args, progress, title)
    report(curves, policies, seeds, args.every)
    if args.csv:
        write_csv(args.csv, curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
