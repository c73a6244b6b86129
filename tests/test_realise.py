"""Sums along a residual stream are written where they stand, so that what they add up can die."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_graphs import calls
from torch import Tensor, nn
from torch._inductor import config

import fxcompress
from fxcompress import pipeline
from fxcompress.passes.realise import outliving, realise_sums
from fxcompress.record import Recorder, gradients
from fxcompress.tools import memory

DEPTH, ROWS, WIDTH = 6, 512, 64


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x.square().mean()


class Dense(nn.Module):
    """Each layer reads all before it, as in a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH * max(i, 1), WIDTH) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        found = [torch.tanh(self.layers[0](x))]
        for layer in self.layers[1:]:
            found.append(torch.tanh(layer(torch.sin(torch.cat(found, 1)))))
        return torch.cat(found, 1).square().mean()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_sums_are_in_memory_where_they_stand() -> None:
    recorder = Recorder(0)
    torch.compile(Stream(), backend=recorder)(torch.randn(ROWS, WIDTH)).backward()
    (recording,) = recorder.recordings()
    cut = recording.cut.copy()
    realise_sums(cut)
    fences = calls(cut.forward, "fxcompress::fence")
    assert len(fences) == DEPTH - 2  # not the first, whose other input lives on, nor the last
    for fence in fences:
        ((source,),) = fence.args
        assert all(source < fence < reader for reader in source.users if reader is not fence)
    assert not calls(cut.backward, "fxcompress::fence")  # whose sums products read
    for mine, exact in zip(
        gradients(recording, cut), gradients(recording, recording.cut), strict=True
    ):
        assert torch.equal(mine, exact)


def test_nothing_is_written_that_frees_no_more() -> None:
    def step(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.sin(x @ weight)  # in the place of one product, another tensor as large
        return (x @ weight.t()) * y + (x.cos() @ weight) * y

    recorder = Recorder(0)
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)
    torch.compile(step, backend=recorder)(x, weight).sum().backward()
    (recording,) = recorder.recordings()
    assert not outliving(recording.cut.forward.graph, set())


@pytest.mark.parametrize("make", [Stream, Dense])
def test_less_is_alive(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without these sums in memory several products are held for one, and decodes wait."""
    model, x = make(), torch.randn(8 * ROWS, WIDTH)

    def peak() -> tuple[int, int]:
        torch._dynamo.reset()
        backend = fxcompress.backend(policy="uniform2", min_bytes=0)
        compiled = torch.compile(model, backend=backend)

        def step() -> None:
            compiled(x).backward()

        with config.patch(force_disable_caches=True):
            step()
        measured = memory.measure_step(step, model.parameters()).peak_bytes
        return measured, backend.plan().planned_peak_bytes

    found, planned = peak()
    assert found < planned + x.nbytes
    monkeypatch.setattr(pipeline, "realise_sums", lambda cut: None)
    assert found < peak()[0] - x.nbytes
