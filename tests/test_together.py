"""Inductor's C++ kernels of our graphs, compiled in few files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import together, torch_private
from fxcompress.kernels import cpu
from fxcompress.together import Kernel, combined, in_files

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


def kernel(statement: str, extra: str = "") -> Kernel:
    head = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
    text = f'{head}{extra}extern "C"  void  kernel(const float* in, float* out, const int64_t n)'
    loop = f"for (int64_t i = 0; i < n; i++) {statement}"
    return Kernel(("const float*", "float*", "const int64_t"), f"{text}\n{{\n{loop}\n}}\n")


def test_each_kernel_is_called_by_its_number() -> None:
    """And helpers of one name do not meet."""
    helper = "static float changed(float x) {{ return {}; }}\n"
    kernels = [
        kernel("out[i] = changed(in[i]);", helper.format("x + 1")),
        kernel("out[i] = changed(in[i]);", helper.format("x * 3")),
    ]
    call = torch_private.start_cpp(*combined(kernels), None)()
    x, y = torch.arange(4.0), torch.zeros(4)
    for number, expected in enumerate((x + 1, x * 3)):
        call(number, (x, y, 4))
        assert torch.equal(y, expected)


def test_files_are_about_equally_long_and_always_the_same() -> None:
    kernels = [kernel("out[i] = " + " + ".join(["in[i]"] * (n % 7 + 1)) + ";") for n in range(7)]
    files = in_files(kernels, 3)
    lengths = [sum(len(k.source) for k in file) for file in files]
    assert max(lengths) - min(lengths) <= max(len(k.source) for k in kernels)
    assert sorted(k.source for file in files for k in file) == sorted(k.source for k in kernels)
    assert in_files(kernels[::-1], 3) == files  # their names on disk follow from the content
    assert len(in_files(kernels[:2], 8)) == 2
    many = [kernel(f"out[i] = {n} * in[i];") for n in range(2 * together.MOST + 1)]
    assert [len(file) for file in in_files(many, 2)] == [33, 32, 32]


def gradients(model: nn.Module, x: Tensor, backend: Any) -> list[Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    loss = torch.compile(model, backend=backend)(x).square().mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(2)]
    return nn.Sequential(*layers, nn.Linear(64, 8), nn.Softmax(-1))


def test_a_graph_is_compiled_in_few_files(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, files, asked = torch.randn(256, 64), [], []
    start: Callable[..., Any] = torch_private.start_cpp
    compiled = together.Together._compiled

    def started(*given: Any) -> Any:
        files.append(given)
        return start(*given)

    def counted(self: Any, kernels: list[Kernel]) -> Any:
        asked.append(len(kernels))
        return compiled(self, kernels)

    monkeypatch.setattr(torch_private, "start_cpp", started)
    monkeypatch.setattr(torch_private, "compile_threads", lambda: 2)
    monkeypatch.setattr(together.Together, "_compiled", counted)
    with torch_private.fresh_compile_caches():
        found = gradients(model, x, fxcompress.backend(policy="lossless"))
        assert len(asked) == 2  # forward and backward
        assert sum(asked) > len(files) == sum(min(n, 2) for n in asked)
        exact = gradients(model, x, "inductor")
        assert len(asked) == 2  # plain Inductor is left alone
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_compile_together_is_compiled_alone(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(together, "combined", lambda kernels: ("#error no", "Py_RETURN_NONE;"))
    x = torch.randn(256, 64)
    with torch_private.fresh_compile_caches(), caplog.at_level(logging.WARNING, "fxcompress"):
        found = gradients(model, x, fxcompress.backend(policy="uniform8"))
    assert any("one by one" in record.getMessage() for record in caplog.records)
    assert all(bool(g.isfinite().all()) for g in found)


def test_one_thread(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    x = torch.randn(256, 64)
    with config.patch(compile_threads=1), torch_private.fresh_compile_caches():
        found = gradients(model, x, fxcompress.backend(policy="lossless"))
    for a, b in zip(found, gradients(model, x, "eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
