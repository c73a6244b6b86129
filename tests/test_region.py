"""``with fxcompress.policy(…)`` in forward code: what is inside is represented as it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import torch_private
from fxcompress.plan import Plan


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    fxcompress.manual_seed(None)
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Three products; the one in the middle is the sensitive one."""

    def __init__(self, region: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle, self.last = (nn.Linear(64, 64) for _ in range(3))
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.first(x), -1) * 64
        with self.region():
            x = torch.softmax(self.middle(x), -1) * 64
        return self.last(x)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def compiled(model: nn.Module, policy: str = "uniform4", **settings: Any) -> Plan:
    """The plan of one step, without a graph break."""
    made = fxcompress.backend(policy=policy, inner="aot_eager", min_bytes=0, **settings)
    model.compile(backend=made, fullgraph=True)
    step(model, torch.randn(32, 64))
    return made.plan()


def test_gradients_inside_are_exact() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    model = Net(lambda: fxcompress.policy("lossless"))
    exact = step(model, x)
    backend = fxcompress.backend(policy="uniform4", inner="aot_eager", min_bytes=0)
    model.compile(backend=backend, fullgraph=True)
    found = step(model, x)

    def is_exact(name: str) -> bool:
        return torch.allclose(found[name], exact[name], rtol=1e-4, atol=1e-4)

    assert not is_exact("last.weight")  # outside: its input is coded ...
    assert is_exact("middle.weight")  # ... and gradients that come from it are exact all the same
    assert not is_exact("first.weight")


@pytest.mark.parametrize("inner", ["lossless", "inductor", "uniform8", "rotate(bits=5)", "auto"])
def test_policies_inside(inner: str) -> None:
    plan = compiled(Net(lambda: fxcompress.policy(inner)))
    inside = {t.representation for t in plan.tensors if t.reason == f"in a region of {inner}"}
    expected = {
        "lossless": {"keep"},
        "inductor": {"keep"},
        "uniform8": {"affine(bits=8)"},
        "rotate(bits=5)": {"rotate(bits=5)"},
        "auto": set(),
    }[inner]
    assert inside == expected
    everywhere = [t.representation for t in compiled(Net()).tensors]
    found = [t.representation for t in plan.tensors]
    assert (found == everywhere) == (inner == "auto")


def test_regions_nest() -> None:
    class Nested(Net):
        def forward(self, x: Tensor) -> Tensor:
            with fxcompress.policy("uniform8"):
                x = torch.softmax(self.first(x), -1) * 64
                with fxcompress.policy("lossless"):
                    x = torch.softmax(self.middle(x), -1) * 64
                return self.last(x)

    kinds = {t.name: t.representation for t in compiled(Nested()).tensors}
    assert kinds["addmm"] == kinds["mul_1"] == "affine(bits=8)"
    assert kinds["addmm_1"] == kinds["mul"] == "keep"


def test_under_the_solver_and_before_overrides() -> None:
    model = Net(lambda: fxcompress.policy("uniform8"))
    plan = compiled(model, "auto", ratio_saved=3.0)
    assert any(t.reason == "in a region of uniform8" for t in plan.tensors)
    torch._dynamo.reset()
    plan = compiled(model, "auto", ratio_saved=3.0, overrides=[{"match": "*", "bits": 8}])
    assert not any(t.reason == "in a region of uniform8" for t in plan.tensors)


def test_unknown_policies() -> None:
    with pytest.raises(fxcompress.SettingsError, match="unknown policy 'nine'"):
        Net(lambda: fxcompress.policy("nine"))(torch.randn(32, 64))
    with pytest.raises(fxcompress.SettingsError, match="unknown policy 'nine'"):
        compiled(Net(lambda: fxcompress.policy("nine")))
    with pytest.raises(fxcompress.SettingsError, match="ratio_saved=12 for @12"):
        fxcompress.backend(policy="auto@12")
    with pytest.raises(fxcompress.SettingsError, match="calibration"):
        compiled(Net(lambda: fxcompress.policy("gact-l2.2")))


def test_nothing_in_eager_mode() -> None:
    x = torch.randn(32, 64)
    assert torch.equal(Net(lambda: fxcompress.policy("uniform2"))(x), Net()(x))


class Longer(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.first(x), -1) * 64
        with self.region():
            x = torch.softmax(self.middle(x), -1) * 64
            return self.last(x)


def uniform8() -> AbstractContextManager[None]:
    return fxcompress.policy("uniform8")


def uniform4() -> AbstractContextManager[None]:
    return fxcompress.policy("uniform4")


def test_regions_are_part_of_a_graph_s_code() -> None:
    """Caches compare the code of graphs: where a region begins, its policy, where it ends."""
    codes = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        codes.append(module.code)
        return module.forward

    models = [Net(), Net(uniform4), Net(uniform8), Longer(uniform8)]
    for model in models:
        torch._dynamo.reset()
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(32, 64))
    assert len(set(codes)) == len(models)


@pytest.mark.slow
def test_cached_graphs_belong_to_their_region() -> None:
    def kinds(model: nn.Module) -> list[str]:
        torch._dynamo.reset()
        with fxcompress.enabled(policy="uniform4", min_bytes=0) as found:
            model.compile()
            step(model, torch.randn(32, 64))
        return [t.representation for t in found.plan().tensors]

    with torch_private.fresh_compile_caches():
        plain, coarse, fine, longer = (
            kinds(m) for m in (Net(), Net(uniform4), Net(uniform8), Longer(uniform8))
        )
        assert plain == coarse
        assert 0 < fine.count("affine(bits=8)") < longer.count("affine(bits=8)")
        assert kinds(Net(uniform8)) == fine  # from the cache
