"""Batches of real data for the models of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import FxCompressError
from fxcompress.tools import data
from fxcompress.tools.models import Task

Feed = Callable[[], Task]  # the task with the next batch


def feed(task: Task, path: Path | None, batch: int, size: int, seed: int) -> tuple[Feed, str]:
    """(a function that gives the task with another batch each time, name of the data).

    Image classifiers get JPEG folders where a path is given and the digits of scikit-learn where
    none is; the GPT gets characters of a text file, or of this package's own sources. Other models
    keep the one batch they came with.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = task.name.partition(":")[0]
    if kind == "torchvision":
        images = data.load(path, size, 4000)

        def next_images() -> Task:
            pixels, labels = images.batch(batch, generator)
            return replace(task, inputs=(pixels,), loss=lambda out: F.cross_entropy(out, labels))

        return next_images, images.name
    if kind == "gpt":
        embedding: Any = task.model.embedding
        text, name = _characters(path, embedding.num_embeddings)

        def next_text() -> Task:
            starts = torch.randint(len(text) - size - 1, (batch,), generator=generator)
            rows = torch.stack([text[s : s + size + 1] for s in starts.tolist()])
            return replace(task, inputs=(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))

        return next_text, name
    return lambda: task, "one fixed batch"


def _characters(path: Path | None, vocabulary: int) -> tuple[Tensor, str]:
    """A text as character numbers, the rarest characters folded into the vocabulary."""
    if path is None:
        sources = sorted(Path(__file__).resolve().parent.glob("*.py"))
        text, name = "".join(s.read_text(encoding="utf-8") for s in sources), "own sources"
    else:
        try:
            text, name = path.read_text(encoding="utf-8"), path.name
        except (OSError, UnicodeDecodeError) as error:
            raise FxCompressError(
                f"cannot read {path} as text ({error}); give a text file"
            ) from None
    numbers = {c: i % vocabulary for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[c] for c in text]), name


def train(next_task: Feed, steps: int, learning_rate: float = 1e-3) -> float:
    """Some plain AdamW steps, a fresh batch each; the mean loss of the last tenth."""
    task = next_task()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = next_task().forward()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad(set_to_none=True)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")
