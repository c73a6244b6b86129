"""Batches of real data for the models of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import FxCompressError
from fxcompress.record import Recorder, Recording, record
from fxcompress.tools import data
from fxcompress.tools.models import Task

Feed = Callable[[], Task]  # the task with the next batch


def feed(
    task: Task, path: Path | None, batch: int, size: int, seed: int, part: str = "all"
) -> tuple[Feed, str]:
    """(a function that gives the task with another batch each time, name of the data).

    Image classifiers get JPEG folders where a path is given and the digits of scikit-learn where
    none is; language models get characters of a text file, or of this package's own sources. Other
    models keep the one batch they came with.

    Args:
        part: "all" of the data, or what is trained on ("train") and held out ("validation"): every
            tenth image, or the last tenth of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = task.name.partition(":")[0]
    if kind in {"torchvision", "cifar"} or "pixel_values" in task.keywords:
        count = 10_000 if kind == "cifar" else 4000
        images = _part_of_images(_images(path, size, count), part)

        def next_images() -> Task:
            pixels, labels = images.batch(batch, generator)
            if task.keywords:
                return replace(task, keywords={"pixel_values": pixels, "labels": labels})
            loss = partial(F.cross_entropy, target=labels)
            return replace(task, inputs=(pixels,), loss=loss, labels=labels)

        return next_images, images.name
    if kind == "gpt" or "input_ids" in task.keywords:
        model: Any = task.model
        vocabulary = model.config.vocab_size if task.keywords else model.embedding.num_embeddings
        text, name = _characters(path, vocabulary)
        end = len(text) * 9 // 10
        text = {"all": text, "train": text[:end], "validation": text[end:]}[part]

        def next_text() -> Task:
            starts = torch.randint(len(text) - size - 1, (batch,), generator=generator)
            rows = torch.stack([text[s : s + size + 1] for s in starts.tolist()])
            if task.keywords:
                tokens = rows[:, :-1].contiguous()  # the model shifts its labels itself
                return replace(task, keywords={"input_ids": tokens, "labels": tokens})
            return replace(task, inputs=(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))

        return next_text, name
    return lambda: task, "one fixed batch"


def recorded(source: Feed, min_bytes: int) -> tuple[Recording, ...]:
    """The graphs of one step on the next batch, with the real values in them."""
    task = source()

    def step(recorder: Recorder) -> None:
        torch._dynamo.reset()
        task.forward(torch.compile(task.model, backend=recorder)).backward()
        task.model.zero_grad(set_to_none=True)

    return record(step, min_bytes)


_images = cache(data.load)  # of the same folder for each run of a benchmark


def _part_of_images(images: data.Images, part: str) -> data.Images:
    if part == "all":
        return images
    held_out = torch.arange(len(images.labels)) % 10 == 9
    chosen = held_out if part == "validation" else ~held_out
    return replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])


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


def train(
    next_task: Feed, steps: int, learning_rate: float = 1e-3, bars: Progress | None = None
) -> float:
    """Some plain AdamW steps, a fresh batch each; the mean loss of the last tenth."""
    task = next_task()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=learning_rate)
    losses = []
    for _ in bars.track(range(steps), description="training") if bars else range(steps):
        loss = next_task().forward()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad(set_to_none=True)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")
