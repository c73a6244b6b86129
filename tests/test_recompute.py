"""Passes that change what is saved before any codec: recompute, standardise; and check()."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from test_graphs import Recorder, record
from torch import Tensor, nn

import fxcompress
from fxcompress.passes.analyse import analyse
from fxcompress.passes.properties import op_name


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Blocks(nn.Module):
    """Two blocks conv, norm, ReLU: min-cut saves both the first ReLU and its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x))).mean((2, 3)).square()


def representations(recorder: Recorder) -> dict[str, str]:
    return {t.name: t.representation for t in recorder.plan.tensors}


def image() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 16, 16)


def test_relu_is_rebuilt_from_its_convolution() -> None:
    recorder = record(Blocks(), image(), policy="lossless")
    assert "relu" in [s.name for s in recorder.before.saved]
    assert representations(recorder)["relu"] == "recompute"
    assert "relu" not in [s.name for s in recorder.after.saved]
    readers = [
        n for n in recorder.after.backward.graph.nodes if op_name(n) == "convolution_backward"
    ]
    assert any(op_name(n.args[1]) == "where" for n in readers)  # of the mask, see pieces.py


def test_its_mask_is_hoisted_when_the_convolution_is_coded() -> None:
    recorder = record(Blocks(), image(), policy="uniform2")
    backward = recorder.after.backward.graph
    assert representations(recorder)["convolution"].startswith("affine")
    assert not [n for n in backward.nodes if op_name(n) in {"le", "gt", "lt", "ge"}]


def test_exponential_steps_are_not_rebuilt() -> None:
    """An exp would magnify the error of what it is rebuilt from."""
    weight = torch.randn(16, 16, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return ((x @ weight).sin().exp() @ weight).square()

    recorder = record(step, torch.randn(8, 16), policy="uniform4")
    assert "recompute" not in representations(recorder).values()


@pytest.mark.parametrize("act", [F.silu, F.gelu])
def test_smooth_activations_are_rebuilt(act: Callable[[Tensor], Tensor]) -> None:
    """However many exponentials they are made of, once PyTorch has taken them apart."""
    layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def step(x: Tensor) -> Tensor:
        return layers[1](act(layers[0](x))).square()

    found = representations(record(step, torch.randn(64, 32), policy="uniform2"))
    assert sorted(r.partition("(")[0] for r in found.values()) == ["affine", "affine", "recompute"]


def test_gated_products_have_smooth_recipes() -> None:
    """They may be rebuilt from coded tensors."""
    layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def step(x: Tensor) -> Tensor:
        return layers[2](F.silu(layers[0](x)) * layers[1](x)).square()

    recorder = record(step, torch.randn(64, 32), policy="uniform2")
    candidates = analyse(recorder.before, 0)
    recipes = [c.recipe for c in candidates if c.recipe is not None and len(c.recipe.roots) > 1]
    assert recipes
    assert all(r.is_smooth for r in recipes)


def test_an_exponential_beside_its_sigmoid_is_one() -> None:
    layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def step(x: Tensor) -> Tensor:
        grown = layers[0](x).exp()
        return layers[1](1 / (1 + grown) + 1e-3 * grown).square()

    assert "recompute" not in representations(record(step, torch.randn(64, 32), policy="uniform2"))


def test_a_gate_that_is_squeezed_bears_few_bits() -> None:
    """Statistics join the convolution on its way to the exponential of a SiLU: no floor of bits."""
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())

    def step(x: Tensor) -> Tensor:
        y = layer(x)
        return y * y.mean((2, 3), keepdim=True).sigmoid()

    found = representations(record(step, image(), policy="uniform2"))
    assert found["convolution"].startswith("affine(bits=2)")


def test_batch_norm_inputs_are_coded_in_units_of_their_channels() -> None:
    """A channel far quieter than the others of its group is as exact as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[0].weight[0] *= 0.01
    x = torch.randn(32, 3, 4, 4)  # a group of 256 spans all channels

    def gradient(policy: str) -> Tensor:
        torch._dynamo.reset()
        fxcompress.manual_seed(0)
        model.zero_grad()
        backend = fxcompress.backend(policy=policy, inner="aot_eager", min_bytes=0)
        torch.compile(model, backend=backend)(x).pow(3).sum().backward()
        grad = model[1].weight.grad
        assert grad is not None
        return grad.clone()

    exact = gradient("inductor")
    error = (gradient("uniform8") - exact).abs() / exact.abs()
    assert error[0] < 0.1  # coded as it is, the quiet channel is off by more than its size


def test_check_finds_no_bias_and_the_noise_that_is_there() -> None:
    model, x = Blocks(), image()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    backend = fxcompress.backend(policy="uniform4", inner="aot_eager", min_bytes=0)
    found = fxcompress.check(model, x, with_backend=backend, seeds=6)
    assert found.outputs_equal
    assert 1e-4 < found.noise < 0.2
    assert found.bias < 0.7 * found.noise
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    exact = fxcompress.backend(policy="lossless", inner="aot_eager", min_bytes=0)
    assert fxcompress.check(model, x, with_backend=exact, seeds=2).noise < 1e-5


def test_check_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(fxcompress.FxCompressError, match="seeds"):
        fxcompress.check(Blocks(), image(), seeds=1)
    with pytest.raises(fxcompress.FxCompressError, match="requires a gradient"):
        fxcompress.check(nn.ReLU(), image())


def test_signs_are_rebuilt_from_their_mask() -> None:
    """A float tensor that takes two values is saved as one bit an element."""

    def step(x: Tensor) -> Tensor:
        signs = 1 - 2 * (x @ weight <= 0).float()
        return (signs @ weight).sin() @ weight * signs  # so far apart that min-cut saves it

    weight = torch.randn(32, 32, requires_grad=True)
    recorder = record(step, torch.randn(128, 32), policy="lossless")
    assert "sub" in [s.name for s in recorder.before.saved]
    kinds = representations(recorder)
    assert (kinds["sub"], kinds["le"]) == ("recompute", "bits(bits=1)")


def test_casts_of_weights_are_rebuilt_from_the_weights() -> None:
    """Autocast saves a cast of each weight, which is no activation and nothing to add noise to."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(64, 64, bias=False), nn.SiLU(), nn.Linear(64, 64, bias=False)
            )

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layers(x).float().square().mean()

    recorder = record(Cast(), torch.randn(256, 64, requires_grad=True), policy="uniform4")
    before = {s.name: s.forward for s in recorder.before.saved}
    casts = {
        name
        for name, node in before.items()
        if node.meta["val"].dtype == torch.bfloat16 and node.meta["val"].shape == (64, 64)
    }
    assert casts
    found = representations(recorder)
    assert {found.get(name, "recompute") for name in casts} <= {"recompute"}
    held = fxcompress.check(
        Cast(),
        torch.randn(256, 64),
        seeds=2,
        with_backend=fxcompress.backend(policy="lossless", inner="aot_eager"),
    )
    assert held.noise == 0
