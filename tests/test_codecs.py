"""Every codec by its face: bytes, shapes, awkward numbers, specs, stated errors; packing; bits."""

from __future__ import annotations

import math

import pytest
import torch
from codec_checks import check_noise, extreme, feature_map, round_trip, step_key
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.codecs import Affine, Bits, Codec, codec, codec_names
from fxcompress.codecs.planar import pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu

SPECS = [
    "affine(bits=1)",
    "affine(bits=4)",
    "affine(bits=8,group=64)",
    "affine(bits=3,rounding=nearest)",
    "affine(bits=4,zero=integer,group=64)",
    "affine(bits=4,zero=integer,meta=fp32)",
    "affine(bits=2,zero=symmetric,scale=max,per=sample)",
    "affine(bits=3,zero=symmetric,scale=percentile,percentile=95.0,per=channel,channels=-1)",
    "affine(bits=2,per=tensor,meta=fp32)",
    "affine(bits=2,per=channel,meta=fp16)",
    "affine(bits=4,per=plane)",
    "affine(bits=4,per=sample-group,group=24)",
    "affine(bits=4,rounding=nearest,zero=symmetric,scale=percentile,per=tensor,meta=fp32)",
    "bits(bits=3)",
    "cast(format=bf16)",
    "cast(format=bf16,rounding=stochastic)",
    "cast(format=fp16)",
    "cast(format=e4m3)",
    "cast(format=e4m3,rounding=stochastic)",
    "cast(format=e5m2,rounding=stochastic,group=0)",
    "magnitude(levels=4)",
    "magnitude(levels=16,bucket=64,norm=l2,meta=fp32)",
    "sign(scale=one)",
    "sign(scale=mean)",
    "rotate(bits=1)",
    "rotate(bits=2,group=128)",
    "rotate(bits=5,group=512)",
    "rotate(bits=3,mean=none)",
    "rotate(bits=2,scale=lsq)",
    "rotate(bits=1,group=512,scale=lsq,mean=none)",
    "dither(bits=1)",
    "dither(bits=4,group=64)",
    "dither(bits=8)",
    "subsample(rate=0.5)",
    "subsample(rate=0.25)",
    "subsample(rate=0.125)",
    "subsample(rate=0.0625)",
]
FLOAT_SPECS = [spec for spec in SPECS if codec(spec).dtypes[0].is_floating_point]
NOWHERE_FOR_NAN = {"sign(scale=one)"}
SHAPES = ((), (0,), (3, 0, 4), (1,), (7,), (1000,), (13, 300), (2, 5, 9, 7), (2, 3, 2, 5, 3))
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
bits_strategy = st.integers(1, 8)
size_strategy = st.integers(0, 3000)


def sample(c: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random tensor that the codec takes."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator)
    return x.to(dtype) if dtype.is_floating_point else (x > 0).to(dtype)


# ---- the face ----


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_and_shapes(spec: str) -> None:
    c = codec(spec)
    for dtype in c.dtypes:
        if dtype == torch.bool and spec != "bits(bits=1)":
            continue
        for shape in SHAPES:
            x = sample(c, shape, dtype)
            decoded = round_trip(c, x)  # checks bytes, shape and dtype
            stated = c.error(x)
            assert stated.variance.shape == stated.bias.shape == x.shape
            assert stated.variance.dtype == stated.bias.dtype == torch.float32
            assert bool(stated.variance.isfinite().all())
            assert bool((stated.variance >= 0).all())
            assert not c.lossless or torch.equal(decoded, x)


@pytest.mark.parametrize("spec", SPECS)
def test_specs_and_keys(spec: str) -> None:
    c = codec(spec)
    assert codec(c.spec) == c
    assert codec(str(c)) is codec(c.spec)
    x = sample(c, (300,), c.dtypes[0])
    if c.stochastic:
        with pytest.raises(CodecError, match="pass the key"):
            c.encode(x, None, 0)
    else:
        payload = c.encode(x, None, 0)
        assert torch.equal(payload, c.encode(x, step_key(5), 1))
    with pytest.raises(CodecError, match="its own shape"):
        c.decode(torch.zeros(7777, dtype=torch.uint8), [300], c.dtypes[0], step_key(), 0)
    with pytest.raises(CodecError, match="cast to one of"):
        c.encode(x.to(torch.complex64), step_key(), 0)


@pytest.mark.parametrize("spec", SPECS)
def test_memory_order_does_not_matter(spec: str) -> None:
    c = codec(spec)
    x = sample(c, (4, 6, 5, 7), c.dtypes[0])
    for strided in (x.permute(0, 2, 3, 1), x[:, ::2], x.expand(4, 6, 5, 7)[1:]):
        dense = c.encode(strided.contiguous(), step_key(), 3)
        assert torch.equal(c.encode(strided, step_key(), 3), dense)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", FLOAT_SPECS)
def test_what_is_not_finite_is_lost_with_its_group_only(spec: str, bad: float) -> None:
    c = codec(spec)
    for dtype in c.dtypes:
        x = sample(c, (4, 6, 16, 16), dtype)
        x[1, 2, 3, 4] = bad
        lost = c.error(x).variance == math.inf
        assert bool(lost[1, 2, 3, 4])
        decoded = round_trip(c, x)
        assert torch.equal(decoded.isnan(), lost) or spec in NOWHERE_FOR_NAN
        clean = x.masked_fill(lost, 0.0)
        expected = (round_trip(c, clean).float() - clean.float())[~lost].square().sum()
        found = (decoded.float() - x.float())[~lost].square().sum()
        assert found <= 1.5 * expected


@pytest.mark.parametrize("spec", FLOAT_SPECS)
def test_extreme_tensors_stay_finite(spec: str) -> None:
    c = codec(spec)
    for dtype in c.dtypes:
        for x in extreme((2, 5, 9, 7), dtype):
            decoded = round_trip(c, x)
            assert bool(decoded.isfinite().all()) or "meta=fp16" in spec
            lost = c.error(x).variance == math.inf  # or too large to be stated
            assert bool((lost | decoded.isfinite()).all())


@pytest.mark.parametrize("spec", FLOAT_SPECS)
def test_errors_are_as_stated(spec: str) -> None:
    torch.manual_seed(0)
    c, x = codec(spec), feature_map(2, 8, 8, 8)
    x[1, 2] = 0.1  # a constant, no bf16 number
    x[1, 3:] = x[1, 3:].clamp(min=0)
    stated = c.error(x)
    assert not (c.unbiased and stated.bias.any())
    if c.stochastic:
        check_noise(c, x, 300)
    else:
        assert not stated.variance.any()
        assert torch.equal(round_trip(c, x) - x, stated.bias)


def test_streams_and_steps_change_the_payload() -> None:
    x = torch.randn(1000)
    for spec in FLOAT_SPECS:
        c = codec(spec)
        if c.stochastic:
            calls = ((0, 0), (0, 1), (1, 0), (0, 0))
            first, *others, again = (c.encode(x, step_key(n), stream) for n, stream in calls)
            assert torch.equal(first, again)
            assert not any(torch.equal(first, other) for other in others)


# ---- specs ----


def test_spec_defaults_and_names() -> None:
    assert codec("affine(bits=4)").spec == "affine(bits=4)"
    assert codec("bits").spec == "bits(bits=1)"
    assert {codec(name).name for name in codec_names()} == set(codec_names())


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "gzip",
        "affine(",
        "affine(bits)",
        "affine(bits=x)",
        "affine(bits=4,bits=4)",
        "affine(level=4)",
        "bits(bits=9)",
    ],
)
def test_bad_spec_is_refused(spec: str) -> None:
    with pytest.raises(CodecError):
        codec(spec)


def test_misuse_is_refused_with_a_remedy() -> None:
    with pytest.raises(CodecError, match="cast to one of float32, bfloat16, float16"):
        Affine().encode(torch.ones(8, dtype=torch.float64), step_key(), 0)
    with pytest.raises(CodecError, match=r"use bits\(bits=1\)"):
        Bits(1, 1).encode(torch.ones(8, dtype=torch.bool), None, 0)


# ---- packing ----


@given(bits_strategy, st.integers(1, 3), st.integers(1, 70))
def test_packing_is_lossless(bits: int, rows: int, size: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, size), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, (size + 7) // 8 * bits)
    assert torch.equal(unpack(packed, bits, size), codes)


def test_packing_layout() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None]
    assert pack(codes, 4).tolist() == [[0x40, 0x51, 0x62, 0x73]]
    assert pack(codes, 3).tolist() == [[0b10_00_10_00, 0b11_01_11_01, 0b11110000]]
    assert pack(codes, 8).tolist() == [list(range(8))]


# ---- bits ----


@given(bits_strategy, size_strategy, st.sampled_from(INTEGERS), st.integers(0, 100))
def test_bits_round_trip(bits: int, size: int, dtype: torch.dtype, low: int) -> None:
    info = torch.iinfo(dtype)
    low = low - 100 if info.min < 0 else low
    high = min(low + (1 << bits), info.max + 1)
    x = torch.randint(low, high, (size,)).to(dtype)
    assert torch.equal(round_trip(Bits(bits, low), x), x)
    assert codec(Bits(bits, low).spec) == Bits(bits, low)
    assert Bits(bits, low).payload_bytes([size], dtype) == (size + 7) // 8 * bits


def test_bits_takes_booleans_and_scalars() -> None:
    for shape in ((), (0,), (3, 5, 7)):
        x = torch.rand(shape) < 0.5
        assert torch.equal(round_trip(Bits(), x), x)
        assert not Bits().error(x).variance.any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS])
def test_bits_kernel_equals_reference(dtype: torch.dtype) -> None:
    low = 0 if dtype == torch.bool else 3
    for bits in range(1, 9):
        for size in (0, 1, 7, 8, 255, 256, 257, 1000, 100003):
            c, x = Bits(bits, low), torch.randint(0, 256, (size,)).to(dtype)
            payload = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
            c.encode_reference(x, payload, None)
            assert torch.equal(c.encode(x, None, 0), payload)
            if dtype != torch.bool or bits == 1:
                decoded = torch.empty_like(x)
                c.decode_reference(payload, decoded, None)
                assert torch.equal(c.decode(payload, x.shape, dtype, None, 0), decoded)
