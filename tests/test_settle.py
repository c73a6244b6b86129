"""A gradient is written before what else its convolution reads is decoded, at the peak."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_graphs import calls
from torch import Tensor, nn
from torch._inductor import config

import fxcompress
from fxcompress import pipeline
from fxcompress.pareto import trace
from fxcompress.passes.decodes import share_decodes
from fxcompress.passes.rewrite import rewrite
from fxcompress.passes.settle import settle
from fxcompress.pipeline import plan_graph
from fxcompress.settings import make
from fxcompress.tools import memory


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """Of one width: a SiLU's gradient needs four tensors, its convolution one more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.functional.silu(norm(convolution(x)))
        return x.square().mean()


X = torch.randn(8, 32, 32, 32)


def test_a_fence_stands_before_the_decode() -> None:
    (cut,) = trace(Layers(), X)
    found = plan_graph(cut, make(policy="uniform4", inner="aot_eager"))
    assert found.decision is not None
    cut = rewrite(found.cut, found.decision.choices, "", channels_last=False)
    share_decodes(cut, channels_last=False)
    settle(cut, channels_last=False)
    fences = calls(cut.backward, "fxcompress::fence")
    assert fences
    for fence in fences:
        ((gradient,),) = fence.args
        convolution = min(u for u in gradient.users if u is not fence)
        assert convolution.target is torch.ops.aten.convolution_backward.default
        assert any(
            fence < decode < convolution for decode in calls(cut.backward, "fxcompress::decode")
        )


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="what a convolution's backward copies there is the peak"
)
def test_less_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()

    def peak() -> tuple[int, int]:
        torch._dynamo.reset()
        backend = fxcompress.backend(policy="uniform4")
        compiled = torch.compile(model, backend=backend)

        def step() -> None:
            compiled(X).backward()

        with config.patch(force_disable_caches=True):
            step()
        measured = memory.measure_step(step, model.parameters()).peak_bytes
        return measured, backend.plan().planned_peak_bytes

    found, planned = peak()
    assert found < planned + 0.5 * X.nbytes
    monkeypatch.setattr(pipeline, "settle", lambda cut, channels_last: None)
    assert found < peak()[0] - 0.5 * X.nbytes
