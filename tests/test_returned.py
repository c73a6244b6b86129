"""What a graph returns counts in the peak for as long as its caller holds it: that is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
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


def test_scalars_and_what_has_no_gradient_are_not_watched() -> None:
    told: list[bool] = []
    x = torch.randn(4, requires_grad=True)
    when_backward_begins([x.detach(), None, 3], told.append)
    loss, other = x.square().sum(), torch.ones(4)
    when_backward_begins([loss, other], told.append)
    loss.backward(retain_graph=True)
    loss.backward()
    assert told == [True]
