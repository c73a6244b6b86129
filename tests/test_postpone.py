"""What no gradient goes into is computed where it is read, and counted where it lies in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_graphs import calls
from torch import Tensor, nn
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx

import fxcompress
from fxcompress import pipeline
from fxcompress.passes import properties as prop
from fxcompress.passes.postpone import fence_off, postpone, shared
from fxcompress.passes.reuse import reached, reuse
from fxcompress.record import Recorder
from fxcompress.tools import memory


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Wide(nn.Module):
    """Narrow, wide, narrow, as in an EfficientNet: it is worth while to repeat what is wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.norm = nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.narrow = nn.Conv2d(64, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(nn.functional.silu(self.norm(self.expand(x)))).square().mean()


REPEATED = {"match": "expand", "representation": "recompute"}


def test_factors_wait_for_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Wide(), torch.randn(8, 8, 32, 32)
    wide = 8 * x.nbytes

    def peak() -> tuple[int, int]:
        torch._dynamo.reset()
        backend = fxcompress.backend(policy="lossless", min_bytes=0, overrides=[REPEATED])
        compiled = torch.compile(model, backend=backend)

        def step() -> None:
            compiled(x).backward()

        with config.patch(force_disable_caches=True):
            step()
        plan = backend.plan()
        assert {t.representation for t in plan.tensors if t.storage_bytes == wide} == {"recompute"}
        return memory.measure_step(step, model.parameters()).peak_bytes, plan.planned_peak_bytes

    found, planned = peak()
    assert abs(found - planned) < 0.5 * wide
    monkeypatch.setattr(pipeline, "postpone", lambda cut: None)
    assert found < peak()[0] - 0.5 * wide


@pytest.mark.parametrize(("act", "count"), [(nn.SiLU, 2), (nn.ReLU, 0)])
def test_what_is_written_for_its_second_reader(act: type[nn.Module], count: int) -> None:
    """A sigmoid, however the release spells it, and a norm's output, computed from five tensors."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), act())
    recorder = Recorder(0)
    torch.compile(model, backend=recorder)(torch.randn(4, 3, 8, 8)).sum().backward()
    (recording,) = recorder.recordings()
    written = reuse(recording.cut.backward.graph).written
    assert sum(prop.tensor_bytes(n) == 4 * 4 * 8 * 64 for n in written) == count


def test_what_is_inlined_is_computed_on_both_sides() -> None:
    """A fence would have it written down."""

    def backward(x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        y = x @ weight
        both = y + 1
        before = both.tanh() @ weight
        factor = both.sigmoid()
        return (gradient + before) * factor * (1 - factor)

    inputs = (torch.randn(512, 64), torch.randn(64, 64), torch.randn(512, 64))
    module = make_fx(backward, tracing_mode="fake")(*inputs)
    expected, (first, second) = module(*inputs), calls(module, "aten::mm")
    (gradient,) = (n for n in module.graph.nodes if n.name == "gradient_1")
    waiting = reached({gradient}, lambda n: True) | {gradient}
    assert shared(module.graph, waiting) == {second: [first]}
    fence_off(module.graph, waiting)
    module.recompile()
    (fence,) = calls(module, "fxcompress::fence")
    one, other = (n for n in calls(module, "aten::add") if n.args[1] == 1)
    assert one < second < fence < other
    assert all(u < fence for u in one.users)
    assert not shared(module.graph, waiting), "one fence will do"
    assert torch.equal(module(*inputs), expected)


def test_nothing_is_fenced_that_only_calls_share() -> None:
    def step(x: Tensor, weight: Tensor) -> Tensor:
        return torch.sin(torch.sin(x @ weight) @ weight) @ weight

    recorder = Recorder(0)
    x, weight = torch.randn(512, 64), torch.randn(64, 64, requires_grad=True)
    torch.compile(step, backend=recorder)(x, weight).sum().backward()
    (recording,) = recorder.recordings()
    cut = recording.cut.copy()
    postpone(cut)
    assert not calls(cut.backward, "fxcompress::fence")
