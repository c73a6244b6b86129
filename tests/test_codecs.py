"""Codecs by property: sizes, round trips, stated errors, kernels equal to references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs import Affine, Bits, Codec, codec, codec_names
from fxcompress.codecs.planar import pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu

SIZES = (0, 1, 7, 8, 255, 256, 257, 1000, 100003)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
bits_strategy = st.integers(1, 8)
size_strategy = st.integers(0, 3000)
group_strategy = st.sampled_from((8, 24, 256, 1000))


def step_key(counter: int = 0) -> Tensor:
    return torch.tensor([0x1234567890ABCDEF, counter])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Same bits, except that one NaN is as good as another (ATen's casts disagree on which)."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(
        a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
    )


def round_trip(c: Codec, x: Tensor, counter: int = 0) -> Tensor:
    key = step_key(counter)
    return c.decode(c.encode(x, key, 3), x.shape, x.dtype, key, 3)


def references(c: Affine, x: Tensor) -> tuple[Tensor, Tensor]:
    """(payload, decoded) of the reference, whatever kernels there are."""
    payload = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
    keys = rng.stream_keys(step_key(), 3)
    c.encode_reference(x, payload, keys)
    decoded = torch.empty_like(x)
    c.decode_reference(payload, decoded, keys)
    return payload, decoded


def awkward(size: int, dtype: torch.dtype) -> Tensor:
    """Groups of 256 of every awkward kind, in turn: values over the whole range of `dtype`."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator)
    kinds = torch.arange(size) // 256 % 10
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.where(kinds == 1, 0.1, x)  # constant, not a bf16 number
    x = torch.where(kinds == 2, -0.0, x)
    x = torch.where(kinds == 3, x * tiny / 100, x)  # denormal
    x = torch.where(kinds == 4, x * largest / 20, x)  # huge
    x = torch.where(kinds == 5, x.sign() * largest, x)  # the grid itself overflows fp32
    x = torch.where(kinds == 6, x.clamp(min=0), x)
    x = x.to(dtype)
    x[(kinds == 7) & (torch.arange(size) % 256 == 100)] = math.nan
    x[(kinds == 8) & (torch.arange(size) % 256 == 0)] = -math.inf
    x[(kinds == 9) & (torch.arange(size) % 256 == 255)] = math.inf
    return x


# ---- specs ----


@given(bits_strategy, group_strategy)
def test_spec_round_trips(bits: int, group: int) -> None:
    for c in (Affine(bits, group), Bits(bits, -group)):
        assert codec(c.spec) == c
        assert codec(str(c)) is codec(c.spec)


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
        "affine(bits=0)",
        "affine(bits=9)",
        "affine(bits=4,bits=4)",
        "affine(level=4)",
        "affine(group=12)",
        "affine(group=0)",
        "bits(bits=9)",
    ],
)
def test_bad_spec_is_refused(spec: str) -> None:
    with pytest.raises(CodecError):
        codec(spec)


def test_misuse_is_refused_with_a_remedy() -> None:
    with pytest.raises(CodecError, match="cast to one of float32, bfloat16, float16"):
        Affine().encode(torch.ones(8, dtype=torch.float64), step_key(), 0)
    with pytest.raises(CodecError, match="pass the key"):
        Affine().encode(torch.ones(8), None, 0)
    with pytest.raises(CodecError, match="its own shape"):
        Affine().decode(torch.zeros(9, dtype=torch.uint8), [100], torch.float32, None, 0)
    with pytest.raises(CodecError, match=r"use bits\(bits=1\)"):
        Bits(1, 1).encode(torch.ones(8, dtype=torch.bool), None, 0)


# ---- packing and bytes ----


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


@given(bits_strategy, size_strategy, group_strategy)
def test_payload_bytes_is_exact(bits: int, size: int, group: int) -> None:
    for c, x in ((Affine(bits, group), torch.ones(size)), (Bits(bits), torch.ones(size).int())):
        assert c.encode(x, step_key(), 0).numel() == c.payload_bytes(x.shape, x.dtype)
    codes = (size + 7) // 8 * bits
    found = Affine(bits, group).payload_bytes([size], torch.float32)
    assert found == codes + codes % 2 + 4 * -(-size // group)


# ---- affine ----


@given(bits_strategy, size_strategy, group_strategy, st.sampled_from(FLOATS), st.floats(-3, 3))
def test_round_trip_stays_within_a_step(
    bits: int, size: int, group: int, dtype: torch.dtype, scale: float
) -> None:
    c = Affine(bits, group)
    x = (torch.randn(size) * 10**scale + 10**scale).to(dtype)
    decoded = round_trip(c, x)
    padded = torch.nn.functional.pad(x.float(), (0, -size % group), value=math.nan)
    rows = padded.view(-1, group)
    low = rows.nan_to_num(math.inf).amin(1)
    high = rows.nan_to_num(-math.inf).amax(1)
    # The metadata's rounding: lo moves by 2^-7 of itself, the step by 2^-7 of itself.
    step = (high - low + low.abs() / 128) / ((1 << bits) - 1) * (1 + 1 / 64)
    allowed = step.repeat_interleave(group)[:size] + x.float().abs() * torch.finfo(dtype).eps
    slack = (decoded.float() - x.float()).abs() - allowed
    assert bool((slack <= step.repeat_interleave(group)[:size] * torch.finfo(dtype).eps).all())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_unbiased_with_the_stated_variance(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.cat([torch.randn(512), torch.rand(256) * 0.01 + 5.0, torch.full((240,), 0.1)])
    c, draws = Affine(bits), 2000
    noise = torch.stack([round_trip(c, x, n) for n in range(draws)]).double() - x.double()
    stated = c.error(x)
    assert not stated.bias.any()
    variance = stated.variance.double()
    # 4 standard errors for the mean over all elements, 5.5 for the worst of 1008 elements. The
    # fixed point truncates below 2^-22 of a step.
    floor = 2**-20 * noise.abs().max()
    error = (variance / draws).sqrt()
    assert abs(noise.mean()) < 4 * error.square().sum().sqrt() / len(x) + floor
    assert bool((noise.mean(0).abs() < 5.5 * error + floor).all())
    for part in (slice(0, 512), slice(512, 768), slice(768, None)):
        ratio = noise[:, part].square().mean() / variance[part].mean()
        assert abs(ratio - 1) < 0.05


def test_streams_and_steps_change_the_payload() -> None:
    x = torch.randn(1000)
    payloads = [Affine(2).encode(x, step_key(n), s) for n, s in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(payloads[0], payloads[3])
    assert not torch.equal(payloads[0], payloads[1])
    assert not torch.equal(payloads[0], payloads[2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_group_stays_alone(dtype: torch.dtype, bad: float) -> None:
    clean = torch.randn(1000).to(dtype)
    spoilt = clean.clone()
    spoilt[300] = bad
    expected, decoded = round_trip(Affine(4), clean), round_trip(Affine(4), spoilt)
    assert bool(decoded[256:512].isnan().all())
    keep = torch.ones(1000, dtype=torch.bool)
    keep[256:512] = False
    assert torch.equal(decoded[keep], expected[keep])
    variance = Affine(4).error(spoilt).variance
    assert bool((variance[256:512] == math.inf).all())
    assert bool(variance[keep].isfinite().all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_groups_decode_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.linspace(0.5 * largest, 0.999 * largest, 256).to(dtype)
    for counter in range(20):
        assert bool(round_trip(Affine(4), x, counter).isfinite().all())


def test_constants_are_exact_where_bf16_is() -> None:
    for value in (0.0, 1.0, -2.5):
        x = torch.full((300,), value)
        assert torch.equal(round_trip(Affine(1), x), x)
        assert not Affine(1).error(x).variance.any()


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_kernel_equals_reference(bits: int, dtype: torch.dtype) -> None:
    for size in SIZES:
        for group in (256, 1000) if size < 2000 else (256,):
            c, x = Affine(bits, group), awkward(size, dtype)
            payload, decoded = references(c, x)
            assert same_bits(c.encode(x, step_key(), 3), payload)
            assert same_numbers(c.decode(payload, x.shape, dtype, None, 3), decoded)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_reads_and_rounds_every_half_number(dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).clone()
    x = x[x.isfinite()]
    for c in (Affine(8, 8), Affine(3, 64)):
        payload, decoded = references(c, x)
        assert same_bits(c.encode(x, step_key(), 3), payload)
        assert same_numbers(c.decode(payload, x.shape, dtype, None, 3), decoded)


@needs_kernels
def test_kernel_bits_do_not_depend_on_threads() -> None:
    x, threads = torch.randn(300_000), torch.get_num_threads()
    payloads = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            payloads.append(Affine(3).encode(x, step_key(), 0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(payloads[0], payloads[1])
    assert torch.equal(payloads[0], payloads[2])


# ---- bits ----


@given(bits_strategy, size_strategy, st.sampled_from(INTEGERS), st.integers(0, 100))
def test_bits_round_trip(bits: int, size: int, dtype: torch.dtype, low: int) -> None:
    info = torch.iinfo(dtype)
    low = low - 100 if info.min < 0 else low
    high = min(low + (1 << bits), info.max + 1)
    x = torch.randint(low, high, (size,)).to(dtype)
    assert torch.equal(round_trip(Bits(bits, low), x), x)


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
        for size in SIZES:
            c, x = Bits(bits, low), torch.randint(0, 256, (size,)).to(dtype)
            payload = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
            c.encode_reference(x, payload, None)
            assert torch.equal(c.encode(x, None, 0), payload)
            if dtype != torch.bool or bits == 1:
                decoded = torch.empty_like(x)
                c.decode_reference(payload, decoded, None)
                assert torch.equal(c.decode(payload, x.shape, dtype, None, 0), decoded)
