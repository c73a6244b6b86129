"""What convolutions allocate while they run: measured once a machine, and part of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config

import fxcompress
from fxcompress import scratch, torch_private
from fxcompress.passes.analyse import analyse
from fxcompress.peak import timeline
from fxcompress.record import Recorder, Recording
from fxcompress.tools.memory import measure_step


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch_private, "cache_dir", lambda: tmp_path)
    scratch._known.cache_clear()
    yield
    scratch._known.cache_clear()


def recorded(model: nn.Module, x: Tensor) -> Recording:
    recorder = Recorder(0)
    torch._dynamo.reset()
    torch.compile(model, backend=recorder)(x).square().mean().backward()
    return recorder.recordings()[0]


def convolutions(recording: Recording) -> list[fx.Node]:
    graphs = (recording.cut.forward.graph, recording.cut.backward.graph)
    aten = torch.ops.aten
    targets = (aten.convolution.default, aten.convolution_backward.default)
    return [n for g in graphs for t in targets for n in g.find_nodes(op="call_function", target=t)]


def test_it_is_what_the_allocator_saw() -> None:
    x = torch.randn(4, 256, 2, 2).to(memory_format=torch.channels_last)
    recording = recorded(nn.Conv2d(256, 256, 3, padding=1, groups=256), x)
    forward, backward = convolutions(recording)
    for node in (forward, backward):
        arguments = [
            torch.zeros(a.meta["val"].shape).to(memory_format=torch.channels_last)
            if isinstance(a, fx.Node) and a.meta["val"].dim() == 4
            else torch.zeros(a.meta["val"].shape)
            if isinstance(a, fx.Node)
            else a
            for a in node.args
        ]
        kept: list[object] = []
        measured = measure_step(lambda n=node, a=arguments, k=kept: k.append(n.target(*a)), [])
        returned = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        own = returned.nbytes if isinstance(returned, Tensor) else 0
        found = scratch.convolution_bytes(node, channels_last=True)
        assert found == measured.peak_bytes - own
    assert found > 0


class Patches(nn.Module):
    """As a ViT has them: each image in patches, beside a token that stands for its class."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 128, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 128))
        self.places, self.mix = nn.Parameter(torch.randn(1, 17, 128)), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.cut(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.places
        return (tokens + self.mix(tokens.sin())).square().mean()


def test_it_is_what_a_step_takes() -> None:
    """The gradient of the patches is part of a larger one, and the weight is not channels-last:
    both are copied."""
    model, x = Patches(), torch.randn(16, 3, 64, 64)
    torch._dynamo.reset()
    backend = fxcompress.backend(policy="uniform4", min_bytes=0)
    compiled = torch.compile(model, backend=backend)

    def step() -> None:
        compiled(x).backward()

    with config.patch(force_disable_caches=True):
        step()
    measured = measure_step(step, model.parameters()).peak_bytes
    assert backend.plan().planned_peak_bytes == pytest.approx(measured, rel=0.01)


def test_the_plan_knows_it() -> None:
    recording = recorded(
        nn.Conv2d(256, 256, 3, padding=1, groups=256), torch.randn(4, 256, 2, 2, requires_grad=True)
    )
    _, backward = convolutions(recording)
    took = scratch.convolution_bytes(backward, channels_last=True)
    candidates = analyse(recording.cut, 0, channels_last=True)
    found = timeline(recording.cut, candidates, channels_last=True)
    assert found.base.max() >= took > 0


def test_it_is_measured_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorded(nn.Conv2d(3, 64, 16, 16), torch.randn(2, 3, 32, 32))
    first = [scratch.convolution_bytes(n, channels_last=False) for n in convolutions(recording)]
    scratch._known.cache_clear()  # another process
    monkeypatch.delattr(torch_private, "allocations")
    again = [scratch.convolution_bytes(n, channels_last=False) for n in convolutions(recording)]
    assert again == first
    assert max(first) > 0


def test_others_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    monkeypatch.setattr(scratch, "_measured", lambda *given: measured.append(given) or 1)
    recording = recorded(nn.Conv2d(32, 32, 3), torch.randn(2, 32, 8, 8))
    for node in convolutions(recording):
        assert scratch.convolution_bytes(node, channels_last=False) == 0
    assert not measured


def test_of_a_large_batch_a_part_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorded(nn.Conv2d(3, 64, 16, 16), torch.randn(8, 3, 32, 32))
    nodes = convolutions(recording)
    whole = [scratch.convolution_bytes(n, channels_last=False) for n in nodes]
    monkeypatch.setattr(scratch, "MOST", 50_000)
    for maps, node in enumerate(nodes, start=1):
        given = scratch._arguments(node, maps, channels_last=False)
        assert all(0 < like.shape[0] < 8 for like in given[:maps])
    part = [scratch.convolution_bytes(n, channels_last=False) for n in nodes]
    assert max(part) > max(whole) / 2  # it is the weight's, not the batch's
