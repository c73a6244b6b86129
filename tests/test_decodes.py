"""One decode for several readers, where the peak stays what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.decodes import joined
from fxcompress.pareto import trace
from fxcompress.passes.rewrite import rewrite
from fxcompress.peak import Timeline, timeline
from fxcompress.pipeline import Planned, plan_graph
from fxcompress.settings import make


class Gates(nn.Module):
    """Each gate's input is read before and after a product in the backward; the first is wide."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        sizes = [*zip((64, *widths[:-1]), widths, strict=True)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        self.last = nn.Linear(widths[-1], 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = y * torch.sigmoid(y)
        return self.last(x).square().mean()


def planned(*widths: int) -> tuple[Planned, Timeline]:
    torch.manual_seed(0)
    (cut,) = trace(Gates(widths), torch.randn(512, 64))
    found = plan_graph(cut.copy(), make(policy="uniform4", inner="aot_eager"))
    return found, timeline(found.cut, found.candidates, channels_last=False)


def test_the_peak_stays_and_decodes_are_saved() -> None:
    found, memory = planned(1024, 256)
    assert found.decision is not None
    choices = found.decision.choices
    apart = [replace(c, joined=False) for c in choices]
    several = [c.candidate.name for c in choices if memory.between[c.candidate.name].any()]
    assert several == [c.candidate.name for c in choices if c.joined]
    assert len(several) == 2
    assert memory.peak(choices) == memory.peak(apart)
    backward = rewrite(found.cut, choices, "", channels_last=False).backward
    target = torch.ops.fxcompress.decode.default
    made = backward.graph.find_nodes(op="call_function", target=target)
    assert len(made) == sum(c.codec_spec is not None for c in choices)


def test_where_there_is_no_room_each_cluster_decodes() -> None:
    found, memory = planned(1024, 256)
    assert found.decision is not None
    choices = [replace(c, joined=False) for c in found.decision.choices]
    first, second = (c.candidate.name for c in choices if memory.between[c.candidate.name].any())
    # The step is at its peak while the first would stay decoded.
    full = memory.total(choices).max() - memory.total(choices)
    tight = replace(memory, base=memory.base + full * (memory.between[first] > 0))
    assert [c.candidate.name for c in joined(choices, tight) if c.joined] == [second]


def test_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gradients = torch.randn(512, 64), []
    for is_joined in (True, False):
        if not is_joined:
            monkeypatch.setattr("fxcompress.planner.joined", lambda choices, memory: choices)
        torch._dynamo.reset()
        torch.manual_seed(0)
        fxcompress.manual_seed(0)
        model = Gates((256, 128))
        backend = fxcompress.backend(policy="uniform4", inner="aot_eager")
        torch.compile(model, backend=backend)(x).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
