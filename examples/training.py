"""What the examples share: options, the one line that compresses, and a training loop with mixed
precision, accumulation, clipping, checkpoints that resume, a progress bar and a CSV log.

An example gives a model, `batches(step)`: an endless iterator of batches from that step on, and
`loss_of(model, batch)`. Batch `i` depends on the seed and `i` only, so a resumed run sees what an
unbroken one would have seen.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor, nn

import fxcompress
from fxcompress import rng

DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options of every example; `defaults` in place of ours."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--data", type=Path, help="see the top of the file")
    made.add_argument("--policy", default="auto", help="see fxcompress.policies()")
    made.add_argument("--budget-mb", type=float, help="bound on the peak of activations, MB")
    made.add_argument("--amp", choices=DTYPES, default="none", help="autocast to this type")
    made.add_argument("--steps", type=int, default=300, help="optimizer steps in all")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--accumulate", type=int, default=1, help="batches an optimizer step")
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--checkpoint", type=Path, help="written now and then; resumed if it exists")
    made.add_argument("--save-every", type=int, default=100, help="steps a checkpoint")
    made.add_argument("--csv", type=Path, help="log of every step")
    made.add_argument("--inner", default="inductor", help="aot_eager: no code generation")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.set_defaults(**defaults)
    return made


def seeded(seed: int, sample: Callable[[torch.Generator], Any]) -> Callable[[int], Iterator[Any]]:
    """`batches` made by drawing each batch with a generator of its own."""

    def batches(start: int) -> Iterator[Any]:
        for index in count(start):
            yield sample(torch.Generator().manual_seed(seed * 1_000_003 + index))

    return batches


def train(
    model: nn.Module,
    batches: Callable[[int], Iterator[Any]],
    loss_of: Callable[[nn.Module, Any], Tensor],
    args: argparse.Namespace,
) -> list[float]:
    """Train the parameters of `model` that require a gradient; losses of the steps done now."""
    model.to(args.device).train()
    backend = fxcompress.backend(args.budget_mb, policy=args.policy, inner=args.inner)
    model.compile(backend=backend)  # the one line that is ours
    fxcompress.manual_seed(args.seed)  # the noise, from its beginning; on resuming, see below

    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, args.lr)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    first = _resume(args.checkpoint, model, optimizer, scaler)
    source = batches(first * args.accumulate)
    losses: list[float] = []
    columns = [*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4f}")]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=args.steps, completed=first, loss=math.nan)
        for step in range(first, args.steps):
            began, total = time.perf_counter(), 0.0
            for _ in range(args.accumulate):
                batch = _moved(next(source), args.device)
                with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "none"):
                    loss = loss_of(model, batch) / args.accumulate
                scaler.scale(loss).backward()
                total += loss.item()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(learnt, args.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            _log(args.csv, step + 1, total, time.perf_counter() - began)
            progress.update(bar, advance=1, loss=total)
            if args.checkpoint and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
                _save(args.checkpoint, step + 1, model, optimizer, scaler)
    if losses and backend.plans:
        plan = backend.plan()
        before, after = plan.saved_bytes_before / 1e6, plan.saved_bytes / 1e6
        print(f"saved for the backward: {before:.1f} MB, with {args.policy} {after:.1f} MB")
    if losses:
        print(f"loss {losses[0]:.4f} at step {first + 1}, {losses[-1]:.4f} at step {args.steps}")
    return losses


def _moved(batch: Any, device: str) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), batch)


def _save(path: Path, step: int, model: nn.Module, optimizer: Any, scaler: Any) -> None:
    """Whole or not at all: a run may be killed while it writes."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": torch.get_rng_state(),  # dropout
        "noise": rng.get_state(),  # compression
    }
    fresh = path.with_suffix(".part")
    torch.save(state, fresh)
    fresh.replace(path)


def _resume(path: Path | None, model: nn.Module, optimizer: Any, scaler: Any) -> int:
    """The step to go on from."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"])
    rng.set_state(state["noise"])
    return int(state["step"])


def _log(path: Path | None, step: int, loss: float, seconds: float) -> None:
    if path is None:
        return
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        rows = csv.writer(file)
        if is_new:
            rows.writerow(["step", "loss", "seconds"])
        rows.writerow([step, f"{loss:.6f}", f"{seconds:.3f}"])


@torch.no_grad()
def accuracy(
    model: nn.Module, batches: Iterator[Any], args: argparse.Namespace, count: int = 20
) -> float:
    """Of a classifier of `(inputs, labels)`, over some batches."""
    model.eval()
    right = []
    for _ in range(count):
        inputs, labels = _moved(next(batches), args.device)
        right.append((model(inputs).argmax(-1) == labels).float().mean().item())
    return sum(right) / count
