"""Lowerings: every one gives the same bits; what cannot be had is refused with its remedy."""

from __future__ import annotations

import pytest
import torch
from codec_checks import step_key
from torch import Tensor, nn

import fxcompress
from fxcompress import SettingsError, costs, rng
from fxcompress.codecs import codec
from fxcompress.passes import insert

POINTWISE = (
    *("affine(bits=4)", "affine(bits=3,group=24)", "affine(bits=8,rounding=nearest)"),
    *("dither(bits=2)", "cast(format=bf16)", "bits(bits=1)", "bits(bits=3,low=-2)"),
)


@pytest.mark.parametrize("spec", POINTWISE)
@pytest.mark.parametrize("size", [1, 255, 2100])
def test_pointwise_is_the_definition(spec: str, size: int) -> None:
    c, key = codec(spec), step_key()
    x: Tensor = torch.randn(size) * 100
    if c.lossless:
        x = x > 0 if spec == "bits(bits=1)" else torch.randint(-2, 6, (size,))
    keys = rng.stream_keys(key, 3)
    payload = c.encode(x, key, 3)
    expected = torch.empty_like(x)
    c.decode_reference(payload, expected, keys)
    assert c.is_pointwise
    assert torch.equal(c.pointwise(payload, size, x.dtype, keys), expected)


def network() -> nn.Module:
    torch.manual_seed(0)
    block = (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.ReLU())
    return nn.Sequential(*block, nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))


def gradients(lowering: str, policy: str = "uniform4", inner: str = "aot_eager") -> list[Tensor]:
    torch._dynamo.reset()
    model, x = network(), torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    backend = fxcompress.backend(
        policy=policy, lowering=lowering, inner=inner, min_bytes=1024, seed=5
    )
    compiled = torch.compile(model, backend=backend)
    fxcompress.manual_seed(5)
    compiled(x).square().mean().backward()
    found = {t.lowering for t in backend.plan().tensors if "(" in t.representation}
    assert found == {"inductor" if lowering == "inductor" else "cpu"}
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("policy", ["uniform4", "dither2"])
def test_gradients_are_those_of_the_kernel(policy: str) -> None:
    kernel, fused = gradients("cpu", policy), gradients("inductor", policy)
    assert all(map(torch.equal, kernel, fused))


def test_inductor_fuses_it_bit_for_bit() -> None:
    kernel, fused = (gradients(lowering, inner="inductor") for lowering in ("auto", "inductor"))
    assert all(map(torch.equal, kernel, fused))


def test_no_decode_is_left_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = insert.insert_decodes

    def spied(backward: torch.fx.GraphModule, *args: object, **kwargs: object) -> None:
        original(backward, *args, **kwargs)  # type: ignore[arg-type]
        seen.append([str(n.target) for n in backward.graph.nodes])

    monkeypatch.setattr("fxcompress.passes.rewrite.insert_decodes", spied)
    gradients("inductor")
    assert seen
    assert not any("fxcompress.decode" in name for name in seen[-1])


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"lowering": "triton"}, "lowering='auto'"),
        ({"lowering": "gpu"}, "choose one of auto, triton, cpu, inductor"),
    ],
)
def test_impossible_requests_name_the_remedy(settings: dict[str, str], remedy: str) -> None:
    if torch.cuda.is_available() and settings["lowering"] == "triton":
        pytest.skip("there is a GPU")
    with pytest.raises(SettingsError, match=remedy):
        fxcompress.backend(**settings)  # type: ignore[arg-type]


def test_a_codec_whose_elements_need_each_other_is_refused() -> None:
    with pytest.raises(SettingsError, match="lowering='inductor' cannot decode rotate"):
        gradients("inductor", "rotate2")


def test_automatic_follows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not costs.is_faster_inlined("affine(bits=7)")  # never measured
    monkeypatch.setattr(costs, "_lowerings", lambda: {"affine(bits=4)": (2.0, 1.0)})
    assert costs.is_faster_inlined("affine(bits=4)")
    torch._dynamo.reset()
    backend = fxcompress.backend(policy="uniform4", inner="aot_eager", min_bytes=1024)
    torch.compile(network(), backend=backend)(torch.randn(64, 64)).sum().backward()
    assert "inductor" in {t.lowering for t in backend.plan().tensors}
