"""Packed masks pass Inductor's CPU code as bytes, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from test_graphs import Recorder, record
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxcompress
from fxcompress import rng
from fxcompress.passes.booleans import masks_as_bytes

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Masked(nn.Module):
    """Masks alone (dropout), and beside values (ReLU)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.last(self.first(x).relu()), 0.3).sin()


def step(inner: str) -> tuple[Recorder, list[Tensor]]:
    """What is recorded, and the gradients, which aot_eager computes of either's graphs."""
    torch._dynamo.reset()
    model, x = Masked(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    rng.manual_seed(3)
    torch.manual_seed(5)
    # Of a codec that leaves masks to the graph.
    recorder = record(model, x, policy="affine(bits=4,group=128)", inner=inner)
    return recorder, [p.grad for p in model.parameters() if p.grad is not None]


def coders(graph: fx.GraphModule, name: str) -> list[fx.Node]:
    target = getattr(torch.ops.fxcompress, name).default
    found = graph.graph.find_nodes(op="call_function", target=target)
    return [node for node in found if str(node.args[2]).startswith("bits")]


def test_masks_are_coded_as_bytes_with_the_same_gradients() -> None:
    plain, exact = step("aot_eager")
    recorder, found = step("inductor")
    encodes = coders(recorder.after.forward, "encode")
    assert len(encodes) == len(coders(plain.after.forward, "encode")) >= 2
    assert {node.args[0].meta["val"].dtype for node in encodes} == {torch.uint8}
    decodes = coders(recorder.after.backward, "decode")
    assert decodes
    for node in decodes:
        assert node.meta["val"].dtype == node.args[-1] == torch.uint8
        (numbers,) = node.users
        assert [user.target for user in numbers.users] == [aten.ne.Scalar]
    assert all(map(torch.equal, found, exact))
    assert len(found) == len(exact) == 4


@pytest.mark.parametrize("is_called", [False, True])
def test_a_mask_that_is_in_memory_anyway_stays_boolean(is_called: bool) -> None:
    """A given one is not written by Inductor, and what a call reads is."""

    def forward(mask: Tensor) -> Tensor:
        mask = mask if is_called else mask.logical_not()
        return torch.ops.fxcompress.encode(mask, None, "bits(bits=1)", 0, [0])

    def backward(payload: Tensor, x: Tensor) -> Tensor:
        arguments = (payload, None, "bits(bits=1)", 0, [8], [0], torch.bool)
        mask = torch.ops.fxcompress.decode(*arguments)
        if is_called:
            return torch.ops.fxcompress.encode(mask, None, "bits(bits=1)", 0, [0])
        return x.masked_fill(mask, 0)

    mask, x = torch.arange(8) % 3 == 0, torch.randn(8)
    graphs = (make_fx(forward)(mask), make_fx(backward)(forward(mask), x))
    given, expected = graphs[0](mask), graphs[1](forward(mask), x)
    masks_as_bytes(SimpleNamespace(forward=graphs[0], backward=graphs[1]))  # type: ignore[arg-type]
    kinds = [coders(graphs[0], "encode")[0].args[0], *coders(graphs[1], "decode")]
    assert all((k.meta["val"].dtype == torch.bool) is is_called for k in kinds)
    assert torch.equal(graphs[0](mask), given)
    assert torch.equal(graphs[1](given, x), expected)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()).sin()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).sum(), list(model.parameters())))


def test_a_mask_lies_in_memory_as_its_feature_map() -> None:
    backend = fxcompress.backend(policy="affine(bits=4,group=128)", min_bytes=0)
    compiled = torch.compile(Body(), backend=backend)
    _, codes = run_and_get_code(gradients, compiled, torch.randn(8, 3, 20, 20))
    pattern = r"empty_strided_cpu\(\(8, 16, \d+, \d+\), \(\d+, (\d+), \d+, \d+\), torch.uint8\)"
    strides = re.findall(pattern, "".join(codes))
    assert strides
    assert set(strides) == {"1"}


def test_a_mask_of_unknown_size_is_left_to_inductor() -> None:
    model, x = Body(), torch.randn(8, 3, 20, 20)
    backend = fxcompress.backend(policy="lossless", min_bytes=0)
    found = gradients(torch.compile(model, backend=backend, dynamic=True), x)
    for a, b in zip(found, gradients(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
