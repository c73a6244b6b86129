"""Inductor's CUDA code of training graphs calls our operators and never waits for the GPU."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import Generated, generate
from torch import Tensor, nn

from fxcompress import choose
from fxcompress.policies import offload
from fxcompress.tools import models
from fxcompress.tools.models import Task

pytest.importorskip("triton")

# What would copy to the host, wait for it, or keep a CUDA graph from being captured.
WAITS = (".item()", ".cpu()", ".tolist()", "_local_scalar_dense", "device='cpu'", "synchronize()")


def check(generated: list[Generated]) -> None:
    forward, backward = generated
    calls = {
        name: [_calls(part, f"torch.ops.fxcompress.{name}.default(") for part in generated]
        for name in ("next_key", "encode", "decode")
    }
    assert calls["next_key"] == [1, 0]
    assert calls["encode"][0] > 0
    assert calls["encode"] == [_nodes(forward, "encode"), 0]
    assert calls["decode"] == [0, _nodes(backward, "decode")]
    assert calls["decode"][1] >= calls["encode"][0]
    assert "'cuda', index=0" in forward.code or "device(type='cuda'" in forward.code
    for part in generated:
        assert "async_compile.triton(" in part.code
        assert "async_compile.cpp" not in part.code
        for words in WAITS:
            assert words not in part.code, words


def _calls(part: Generated, text: str) -> int:
    return sum(text in line for line in part.code.splitlines() if not line.strip().startswith("#"))


def _nodes(part: Generated, name: str) -> int:
    target = getattr(torch.ops.fxcompress, name).default
    return len(part.graph.graph.find_nodes(op="call_function", target=target))


def test_small_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )
    task = Task("small", model, (torch.randn(4, 3, 20, 20),), lambda out: out.square().mean())
    check(generate(task, "uniform4"))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(128, 128, 3, padding=1, bias=False) for _ in "ab")
        self.norm, self.last = nn.BatchNorm2d(128), nn.BatchNorm2d(128)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(self.two(torch.relu(self.norm(self.one(x))))) + x)


def test_no_cpu_code_reads_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels-last tensors in host memory were laid out anew by a loop that did not wait."""
    monkeypatch.setattr(choose, "why_not_offload", lambda candidate: candidate.keep)
    monkeypatch.setattr(offload, "_is_on_host", lambda candidate: False)
    stem = (nn.Conv2d(3, 128, 7, 2, padding=3, bias=False), nn.BatchNorm2d(128), nn.ReLU())
    model = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), Residual(), Residual())
    task = Task("small", model, (torch.randn(4, 3, 32, 32),), lambda out: out.square().mean())
    forward, backward = generate(task, "offload")
    assert _calls(forward, "torch.ops.fxcompress.to_host.default(") > 5
    assert _calls(backward, "torch.ops.fxcompress.to_device.default(") > 5
    for part in (forward, backward):
        assert "async_compile.cpp" not in part.code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "batch", "size"), [("torchvision:resnet18", 8, 64), ("gpt:small", 4, 64)]
)
def test_whole_models(model: str, batch: int, size: int) -> None:
    if model.startswith("torchvision"):
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    check(generate(models.load(model, batch, size), "uniform4"))
