"""The operators fxcompress::encode, decode and next_key: layouts, opcheck, torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxcompress.ops
from fxcompress import rng
from fxcompress.codecs import Affine

CPU = torch.device("cpu")
KEY = torch.tensor([0x1234567890ABCDEF, 0])


@pytest.mark.parametrize("spec", ["affine(bits=4)", "affine(bits=3,group=64)"])
def test_channels_last_is_read_in_place(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, key, order = torch.ops.fxcompress, KEY, [0, 2, 3, 1]
    x = torch.randn(2, 5, 6, 7).to(memory_format=torch.channels_last)
    stored = x.permute(order).contiguous()
    payload = ops.encode(x, key, spec, 0, order)
    assert torch.equal(payload, ops.encode(stored, key, spec, 0, [0, 1, 2, 3]))
    assert torch.equal(payload, ops.encode(x.contiguous(), key, spec, 0, order))
    decoded = ops.decode(payload, key, spec, 0, x.shape, order, x.dtype)
    assert decoded.stride() == x.stride()
    assert (decoded - x).abs().max() < 2.0
    read: list[int] = []

    def spy(codec: Affine, x: Tensor, key: Tensor | None, stream: int) -> Tensor:
        read.append(x.data_ptr())
        return payload

    monkeypatch.setattr(Affine, "encode", spy)
    ops.encode(x, key, spec, 0, order)
    assert read == [x.data_ptr()]


@settings(max_examples=30)
@given(st.permutations(range(4)), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_any_order_keeps_the_logical_tensor(order: list[int], shape: list[int]) -> None:
    ops = torch.ops.fxcompress
    x = torch.randint(0, 4, shape)
    payload = ops.encode(x, None, "bits(bits=2)", 0, order)
    decoded = ops.decode(payload, None, "bits(bits=2)", 0, shape, order, x.dtype)
    assert torch.equal(decoded, x)
    assert decoded.permute(order).is_contiguous()


def test_opcheck() -> None:
    ops, key = torch.ops.fxcompress, KEY
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for spec, sample in (("affine(bits=4)", x), ("bits(bits=1)", x > 0)):
        order = [0, 2, 3, 1]
        payload = ops.encode(sample, key, spec, 1, order)
        torch.library.opcheck(ops.encode.default, (sample, key, spec, 1, order))
        arguments = (payload, key, spec, 1, list(x.shape), order, sample.dtype)
        torch.library.opcheck(ops.decode.default, arguments)
        torch.library.opcheck(ops.to_host.default, (sample, order))
        torch.library.opcheck(ops.to_device.default, (payload, CPU, [-1], [0]))
    host = ops.to_host(x, order)
    torch.library.opcheck(ops.to_device.default, (host, CPU, list(x.shape), order))
    scale = torch.rand(1, 3, 1, 1)
    for spec in ("affine(bits=4)", "dither(bits=2)", "rotate(bits=2)", "cast(format=bf16)"):
        filling = (x, x.mean(), key, spec, 1, order)
        torch.library.opcheck(ops.encode_filled.default, filling)
        torch.library.opcheck(
            ops.encode_standardised.default, (x.bfloat16(), scale, scale, key, spec, 1, order)
        )
        arguments = (*ops.encode_filled(*filling), key, spec, 1, list(x.shape), order, x.dtype)
        torch.library.opcheck(ops.decode_filled.default, arguments)
    torch.library.opcheck(ops.fence.default, ([x, x + 1],))
    # Of next_key, all but what compares two calls: they differ.
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.next_key.default, ("", CPU), test_utils=names)


def test_every_operator_is_checked() -> None:
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fxcompress::")
    }
    assert names == {
        *("encode", "encode_filled", "encode_standardised", "decode", "decode_filled"),
        *("next_key", "to_host", "to_device", "region", "fence"),
    }


def test_host_round_trip_is_exact() -> None:
    ops, payload = torch.ops.fxcompress, torch.randint(0, 256, (1001,), dtype=torch.uint8)
    host = ops.to_host(payload, [0])
    back = ops.to_device(host, CPU, [-1], [0])
    assert torch.equal(back, payload)
    assert len({t.data_ptr() for t in (payload, host, back)}) == 3  # copies, never aliases


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_ops_compile(backend: str, dynamic: bool) -> None:
    ops, order, spec = torch.ops.fxcompress, [0, 2, 3, 1], "affine(bits=4)"

    def step(x: Tensor) -> tuple[Tensor, ...]:
        key, unused = ops.next_key("", x.device), ops.next_key("", x.device)
        y = x.relu()
        payload = ops.encode(y, key, spec, 0, order)
        mask = ops.encode(y <= 0, key, "bits(bits=1)", 1, order)
        decoded = ops.decode(payload, key, spec, 0, y.shape, order, y.dtype)
        mean = y.amax((0, 2, 3), keepdim=True)
        units = ops.encode_standardised(y, mean, mean + 1, key, spec, 2, order)
        both = ops.encode_filled(y, y.amax(), key, spec, 3, order)
        zeroed = ops.decode_filled(*both, key, spec, 3, y.shape, order, y.dtype)
        return payload, mask, decoded, unused, units, *both, zeroed

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    for size in (6, 6, 8) if dynamic else (6, 6):
        x = torch.randn(2, 3, size, 6).to(memory_format=torch.channels_last)
        rng.manual_seed(size)
        expected = step(x)
        rng.manual_seed(size)
        found = compiled(x)
        assert all(map(torch.equal, found, expected))
        assert found[2].stride() == found[7].stride() == x.stride()
        assert torch.equal(found[1], found[6])
        assert found[3][1] == 1  # the second key of the step: neither merged nor folded
        assert compiled(x)[3][1] == 3
    rng.manual_seed(None)


def test_step_hook_sees_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(fxcompress.ops, "on_step", [seen.append])
    torch.ops.fxcompress.next_key("plan-7", CPU)
    assert seen == ["plan-7"]
