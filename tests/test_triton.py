"""Triton kernels without a GPU: equal to the references under Triton's interpreter, and compiled.

Triton reads TRITON_INTERPRET when a kernel is defined, so the tests that interpret are run in a
process of their own, by `test_kernels_equal_references`. To run one by hand:
TRITON_INTERPRET=1 pytest tests/test_triton.py
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from codec_checks import FLOATS, step_key
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress import rng
from fxcompress.codecs import Affine, Bits, Codec, fused, states
from fxcompress.codecs.adaptive import Adaptive
from fxcompress.codecs.average import Average
from fxcompress.codecs.cast import Cast
from fxcompress.codecs.dither import Dither
from fxcompress.codecs.frequency import Frequency
from fxcompress.codecs.magnitude import Magnitude
from fxcompress.codecs.mixture import Mixture
from fxcompress.codecs.rotate import Rotate
from fxcompress.codecs.sign import Sign
from fxcompress.codecs.subsample import Subsample
from fxcompress.codecs.transform import Transform
from fxcompress.kernels import triton as kernels
from fxcompress.kernels.prologue import Filled, Standardised

if TYPE_CHECKING:
    from fxcompress.kernels.triton.aot import Code

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETING, reason="compiles")

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The interpreter takes a tenth of a second a tile: every width once, every type at 4 bits.
WIDTHS = [(b, d) for b in range(1, 9) for d in FLOATS if b == 4 or d == FLOATS[b % 3]]
STREAM = 3


def test_kernels_equal_references() -> None:
    if INTERPRETING:
        return
    # The interpreter has one thread: in two processes, whatever the number of this one's own.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "load", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(autouse=True)
def kernels_on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take CPU tensors, casts to bf16 round to nearest even, sums keep -0: as on GPUs.

    The interpreter truncates, and starts sums from 0.
    """
    if INTERPRETING:
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter, "_convert_float", _cast)
        monkeypatch.setattr(interpreter.ReduceOps, "sum", _sum)
        monkeypatch.setattr(kernels, "takes", lambda x, group: True)


def _cast(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    numbers = torch.from_numpy(values.copy())
    if str(source) == "bf16":
        return numbers.view(torch.bfloat16).float().numpy()
    return numbers.to(torch.bfloat16).view(torch.int16).numpy().view("uint16")


def _sum(reduction: Any, tensor: Any) -> Any:
    axis = reduction.axis
    parts = np.moveaxis(tensor.handle.data, axis, 0)
    found = functools.reduce(np.add, parts)
    if reduction.keep_dims:
        found = np.expand_dims(found, axis)
    return reduction.to_tensor(found, tensor.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Same bits, except that one NaN is as good as another."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and same_bits(
        a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
    )


def awkward(size: int, dtype: torch.dtype) -> Tensor:
    """Stretches of 128 elements of every awkward kind, in turn."""
    x, kinds = torch.randn(size), torch.arange(size) // 128 % 9
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.where(kinds == 1, 0.1, x)  # constant, not a bf16 number
    x = torch.where(kinds == 2, -0.0, x)
    x = torch.where(kinds == 3, x * tiny / 100, x)  # denormal
    x = torch.where(kinds == 4, x * largest / 20, x)  # huge
    x = torch.where(kinds == 5, x.sign() * largest, x)  # a grid that overflows fp32
    x = torch.where(kinds == 6, x.clamp(min=0), x).to(dtype)
    x[(kinds == 7) & (torch.arange(size) % 128 == 100)] = math.nan
    x[(kinds == 8) & (torch.arange(size) % 128 == 0)] = -math.inf
    return x


def tile(dtype: torch.dtype) -> int:
    """Elements that a program of the fast path takes: 16 bytes of each lane a thread."""
    return 8 * 4 * 32 * 16 // dtype.itemsize


def check(c: Codec, x: Tensor) -> None:
    """The kernels give the reference's payload, and from it the reference's tensor."""
    key = step_key()
    keys = rng.stream_keys(key, STREAM)
    expected = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
    c.encode_reference(x, expected, keys)
    payload = torch.full_like(expected, 0xAB)
    assert c.encode_kernel(x, payload, key, STREAM)
    assert torch.equal(payload, expected), c
    decoded, found = torch.empty_like(x), torch.empty_like(x)
    c.decode_reference(expected, decoded, keys)
    assert c.decode_kernel(expected, found, key, STREAM)
    assert same_numbers(found, decoded), c


def reference(c: Codec, x: Tensor) -> Tensor:
    payload = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
    c.encode_reference(x, payload, rng.stream_keys(step_key(), STREAM))
    return payload


def check_masked(c: Affine | Dither | Rotate, x: Tensor) -> None:
    """A mask is written as x is read, and again read as x is written: as one after the other."""
    zeros, fill = x <= 0, torch.tensor(0.7, dtype=x.dtype)
    expected, packed = reference(c, torch.where(zeros, fill, x)), reference(Bits(1), zeros)
    payload, mask = torch.full_like(expected, 0xAB), torch.full_like(packed, 0xAB)
    assert c.encode_kernel(x, payload, step_key(), STREAM, Filled(fill, mask))
    assert torch.equal(payload, expected), c
    assert torch.equal(mask, packed), c
    decoded, found = torch.empty_like(x), torch.empty_like(x)
    c.decode_reference(payload, decoded, rng.stream_keys(step_key(), STREAM))
    assert c.decode_kernel(payload, found, step_key(), STREAM, mask)
    assert same_numbers(found, torch.where(zeros, 0, decoded)), c


def check_standardised(c: Affine | Dither | Rotate, x: Tensor, channels: int, inner: int) -> None:
    mean, rstd = torch.randn(channels), torch.rand(channels) + 0.1
    channel = torch.arange(x.numel()) // inner % channels
    expected = reference(c, (x - mean[channel]) * rstd[channel])
    payload = torch.full_like(expected, 0xAB)
    assert c.encode_kernel(x, payload, step_key(), STREAM, Standardised(mean, rstd, inner))
    assert torch.equal(payload, expected), c


@interpreted
@pytest.mark.parametrize(("bits", "dtype"), WIDTHS)
def test_affine(bits: int, dtype: torch.dtype) -> None:
    check(Affine(bits), awkward(tile(dtype) + 333, dtype))


@interpreted
@pytest.mark.parametrize(
    ("group", "size"), [(64, 8200), (8, 77), (24, 100), (1000, 2100), (256, 5), (256, 0)]
)
def test_affine_groups(group: int, size: int) -> None:
    for bits, dtype in ((3, torch.float32), (1, torch.bfloat16)):
        check(Affine(bits, group), awkward(size, dtype))
        check(Affine(bits, group, rounding="nearest"), awkward(size, dtype))


@interpreted
@pytest.mark.parametrize(("bits", "dtype"), WIDTHS[::3])
def test_dither(bits: int, dtype: torch.dtype) -> None:
    check(Dither(bits), awkward(tile(dtype) + 333, dtype))


@interpreted
@pytest.mark.parametrize(("bits", "dtype"), [case for case in WIDTHS if case[0] <= 5])
def test_rotate(bits: int, dtype: torch.dtype) -> None:
    group, scale = (256, 128, 512)[bits % 3], ("eden", "lsq")[bits % 2]
    check(Rotate(bits, group, scale), awkward(tile(dtype) + 333, dtype))


@interpreted
@pytest.mark.parametrize(
    ("c", "dtype"), zip((Affine(4), Dither(2), Rotate(3)), FLOATS, strict=True), ids=str
)
def test_fused(c: Affine | Dither | Rotate, dtype: torch.dtype) -> None:
    for x in (awkward(tile(dtype) + 333, dtype), awkward(5, dtype)):
        check_masked(c, x)
        for channels, inner in ((48, 1), (5, 77)):
            check_standardised(c, x, channels, inner)


@interpreted
@pytest.mark.parametrize(("vector", "warps", "c"), [(16, 8, Affine(3)), (8, 4, Rotate(2))], ids=str)
def test_every_configuration_gives_the_same_bits(
    vector: int, warps: int, c: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxcompress.kernels.triton import common

    monkeypatch.setattr(common, "CONFIG", common.Config(vector, warps))
    check(c, awkward(warps // 4 * tile(torch.float32) + 333, torch.float32))


@interpreted
@pytest.mark.parametrize(("size", "group"), [(0, 128), (1, 512), (130, 512), (257, 128)])
def test_rotate_tails(size: int, group: int) -> None:
    check(Rotate(3, group, mean="none"), awkward(size, torch.float32))


@interpreted
@pytest.mark.parametrize(("rate", "dtype"), [(0.5, FLOATS[1]), (0.125, FLOATS[0])])
def test_subsample(rate: float, dtype: torch.dtype) -> None:
    check(Subsample(rate), awkward(tile(dtype) + 333, dtype))
    check(Subsample(rate), awkward(1 if rate < 0.5 else 700, dtype))


@interpreted
@pytest.mark.parametrize("dtype", FLOATS)
def test_sign(dtype: torch.dtype) -> None:
    check(Sign(), awkward(777, dtype))
    check(Sign("mean", 64), awkward(tile(dtype) + 333, dtype))


@interpreted
@pytest.mark.parametrize("format", ["bf16", "fp16", "e4m3", "e5m2"])
def test_cast(format: str) -> None:
    x = awkward(tile(torch.float32) + 333, torch.float32)
    x[:1024] = torch.randn(1024) * torch.randn(1024).mul(6).exp2()  # subnormal where scaled
    check(Cast(format), x)
    check(Cast(format, "stochastic"), x)
    check(Cast(format), awkward(1200, torch.float16))


@interpreted
@pytest.mark.parametrize(("levels", "norm"), [(1, "max"), (4, "l2"), (127, "max")])
def test_magnitude(levels: int, norm: str) -> None:
    dtype = FLOATS[levels % 3]
    check(Magnitude(levels, 256, norm), awkward(tile(dtype) + 333, dtype))


@interpreted
@pytest.mark.parametrize(("beta", "dtype"), [(1, FLOATS[1]), (0.25, FLOATS[0]), (0.125, FLOATS[2])])
def test_average(beta: float, dtype: torch.dtype) -> None:
    check(Average(beta), awkward(tile(dtype) + 333, dtype))
    check(Average(beta, 24), awkward(771, dtype))


@interpreted
def test_average_of_a_group() -> None:
    check(Average(0), awkward(tile(FLOATS[1]) + 333, FLOATS[1]))
    check(Average(0, 24), awkward(771, FLOATS[0]))


@interpreted
@pytest.mark.parametrize("dtype", FLOATS)
def test_mixture(dtype: torch.dtype) -> None:
    norm = "l2" if dtype == torch.bfloat16 else "max"
    check(Mixture(4, 64, 0.3, 128, norm), awkward(2 * tile(dtype) + 333, dtype))
    check(Mixture(1, 16, 0.5, 24, norm), awkward(771, dtype))
    check(Mixture(bucket=256), awkward(100, dtype))  # only a last one


SPACES = [  # storage order, axis of channels
    ((2, 8, 16, 16), 3),  # channels-last
    ((2, 3, 16, 32), 1),
    ((3, 9, 13, 5), 3),  # ragged edges
    ((2, 3, 9, 13), 1),
    ((2, 50, 32), 2),  # tokens
    ((4, 300), 1),
    ((333,), 0),
    ((1, 2, 9, 9, 3), 4),  # positions before H and W
]


@interpreted
@pytest.mark.parametrize(("shape", "channels"), SPACES)
def test_frequency(shape: tuple[int, ...], channels: int) -> None:
    x = awkward(math.prod(shape), FLOATS[len(shape) % 3]).view(shape)
    kinds = [
        Frequency(2, 8, "bf16", channels),
        Frequency(3, 2, "8bit", channels),
        Frequency(2, 4, "bf16", channels, "stretched"),
    ]
    number = SPACES.index((shape, channels))
    for c in kinds if number < 4 else kinds[number % 3 : number % 3 + 1]:
        check(c, x)


@interpreted
@pytest.mark.parametrize(("shape", "channels"), SPACES)
def test_average_over_space(shape: tuple[int, ...], channels: int) -> None:
    x = awkward(math.prod(shape), FLOATS[len(shape) % 3]).view(shape)
    check(Average((1, 0.5, 0.25, 0.125)[len(shape) - 1 & 3], 24, "space", channels), x)


@interpreted
@pytest.mark.parametrize("shape", [(3, 1280), (5, 7, 77), (300,), (4, 1)])
def test_adaptive(shape: tuple[int, ...]) -> None:
    x = awkward(math.prod(shape), FLOATS[len(shape) % 3]).view(shape)
    check(Adaptive(2.5, 128), x)
    check(Adaptive(4, 24), x)


SHAPES = [  # storage order, axis of channels, sides of blocks, channels in a block of the basis
    ((3, 80, 64), -1, [1], 32),
    ((2, 12, 48), -1, [4], 48),
    ((2, 8, 20, 32), -1, [4, 4], 16),
    ((2, 24, 12, 10), 1, [2, 2], 12),
    ((70, 16), -1, [1], 16),
]


def transform(shape: tuple[int, ...], axis: int, sides: list[int], width: int) -> Transform:
    """Any orthonormal matrices; bands at 6 bits, at 1 bit and dropped, in turn."""
    torch.manual_seed(1)
    channels = shape[axis]
    bands = channels * math.prod(sides)
    analysis = torch.linalg.qr(torch.randn(channels // width, width, width)).Q.contiguous()
    basis = {
        "mean": torch.randn(channels),
        "sides": torch.tensor(sides),
        "running": torch.tensor([width == 16]),
        "weight": torch.rand(bands, dtype=torch.float64) + 0.1,
        "analysis": analysis,
        "synthesis": analysis.mT.contiguous(),
    }
    ranked = torch.tensor([10, 5, 0])[torch.arange(bands).remainder(3).sort().values]
    return Transform(states.put(basis), states.put({"rates": ranked.to(torch.uint8)}), axis)


@interpreted
@pytest.mark.parametrize(("shape", "axis", "sides", "width"), SHAPES)
def test_transform(
    shape: tuple[int, ...],
    axis: int,
    sides: list[int],
    width: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels of the change of basis; the coders have tests of their own.

    Coefficients and decoded tensors within the rounding of their sums, which the matrix
    products of a device add up in an order of its own; rates exactly, and so all that follows from
    equal coefficients. Bytes differ only where a coefficient lies on a threshold.
    """
    monkeypatch.setattr(kernels, "takes", lambda x, group: group == 1)
    monkeypatch.setattr(states, "_path", lambda name: tmp_path / f"state-{name}.npz")
    c, key = transform(shape, axis, sides, width), step_key()
    x = torch.randn(shape) * torch.linspace(0.5, 2, shape[-1]) + 1
    state = states.get(c.basis, x.device)
    numbers = torch.zeros((c._bands() + 1) // 2, dtype=torch.uint8)
    ours = c._in_order(x, state, c._mean(x, state), numbers)
    payload = c.encode(x, key, STREAM)
    decoded = c.decode(payload, x.shape, x.dtype, key, STREAM)

    monkeypatch.setattr(kernels, "takes", lambda x, group: False)
    expected = torch.zeros_like(numbers)
    found = c._in_order(x, state, c._mean(x, state), expected)
    assert torch.equal(numbers, expected)
    torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-5)
    reference = c.encode(x, key, STREAM)
    assert float((payload != reference).float().mean()) < 0.005
    torch.testing.assert_close(
        decoded, c.decode(payload, x.shape, x.dtype, key, STREAM), rtol=1e-4, atol=1e-4
    )


@interpreted
@pytest.mark.parametrize("dtype", INTEGERS)
def test_bits(dtype: torch.dtype) -> None:
    for bits, low in ((1, 0),) if dtype == torch.bool else ((1, 3), (3, -2), (8, 0)):
        x = torch.randint(0, 2 if low else 256, (tile(dtype) + 300,))
        check(Bits(bits, low), x.to(dtype))


@interpreted
@pytest.mark.parametrize("key", [[-1, 0], [-(1 << 63), (1 << 63) - 1], [1 << 40, 1 << 33]])
def test_keys_of_every_size(key: list[int]) -> None:
    x, c, words = torch.randn(300), Affine(2), torch.tensor(key)
    for stream in (0, 1, 16, (1 << 32) - 1):
        expected = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
        c.encode_reference(x, expected, rng.stream_keys(words, stream))
        assert torch.equal(c.encode(x, words, stream), expected)


def inspect(c: Codec, target: str, dtype: torch.dtype = torch.float32) -> list[Code]:
    """The machine code of the kernels that encode and decode whole tiles."""
    from fxcompress.kernels.triton import aot

    x = torch.empty(1 << 20, dtype=dtype, device="meta")
    key = torch.empty(2, dtype=torch.int64, device="meta")
    with kernels.recorded(aot.warp_of(target)) as launches:
        c.decode(c.encode(x, key, STREAM), x.shape, x.dtype, key, STREAM)
    return [aot.compile_for(target, launch) for launch in launches]


@compiled
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled_code_reads_and_writes_once_and_wide(target: str) -> None:
    c = Affine(2)
    encode, decode = inspect(c, target)
    groups, threads = (32, 256) if target == "gfx942" else (16, 128)  # of a program
    moved = groups * (256 * 4 + c.payload_bytes([256], torch.float32))
    assert moved <= encode.moved_bytes <= moved + 16  # the key
    assert decode.moved_bytes == moved
    assert encode.stack_bytes == decode.stack_bytes == 0
    assert encode.loads[16] * 16 * threads == groups * 256 * 4
    assert decode.stores == {16: encode.loads[16]}


@compiled
def test_launches_are_recorded_without_a_gpu() -> None:
    x, key = torch.empty(5000, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    with kernels.recorded(32) as launches:
        Affine(4).encode(x, key, STREAM)
    fast, masked = launches
    assert fast.constants["FAST"]
    assert not masked.constants["FAST"]
    assert fast.programs == masked.programs == 1
    with kernels.recorded(32) as launches:
        Affine(4).encode(torch.empty(0, device="meta"), key, STREAM)
    assert not launches
    assert not kernels.takes(torch.ones(8), 256)


@compiled
def test_one_kernel_of_transform_is_for_all_sizes() -> None:
    """Else a ResNet has a hundred, of two seconds each: only blocks, types and tails differ."""
    from fxcompress.kernels.triton import aot
    from fxcompress.tools import compiled_kernels

    found = set()
    for batch, side, channels in product((3, 64), (56, 28, 12), (64, 192, 2048)):
        x = torch.empty(batch, side, side, channels, dtype=torch.bfloat16, device="meta")
        launches = compiled_kernels.basis_launches(x, (4, 4), 32)
        found |= {(i.kernel.fn.__name__, i.warps, str(aot.specialised(i))) for i in launches}
    assert len(found) == 6  # three kernels, of whole tiles and of the rest


@compiled
def test_kernels_of_a_graph_are_built_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that is not there: they are compiled, in threads, and none is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fxcompress.kernels import ahead

    h100 = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    graph = fx.Graph()
    x, key = (graph.placeholder(name) for name in ("x", "key"))
    x.meta["val"] = torch.empty(3, 1 << 16, dtype=torch.bfloat16, device="meta")
    key.meta["val"] = torch.empty(2, dtype=torch.int64, device="meta")
    coded = graph.call_function(
        torch.ops.fxcompress.encode.default, (x, key, "affine(bits=7)", 3, [0, 1])
    )
    coded.meta["val"] = torch.empty(1, dtype=torch.uint8, device="meta")
    graph.output(coded)
    module = fx.GraphModule(torch.nn.Module(), graph)
    ahead.build_for([module])
    assert not kernels._under_way  # it is on no GPU
    monkeypatch.setattr(ahead, "_is_on_gpu", lambda node: True)
    monkeypatch.setattr(driver, "_active", h100)
    with FakeTensorMode():  # as a partitioner runs
        ahead.build_for([module])
    (built,) = kernels._under_way
    kernels._await_builds()
    assert built.kernel.asm["cubin"]
    assert not kernels._under_way


@compiled
@pytest.mark.parametrize("c", [Affine(4), Dither(4)], ids=str)
def test_masks_of_short_groups_are_read_packed(c: Affine | Dither) -> None:
    """Bit by bit, with a division for each element, LLVM mixed lanes up: wrong codes on an H200."""
    from fxcompress.kernels.triton import aot

    shape, key = (240,), torch.empty(2, dtype=torch.int64, device="meta")
    sizes = c.payload_bytes(shape, torch.float32), Bits(1).payload_bytes(shape, torch.bool)
    parts = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    with kernels.recorded(32) as launches:
        fused.decode_filled(c, *parts, shape, torch.float32, key, STREAM)
    (tail,) = launches
    assert tail.constants["MASKED"]
    assert not aot.compile_for("sm_90", tail).instructions["MUFU"]  # of a division


VIEWS = {"detach", "new_empty", "empty", "slice", "view"}


class Operators(TorchDispatchMode):
    """The ATen operators called that are no views, and what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name not in VIEWS:
            self.names.add(name)
            self.results += [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor)]
        return result


KERNELS = (Affine(4), Dither(4), Rotate(2), Subsample(0.5), Average(0.5), Magnitude(4))
PLAIN = (Sign("mean"), Cast("e4m3"), Cast("e4m3", "stochastic"))


@compiled
@pytest.mark.parametrize("c", [*KERNELS, *PLAIN], ids=str)
def test_nothing_but_views_and_launches(c: Codec) -> None:
    # So that no step waits for the GPU, and a CUDA graph holds all of it.
    x, key = torch.empty(5000, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    with kernels.recorded(32) as launches, Operators() as called:
        c.decode(c.encode(x, key, STREAM), x.shape, x.dtype, key, STREAM)
    assert not called.names
    assert launches
    assert all(a.device == x.device for a in launches[0].arguments if isinstance(a, Tensor))


SORTING = (Mixture(), Adaptive(2.5), Frequency(2), Frequency(2, low="8bit"))


@compiled
@pytest.mark.parametrize("c", [*SORTING, Average(0.5, along="space")], ids=str)
def test_only_launches_touch_the_tensor(c: Codec) -> None:
    x = torch.empty(4, 8, 16, 32, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, dtype=torch.int64, device="meta")
    with kernels.recorded(32) as launches, Operators() as called:
        c.decode(c.encode(x, key, STREAM), x.shape, x.dtype, key, STREAM)
    assert len(launches) >= 2
    assert not called.names & {"_local_scalar_dense", "nonzero", "lift_fresh"}  # waits
    assert max((r.numel() for r in called.results), default=0) < x.numel() // 2


@compiled
def test_transform_brings_its_constants_to_the_device_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_path", lambda name: tmp_path / f"state-{name}.npz")
    c = transform((2, 16, 16, 16), -1, [4, 4], 16)
    x = torch.empty(2, 16, 16, 16, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, dtype=torch.int64, device="meta")
    seen = []
    for _ in range(2):
        with kernels.recorded(32) as launches, Operators() as called:
            c.decode(c.encode(x, key, STREAM), x.shape, x.dtype, key, STREAM)
        assert len(launches) >= 3 + 2 * 2  # of the basis, and of two coders
        # A copy to the device lifts a tensor of the host's; `_to_copy` alone only changes a dtype.
        seen.append(called.names & {"lift_fresh", "_local_scalar_dense", "nonzero"})
    assert seen == [{"lift_fresh"}, set()]


@pytest.mark.slow
@compiled
def test_no_kernel_spills_or_reads_narrowly() -> None:
    from fxcompress.tools import compiled_kernels

    rows = list(compiled_kernels.compiled())
    assert {row.target for row in rows} == set(compiled_kernels.TARGETS)
    for row in rows:
        assert row.spills == 0, row
        assert row.tensor_access_bytes == 16, row
        # What elements look up, a few bytes each, is counted for each; caches serve it.
        looks_up = row.kernel.startswith(("frequency", "adaptive", "average(beta=0.5,along=space"))
        looks_up |= "in units" in row.kernel
        assert 0.99 <= row.bytes_ratio < (5 if looks_up else 1.02), row
