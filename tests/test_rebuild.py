"""Recompute as a choice of the planner: recipes, the rewritten graphs, exactness, budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_graphs import Recorder, record
from torch import Tensor, nn

import fxcompress
from fxcompress.passes.properties import op_name

RULE = {"representation": "recompute"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Conv(nn.Module):
    """Convolutions with norms: each follows from the one before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(3, 8), (8, 8), (8, 8), (8, 8)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in sizes)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return self.head(x.mean((2, 3))).square()


class Block(nn.Module):
    """A GPT block: q, k, v are views of one product, the MLP's product is four times as wide."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, 2, width // 2)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        x = F.dropout(x, self.dropout)
        return (x + self.down(F.gelu(self.up(self.norm2(x))))).square()


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (Conv, (4, 3, 16, 16)),
    (Block, (2, 64, 32)),
]


def ruled(model: nn.Module, x: Tensor, match: str = "*", **settings: Any) -> Recorder:
    rules = [{"match": match, **RULE}]
    return record(model, x, policy="lossless", overrides=rules, **settings)


def rebuilt(recorder: Recorder) -> set[str]:
    """Tensors rebuilt by a rule, not by passes/recompute.py."""
    return {t.name for t in recorder.plan.tensors if t.reason.startswith("rebuilt by")} - {
        t.name for t in recorder.plan.tensors if "from another saved tensor" in t.reason
    }


@pytest.mark.parametrize(("make", "shape"), CASES, ids=["conv", "gpt"])
def test_gradients_are_plain_ones(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    gradients, statistics = [], []
    for settings in (
        {"policy": "inductor"},
        {"policy": "lossless", "overrides": [{"match": "*", **RULE}]},
    ):
        torch._dynamo.reset()
        model = make()
        backend = fxcompress.backend(inner="aot_eager", min_bytes=0, **settings)
        compiled = torch.compile(model, backend=backend)
        for seed in (0, 1):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            compiled(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        statistics.append(list(model.buffers()))
    assert [t.representation for t in fxcompress.explain(compiled).tensors].count("recompute") > 2
    for found, plain in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(*statistics, strict=True):  # running ones are updated once a step
        assert torch.equal(one, other)


def test_a_convolution_is_repeated_before_its_first_reader() -> None:
    recorder = ruled(Conv(), torch.randn(4, 3, 16, 16), "convolutions.2")
    name = next(iter(rebuilt(recorder)))
    assert name not in [s.name for s in recorder.after.saved]
    nodes = list(recorder.after.backward.graph.nodes)
    again = [n for n in nodes if op_name(n) == "convolution"]
    assert len(again) == 1
    first = min(again[0].users)
    calls = {"convolution", "convolution_backward"}
    between = nodes[nodes.index(again[0]) + 1 : nodes.index(first)]
    assert not any(op_name(n) in calls for n in between)
    writing = {"copy_", "native_batch_norm", "_native_batch_norm_legit_functional"}
    assert not any(op_name(n) in writing for n in nodes)


def test_views_of_one_product_are_rebuilt_by_one_product() -> None:
    x = torch.randn(2, 64, 32)
    products = [
        sum(op_name(n) == "addmm" for n in r.after.backward.graph.nodes)
        for r in (record(Block(), x, policy="lossless"), ruled(Block(), x, "op:getitem"))
    ]
    assert products[1] == products[0] + 1
    assert len(rebuilt(ruled(Block(), x, "op:getitem"))) == 3


def test_no_tensor_is_rebuilt_from_a_rebuilt_one() -> None:
    """Under a rule for all, roots and rebuilt tensors take turns."""
    recorder = ruled(Conv(), torch.randn(4, 3, 16, 16))
    of = {t.name: t for t in recorder.plan.tensors}
    names = [f"convolution{i}" for i in ("", "_1", "_2", "_3")]
    kinds = [of[name].representation for name in names]
    assert kinds == ["recompute", "keep", "recompute", "keep"]
    assert "cannot be rebuilt without convolution" in of["convolution_1"].reason


def test_what_is_random_is_not_drawn_again() -> None:
    """The product after a dropout follows from what was kept of it, not through the draw."""
    plain = record(Block(dropout=0.5), torch.randn(2, 64, 32), policy="lossless")
    recorder = ruled(Block(dropout=0.5), torch.randn(2, 64, 32))
    assert rebuilt(recorder)

    def draws(recorder: Recorder) -> int:
        nodes = recorder.after.backward.graph.nodes
        return sum("rand" in op_name(n) or "dropout" in op_name(n) for n in nodes)

    assert draws(recorder) == draws(plain)


def test_an_exact_plan_within_a_budget() -> None:
    """Where rebuilding alone meets the budget at less cost, no noise is added."""
    x = torch.randn(16, 64, 32)

    def planned(**settings: Any) -> fxcompress.Plan:
        torch._dynamo.reset()
        backend = fxcompress.backend(inner="aot_eager", **settings)
        compiled = torch.compile(nn.Sequential(Block(), Block(), Block()), backend=backend)
        compiled(x).sum().backward()
        return fxcompress.explain(compiled)

    lossless = planned(policy="lossless")
    plan = planned(budget_mb=1.1 * 0.9 * lossless.planned_peak_bytes / 1e6)
    assert plan.planned_peak_bytes <= 0.9 * lossless.planned_peak_bytes
    assert plan.predicted_variance == 0
    assert any("addmm" in t.reason for t in plan.tensors if t.representation == "recompute")
    assert plan.slowdown is not None
    assert 0 < plan.slowdown < 0.5


def test_a_saved_plan_rebuilds_again(tmp_path: Any) -> None:
    x = torch.randn(2, 64, 32)
    first = ruled(Block(), x)
    first.plan.save(tmp_path / "plan.json")
    torch._dynamo.reset()
    again = record(Block(), x, plan=tmp_path / "plan.json")
    assert [(t.name, t.representation) for t in again.plan.tensors] == [
        (t.name, t.representation) for t in first.plan.tensors
    ]
    assert rebuilt(again) == rebuilt(first)
