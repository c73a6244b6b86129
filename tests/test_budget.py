"""Budgets hold: what the allocator shows is within them, from easy ones to those refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import torch_private
from fxcompress.tools.bench_budget import SHARES, Row, measure
from fxcompress.tools.memory import measure_step
from fxcompress.tools.models import Task


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Halves(nn.Module):
    """Two halves, a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.SiLU())))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x).square().mean()


def peak_of(x: Tensor) -> int:
    """Measured bytes of plain Inductor's step."""
    plain = Halves()
    compiled = torch.compile(plain, backend="inductor")
    compiled(x).backward()
    peak = measure_step(lambda: compiled(x).backward(), plain.parameters()).peak_bytes
    torch._dynamo.reset()
    return peak


def test_the_measured_peak_of_a_model_in_two_graphs() -> None:
    """What the first graph keeps saved is alive in the second: both share one budget."""
    x = torch.randn(4096, 64)
    model, budget = Halves(), 0.9 * peak_of(x) / 1e6
    backend = fxcompress.backend(budget)
    compiled = torch.compile(model, backend=backend)
    first = measure_step(lambda: compiled(x).backward(), model.parameters()).peak_bytes
    later = measure_step(lambda: compiled(x).backward(), model.parameters()).peak_bytes
    plan = backend.plan()
    assert plan.graphs == 2
    assert plan.planned_peak_bytes <= budget * 1e6
    assert later <= budget * 1e6
    assert first <= budget * 1e6, "the step that compiles, calibration included"
    assert later >= 0.8 * plan.planned_peak_bytes, "the plan is of another step"


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_early_graph_leaves_room_for_later_ones(times: int) -> None:
    """Each half alone could do with far less; from the second step on both are planned together.
    A later process begins with that."""
    x = torch.randn(16384, 64)
    budget = 0.65 * peak_of(x) / 1e6
    planned = []
    with torch_private.fresh_compile_caches():
        for is_later in (False, True)[:times]:
            torch._dynamo.reset()
            model, backend = Halves(), fxcompress.backend(budget)
            compiled = torch.compile(model, backend=backend)
            noise = []
            for _ in range(3):
                step = measure_step(lambda: compiled(x).backward(), model.parameters())  # noqa: B023
                assert step.peak_bytes <= budget * 1e6, "in a step that compiles, or later"
                plan = backend.plan()
                assert plan.graphs == 2
                assert plan.planned_peak_bytes <= budget * 1e6
                noise.append(plan.predicted_variance)
            assert is_later or noise[1] < 0.5 * noise[0]
            assert noise[2] == noise[1]
            assert noise[0] == noise[1] or not is_later
            planned.append([(t.name, t.representation) for t in plan.tensors])
    assert planned[0] == planned[-1]


def check(plain: int, rows: list[Row]) -> None:
    assert any(row.feasible for row in rows)
    for row in rows:
        assert row.holds, row
        if row.feasible:
            assert row.planned_mb is not None
            assert row.planned_mb <= row.budget_mb
    planned = [row.planned_mb for row in rows if row.planned_mb is not None]
    assert planned == sorted(planned, reverse=True)
    noise = [row.variance for row in rows if row.variance is not None]
    assert noise == sorted(noise)
    refused = [row for row in rows if not row.feasible]
    assert all(row.smallest_mb is not None and row.smallest_mb > row.budget_mb for row in refused)
    # Once a budget is refused, so is every smaller one.
    assert [row.feasible for row in rows] == sorted((r.feasible for r in rows), reverse=True)


@pytest.mark.slow
@pytest.mark.xfail(
    reason="the memory model does not know what transform codecs allocate while they decode",
    raises=AssertionError,
)
def test_budgets_of_a_small_convolutional_network() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    task = Task("cnn", model, (images,), lambda out: F.cross_entropy(out, labels))
    check(*measure(task, SHARES))


@pytest.mark.slow
def test_budgets_of_a_small_transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    tokens = torch.randn(8, 128, 64)
    check(*measure(Task("transformer", model, (tokens,), lambda out: out.square().mean()), SHARES))
