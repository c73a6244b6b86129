"""What a graph returns counts in the peak for as long as its caller holds it: that is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import joint, whole
from fxcompress.planner import Given
from fxcompress.returned import when_backward_begins
from fxcompress.tools.memory import measure_step

ROWS, WIDTH = 1024, 512


class Wide(nn.Module):
    """Its output is a good part of what a step holds, long after the backward has left it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.last = nn.Linear(64, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.wide(x)))


class Broken(nn.Module):
    """In two graphs, the second of which computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Wide()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.wide(x)
        torch._dynamo.graph_break()
        return torch.tanh(y).square().mean(), y


def held(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y = model(x)
    y.square().mean().backward()


def let_go(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    model(x).square().mean().backward()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("step", [held, let_go])
def test_the_peak_is_of_the_step_as_it_was_seen(step: Callable[..., None]) -> None:
    model, x = Wide(), torch.randn(ROWS, 64)
    backend = fxcompress.backend(policy="uniform4", min_bytes=0)
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    before = backend.plan().planned_peak_bytes
    step(compiled, x)
    measured = measure_step(lambda: step(compiled, x), model.parameters()).peak_bytes
    planned = backend.plan().planned_peak_bytes
    assert planned == pytest.approx(measured, rel=0.02)
    assert before - planned == (4 * ROWS * WIDTH if step is let_go else 0)


@pytest.mark.parametrize("is_held", [True, False])
def test_graphs_are_planned_together_with_what_was_seen(
    is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[joint.Part] = []

    def plan_together(parts: list[joint.Part]) -> list[Given | None]:
        seen.extend(parts)
        return joint.plan_together(parts)

    monkeypatch.setattr(whole, "plan_together", plan_together)
    model, x, budget = Broken(), torch.randn(ROWS, 64), 17.0
    backend = fxcompress.backend(budget)
    compiled = torch.compile(model, backend=backend)

    def step() -> None:
        loss, y = compiled(x)
        if not is_held:
            del y
        loss.backward()

    step()  # and what is measured for the plan
    for _ in range(3):
        assert measure_step(step, model.parameters()).peak_bytes <= budget * 1e6
    assert [part.lets_go for part in seen] == [not is_held, True]
    assert backend.plan().planned_peak_bytes <= budget * 1e6


def test_scalars_and_what_has_no_gradient_are_not_watched() -> None:
    told: list[bool] = []
    x = torch.randn(4, requires_grad=True)
    when_backward_begins([x.detach(), None, 3], told.append)
    loss, other = x.square().sum(), torch.ones(4)
    when_backward_begins([loss, other], told.append)
    loss.backward(retain_graph=True)
    loss.backward()
    assert told == [True]
