"""Compiled graphs call the operators' functions, and who watches operators sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_checks import step_key
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxcompress
from fxcompress import direct

CODE = """# AOT ID: ['0_forward']
from ctypes import c_void_p
import torch
def call(args):
    buf1 = torch.ops.fxcompress.encode.default(buf0, buf9, 'affine(bits=4)', 3, [0, 1])
    # torch.ops.fxcompress.decode
    torch.ops.fxcompress.fence.default([buf2])
    buf3 = torch.ops.fxcompress.to_host.default(buf2, [0])
"""


class Watch(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_code_names_the_functions() -> None:
    changed = direct.call_directly(CODE)
    assert "import torch\nfrom fxcompress import direct as fxcompress_direct\n" in changed
    assert "buf1 = fxcompress_direct.encode(buf0, buf9, 'affine(bits=4)', 3, [0, 1])" in changed
    assert "fxcompress_direct.fence([buf2])" in changed
    assert "torch.ops.fxcompress.to_host.default(" in changed  # waits for copies, not for us
    plain = CODE.replace("fxcompress", "mylib")
    assert direct.call_directly(plain) == plain


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0]])
def test_a_function_gives_what_its_operator_gives(order: list[int]) -> None:
    x, key = torch.randn(6, 5, 40), step_key()
    given = (x, key, "dither(bits=4)", 3, order)
    payload = torch.ops.fxcompress.encode(*given)
    assert torch.equal(direct.encode(*given), payload)
    given = (payload, key, "dither(bits=4)", 3, [6, 5, 40], order, torch.float32)
    decoded, expected = direct.decode(*given), torch.ops.fxcompress.decode(*given)
    assert torch.equal(decoded, expected)
    assert decoded.stride() == expected.stride()


def test_a_dispatch_mode_sees_operators() -> None:
    x, key = torch.randn(300), step_key()
    with Watch() as watch:
        direct.encode(x, key, "dither(bits=4)", 3, [0])
    assert watch.seen[0] == "fxcompress.encode.default"


def test_compiled_graphs_call_functions_and_a_profiler_sees_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    for name in ("next_key", "encode", "decode"):
        function = getattr(direct, name)

        def noted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            called.append(name)
            return function(*arguments)

        monkeypatch.setattr(direct, name, noted)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    compiled = torch.compile(model, backend=fxcompress.backend(policy="uniform4"))
    x = torch.randn(128, 64)

    def step() -> list[Tensor]:
        fxcompress.manual_seed(0)
        loss = compiled(x).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    quiet = step()
    assert called[0] == "next_key"
    assert {"encode", "decode"} <= set(called)
    with torch.profiler.profile() as profile:
        profiled = step()
    assert {"fxcompress::encode", "fxcompress::decode"} <= {e.key for e in profile.key_averages()}
    assert all(map(torch.equal, profiled, quiet))
