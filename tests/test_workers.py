"""Training beside other threads, and beside the processes that load its data."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from train_small import Net, backend, batch, error, gradients, loss, no_leftovers

import fxcompress
from fxcompress import rng


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with no_leftovers():
        yield


def test_models_in_threads() -> None:
    """Each compiles and trains a model of its own; every step has a noise of its own."""
    steps, count = 5, 3
    models = [Net() for _ in range(count)]
    exact = [gradients(m, m, batch(seed=i)) for i, m in enumerate(models)]
    before = rng.get_state()["counters"].get("cpu", 0)

    def train(i: int) -> list[float]:
        compiled = torch.compile(models[i], backend=backend())
        return [
            error(gradients(models[i], compiled, batch(seed=i)), exact[i]) for _ in range(steps)
        ]

    with ThreadPoolExecutor(count) as pool:
        errors = [e for found in pool.map(train, range(count)) for e in found]
    assert all(0 < e < 0.02 for e in errors)
    assert len(set(errors)) == steps * count
    assert rng.get_state()["counters"]["cpu"] == before + steps * count


class Rows(Dataset[Tensor]):
    """Data that carry a backend along, as a dataset that refers to its trainer does."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        assert self.made.settings.policy == "uniform4"
        return batch(1, seed=index)[0]


@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loaders(way: str) -> None:
    """Workers that start in mid-training change neither data, noise nor gradients."""

    def train(**workers: Any) -> list[Tensor]:
        torch._dynamo.reset()
        fxcompress.manual_seed(3)
        model, made = Net(), backend("uniform4")
        compiled = torch.compile(model, backend=made)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss(compiled(batch(6))).backward()  # compiled before any worker is there
        for rows in DataLoader(Rows(made), batch_size=6, **workers):
            optimizer.zero_grad()
            loss(compiled(rows)).backward()
            optimizer.step()
        assert made.plan().tensors
        return [p.detach() for p in model.parameters()]

    found = train(num_workers=2, multiprocessing_context=way)
    for mine, expected in zip(found, train(), strict=True):
        torch.testing.assert_close(mine, expected)
