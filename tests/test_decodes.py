"""One decode for several readers, where the peak stays what it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_rebuild import Block
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.choose import recompute_choice
from fxcompress.pareto import trace
from fxcompress.passes.capture import Cut
from fxcompress.passes.decodes import alive, share_decodes
from fxcompress.passes.rewrite import rewrite
from fxcompress.pipeline import plan_graph
from fxcompress.settings import make

DECODE = torch.ops.fxcompress.decode.default


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Gates(nn.Module):
    """Each gate's input is read before and after a product in the backward."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [*zip((64, *widths[:-1]), widths, strict=True)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        self.last = nn.Linear(widths[-1], 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = y * torch.sigmoid(y)
        return self.last(x).square().mean()


def rewritten(model: nn.Module, rebuilds: bool = False) -> Cut:
    """Its graphs under uniform4.

    Args:
        rebuilds: the last tensor that has a recipe is rebuilt.
    """
    (cut,) = trace(model, torch.randn(512, 64))
    found = plan_graph(cut, make(policy="uniform4", inner="aot_eager"))
    assert found.decision is not None
    choices = list(found.decision.choices)
    if rebuilds:
        recipes = [recompute_choice(c.candidate) for c in choices]
        last = max(i for i, choice in enumerate(recipes) if choice is not None)
        choices[last] = recipes[last] or choices[last]
    return rewrite(found.cut, choices, "", channels_last=False)


def made(cut: Cut) -> list[fx.Node]:
    return cut.backward.graph.find_nodes(op="call_function", target=DECODE)


def payloads(cut: Cut) -> Counter[fx.Node]:
    """How often each is decoded."""
    return Counter(node.args[0] for node in made(cut))


def peak(cut: Cut) -> float:
    return float(alive(cut, channels_last=False).max())


@pytest.mark.parametrize("rebuilds", [False, True])
def test_decodes_are_shared_where_the_peak_stays(rebuilds: bool) -> None:
    """Not at the widest gate; steps that rebuild a tensor read its root as others do."""
    cut = rewritten(Gates(1024, 256, 256), rebuilds)
    apart, before = payloads(cut), peak(cut)
    assert max(apart.values()) == 2 + rebuilds
    share_decodes(cut, channels_last=False)
    widest = max(apart, key=lambda payload: payload.meta["val"].numel())
    assert apart[widest] == 2
    assert payloads(cut) == Counter({payload: 1 + (payload is widest) for payload in apart})
    assert peak(cut) == before


class Products(nn.Module):
    """Attention by matrix products, whose backward reads the operands transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.contiguous() for part in self.qkv(x).chunk(3, -1))
        return x + self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class Residual(nn.Module):
    """Convolutions in whose backward rebuilt tensors are read, and others written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = (nn.Conv1d(64, 64, 1, bias=False) for _ in range(2))
        norm, last = (nn.BatchNorm1d(64) for _ in range(2))
        self.inner = nn.Sequential(first, norm, nn.ReLU(), second, last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


@pytest.mark.parametrize(
    ("block", "bound"),
    [
        (Block, {"policy": "uniform4"}),
        (Block, {"ratio_saved": 12}),
        (Block, {"ratio": 2}),
        (Products, {"policy": "uniform4"}),
        (Residual, {"ratio_saved": 12}),
    ],
)
def test_graphs_hold_what_was_planned(block: type[nn.Module], bound: dict[str, Any]) -> None:
    """An attention that runs again does so once, and rebuilds its result from what it reads; a
    view that is saved is encoded when what it views is dead to the forward; what the steps of a
    recipe take is dead when a call reads what they rebuild."""
    blocks = [block() for _ in range(4)]
    (cut,) = trace(nn.Sequential(*blocks), torch.randn(16, 64, 32))
    found = plan_graph(cut, make(inner="aot_eager", min_bytes=1024, **bound))
    assert found.decision is not None
    result = rewrite(found.cut, found.decision.choices, "", channels_last=False)
    assert peak(result) == pytest.approx(found.plan.planned_peak_bytes, rel=0.03)


def test_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gradients = torch.randn(512, 64), []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(
                "fxcompress.pipeline.share_decodes", lambda cut, channels_last: None
            )
        torch._dynamo.reset()
        fxcompress.manual_seed(0)
        model = Gates(256, 128)
        backend = fxcompress.backend(policy="uniform4", inner="aot_eager")
        torch.compile(model, backend=backend)(x).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
