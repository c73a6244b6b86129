"""Auxiliary activations: gradients by their definition, memory under our backend, conversion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from train_small import saved_storages

import fxcompress
from fxcompress.nn import (
    Conv2dARA,
    DistributeARA,
    LinearASA,
    conv2d_ara,
    convert_mlps,
    convert_resnet,
    learning_indicator,
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def by_definition(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    auxiliary: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: float = 1.0,
) -> Tensor:
    """``product(x, weight, bias)`` whose weight gradient is autograd's own for ``auxiliary``."""
    learns = factor * product(auxiliary.detach(), weight, None)
    return product(x, weight.detach(), bias) + learns - learns.detach()


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(9)
    return list(torch.autograd.grad(out, leaves, torch.randn_like(out)))


def saved_bytes(out: Tensor) -> int:
    """Bytes of distinct storages that the autograd graph of ``out`` holds."""
    return sum(saved_storages(out).values())


def planned_bytes(model: nn.Module, x: Tensor) -> int:
    """Saved bytes under our backend, without a graph break."""
    torch._dynamo.reset()
    made = fxcompress.backend(policy="lossless", inner="aot_eager", min_bytes=0)
    torch.compile(model, backend=made, fullgraph=True)(x).square().sum().backward()
    return made.plan().saved_bytes


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": (2, 1), "bias": False},
    {"groups": 4, "stride": (1, 2)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_ara_gradients(geometry: dict[str, Any]) -> None:
    conv = Conv2dARA(8, 12, 3, **geometry).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    auxiliary = torch.randn_like(x, requires_grad=True)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]

    out, relayed = conv(x, auxiliary)
    expected = by_definition(product, x, auxiliary, conv.weight, conv.bias)
    assert relayed is auxiliary
    torch.testing.assert_close(out, product(x, conv.weight, conv.bias))
    leaves = [x, *conv.parameters()]
    torch.testing.assert_close(gradients(out, leaves), gradients(expected, leaves))
    out, _ = conv(x, auxiliary)
    assert torch.autograd.grad(out.sum(), auxiliary, allow_unused=True) == (None,)


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16), (2, 2, 3, 16)])
@pytest.mark.parametrize("compiled", [False, True])
def test_asa_gradients(shape: tuple[int, ...], compiled: bool) -> None:
    layer = LinearASA(16, 5).double()
    x = torch.randn(shape, dtype=torch.float64)
    x[..., 0] = 0.0  # the sign of which is −1
    x.requires_grad_()
    signs = torch.where(x.detach() > 0, 1.0, -1.0).double()
    expected = by_definition(
        F.linear, x + 0.01 * signs, signs, layer.weight, layer.bias, 100 * 0.01
    )
    called = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    leaves = [x, layer.weight, layer.bias]
    found = called(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_eager_asa_saves_a_bit_an_element() -> None:
    x = torch.randn(64, 1024)
    exact, signs = nn.Linear(1024, 8), LinearASA(1024, 8)
    weights = 8 * 1024 * 4
    assert saved_bytes(exact(x)) == x.nbytes  # that of x: the weight is not needed for it
    assert saved_bytes(signs(x)) - weights == pytest.approx(x.numel() / 8, abs=64)


@pytest.mark.parametrize("layer", ["ara", "asa"])
def test_autocast(layer: str) -> None:
    """The backward computes in the type that autocast chose, parameters get their own."""
    if layer == "ara":
        conv = Conv2dARA(8, 8, 3, padding=1)
        x = torch.randn(2, 8, 6, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = conv(x, torch.randn_like(x))
        parameters = list(conv.parameters())
    else:
        linear, x = LinearASA(8, 8), torch.randn(4, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(x)
        parameters = list(linear.parameters())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)


def test_distribute_begins_a_segment() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    out, auxiliary = DistributeARA()(x, torch.randn(5))
    assert out is x
    assert torch.equal(auxiliary, x)
    assert not auxiliary.requires_grad


def test_auxiliary_of_another_shape() -> None:
    with pytest.raises(fxcompress.FxCompressError, match="begin a new segment"):
        conv2d_ara(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4), torch.randn(4, 4, 1, 1))


def test_paddings_that_cannot_be() -> None:
    for wrong in ({"padding": "same"}, {"padding_mode": "reflect", "padding": 1}):
        with pytest.raises(fxcompress.FxCompressError, match=r"use nn\.Conv2d"):
            Conv2dARA(4, 4, 3, **wrong)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_converted_resnet(name: str) -> None:
    """Equal outputs and names; exact gradients but for the convolutions that were converted."""
    exact = torchvision.models.get_model(name, num_classes=4).eval()
    converted = convert_resnet(copy.deepcopy(exact), segment=3)
    assert list(converted.state_dict()) == list(exact.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(converted(x), exact(x))
    exact(x).sum().backward()
    converted(x).sum().backward()
    named = dict(converted.named_parameters())
    differ = {
        n
        for n, p in exact.named_parameters()
        if not torch.allclose(p.grad, named[n].grad, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
    }
    assert differ
    assert all(n.endswith(("conv1.weight", "downsample.0.weight")) for n in differ)
    # The strided block learns from the auxiliary of the stage before it.
    assert "layer2.0.conv1.weight" in differ
    assert "layer1.0.conv1.weight" not in differ  # first of its segment


def blocks(*widths: int) -> nn.Sequential:
    """Basic blocks, of stride 2 where the width grows."""
    made = []
    for before, after in pairwise(widths):
        stride = 1 + (after > before)
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride)) if stride == 2 else None
        made.append(torchvision.models.resnet.BasicBlock(before, after, stride, shortcut))
    return nn.Sequential(*made)


def test_converted_resnet_saves_less() -> None:
    """Inputs of blocks are no longer saved; ReLUs keep a bit."""
    exact = nn.Sequential(nn.Conv2d(3, 8, 1), blocks(8, 8, 8), blocks(8, 16, 16))
    converted = convert_resnet(copy.deepcopy(exact), segment=3)
    x = torch.randn(4, 3, 16, 16)
    # Neither the second block of the first stage nor the strided one after it needs its input,
    # whose ReLU keeps a mask now.
    gone = 2 * x[:, 0].numel() * 8 * (4 - 1 / 8)
    saved = planned_bytes(exact, x) - planned_bytes(converted, x)
    assert saved == pytest.approx(gone, rel=0.02)


def test_converted_mlp_saves_less() -> None:
    """With ReLU the input of the second layer takes the bit that the ReLU's mask takes anyway."""
    exact = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32))
    converted = convert_mlps(copy.deepcopy(exact))
    assert isinstance(converted[2], LinearASA)
    assert type(converted[0]) is nn.Linear
    x = torch.randn(256, 32)
    hidden = 256 * 128
    assert planned_bytes(exact, x) == hidden * 4
    assert planned_bytes(converted, x) == pytest.approx(hidden / 8, abs=256)


def test_converts_what_is_asked_for() -> None:
    model = nn.ModuleDict({"attention": nn.Linear(8, 24), "up": nn.Linear(8, 32)})
    model["down"], model["head"] = nn.Linear(32, 8), nn.Linear(8, 4)

    def names(m: nn.Module) -> list[str]:
        return [n for n, c in m.named_modules() if isinstance(c, LinearASA)]

    assert names(convert_mlps(copy.deepcopy(model))) == ["down"]
    assert names(convert_mlps(copy.deepcopy(model), layers=2)) == ["up", "down"]
    assert names(convert_mlps(copy.deepcopy(model), match=["att*"])) == ["attention"]
    with pytest.raises(fxcompress.FxCompressError, match="name some with match"):
        convert_mlps(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(fxcompress.FxCompressError, match="reads_input"):
        convert_resnet(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_learning_indicator() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(learning_indicator(x, x), torch.ones(2))
    torch.testing.assert_close(learning_indicator(x, torch.zeros(2, 2)), torch.zeros(2))
    assert math.isclose(float(learning_indicator(x, -x)[0]), -3.0, rel_tol=1e-6)


def test_it_learns() -> None:
    """A few steps of a small converted network bring the loss down about as well."""
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,))

    def last_loss(convert: Callable[[nn.Module], nn.Module]) -> float:
        torch.manual_seed(1)
        block = torchvision.models.resnet.BasicBlock
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Sequential(*(block(16, 16) for _ in range(4))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
        convert(model)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(30):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    exact, auxiliary = last_loss(lambda m: m), last_loss(convert_resnet)
    assert exact < 0.7
    assert auxiliary < 0.9
