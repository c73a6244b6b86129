"""Inductor's CUDA code of training graphs calls our operators and never waits for the GPU."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import Generated, generate
from torch import nn

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "batch", "size"), [("torchvision:resnet18", 8, 64), ("gpt:small", 4, 64)]
)
def test_whole_models(model: str, batch: int, size: int) -> None:
    if model.startswith("torchvision"):
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    check(generate(models.load(model, batch, size), "uniform4"))
