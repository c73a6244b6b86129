"""affine: bounds on each grid, what is exact, kernels equal to the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from codec_checks import (
    FLOATS,
    awkward,
    float_types,
    references,
    round_trip,
    same_bits,
    same_numbers,
    shapes,
    step_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grid import groups, scale_ids

from fxcompress.codecs import Affine, Magnitude, codec, sharing
from fxcompress.codecs.payload import carve
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu

SIZES = (0, 1, 7, 8, 255, 256, 257, 1000, 100003)
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
affines = st.builds(
    Affine,
    st.integers(1, 8),
    groups,
    st.sampled_from(("stochastic", "nearest")),
    st.sampled_from(("minimum", "integer")),
    per=st.sampled_from(sharing.PER),
    channels=st.integers(-2, 2),
    meta=st.sampled_from(("bf16", "fp16", "fp32")),
)
symmetric = st.builds(
    replace,
    affines,
    bits=st.integers(2, 8),
    zero=st.just("symmetric"),
    scale=st.sampled_from(("max", "percentile")),
    percentile=st.sampled_from((50.0, 99.0, 99.999, 100.0)),
)


# ---- values ----


@given(st.one_of(affines, symmetric), shapes, float_types, st.floats(-3, 3))
@settings(max_examples=100)
def test_values_lie_on_the_grid_of_their_scale(
    c: Affine, shape: list[int], dtype: torch.dtype, size: float
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 10**size + 10**size).to(dtype)
    decoded = round_trip(c, x).double().view(-1)
    assert codec(c.spec) == c
    if not x.numel():
        return
    exact, ids = x.double().view(-1), scale_ids(c.per, shape, c.group, c.channels)
    count = int(ids.max()) + 1
    low, high = (
        torch.full((count,), sign * math.inf).double().scatter_reduce_(0, ids, exact, reduction)
        for sign, reduction in ((1, "amin"), (-1, "amax"))
    )
    eps = {"bf16": 2**-7, "fp16": 2**-10, "fp32": 2**-14}[c.meta]
    tiny = 2.0**-23 if c.meta == "fp16" else 0.0
    largest, half = torch.maximum(low.abs(), high.abs()), 1 << (c.bits - 1)
    if c.zero == "minimum":
        step = (high - low + low.abs() * eps) / (2 * half - 1)
    elif c.zero == "integer":
        step = torch.maximum((high - low) / (2 * half - 1), largest / 32767)
    else:
        step = largest / (half - 1 if c.scale == "max" else half)
    step = (step * (1 + 2 * eps) + tiny)[ids]
    # Rounding to nearest halves the bound, and rounding zero to an integer costs half a step.
    part = (0.5 if c.rounding == "nearest" else 1.0) + (0.5 if c.zero == "integer" else 0.0)
    stored = (exact.abs() + step) * torch.finfo(dtype).eps
    allowed = part * step + stored
    error = (decoded - exact).abs()
    if c.scale == "percentile":
        # What clips comes back smaller, but never with another sign or further out.
        allowed = allowed + exact.abs()
        assert bool((decoded.abs() <= exact.abs() + step * 1.01 + stored).all())
    assert bool((error <= allowed * 1.001).all())


@given(symmetric | affines.map(lambda c: replace(c, zero="integer")), shapes)
@settings(max_examples=40)
def test_zeros_stay_zeros(c: Affine, shape: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.where(torch.rand(shape) < 0.5, 0.0, torch.randn(shape))
    for found in (c, Magnitude(5), Magnitude(5, norm="l2")):
        assert not round_trip(found, x)[x == 0].any()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_deterministic_baseline_is_that_of_brevitas(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(300_000)  # so that three values lie beyond the percentile
    fields = "rounding=nearest,zero=symmetric,scale=percentile,per=tensor,meta=fp32"
    c = codec(f"affine(bits={bits},{fields})")
    k = math.floor(0.01 * 99.999 * x.numel() + 0.5)
    half = 1 << (bits - 1)
    scale = x.abs().kthvalue(k).values / half
    expected = (x / scale).round().clamp(-half, half - 1)
    decoded = round_trip(c, x)
    differ = decoded != expected * scale
    ties = ((x / scale).frac().abs() - 0.5).abs() < 1e-5  # they round up, in fixed point
    assert not (differ & ~ties).any()
    assert not c.unbiased
    assert c.payload_bytes(x.shape, x.dtype) == len(x) // 8 * bits + 4


def test_integer_zeros_far_from_the_origin() -> None:
    for offset, spread in ((1000.0, 0.01), (-3e4, 1.0), (1e30, 1e20), (5.0, 0.0), (-1e-30, 0.0)):
        x = offset + spread * torch.rand(256)
        c = Affine(8, zero="integer")
        decoded = round_trip(c, x)
        step = max(float(x.max() - x.min()) / 255, abs(offset) / 32767, 2**-100) * (1 + 2**-7)
        assert bool(((decoded - x).abs() <= 1.5 * step).all())


def test_fp16_metadata_loses_what_it_cannot_hold() -> None:
    x = torch.cat([torch.randn(256), torch.randn(256) * 1e9, torch.randn(256)])
    decoded = round_trip(Affine(4, meta="fp16"), x).view(3, 256)
    assert decoded.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "spec",
    [
        "affine(bits=0)",
        "affine(bits=9)",
        "affine(group=12)",
        "affine(group=0)",
        "affine(rounding=up)",
        "affine(zero=middle)",
        "affine(per=row)",
        "affine(meta=fp8)",
        "affine(scale=max)",
        "affine(zero=integer,scale=percentile)",
        "affine(zero=symmetric)",
        "affine(bits=1,zero=symmetric,scale=max)",
        "affine(zero=symmetric,scale=percentile,percentile=0.0)",
        "affine(zero=symmetric,scale=percentile,percentile=nan)",
        "affine(zero=symmetric,scale=percentile,percentile=101.0)",
        "magnitude(levels=0)",
        "magnitude(levels=128)",
        "magnitude(bucket=12)",
        "magnitude(norm=l1)",
        "magnitude(meta=int8)",
    ],
)
def test_bad_parameters_are_refused(spec: str) -> None:
    with pytest.raises(CodecError):
        codec(spec)


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(CodecError, match=r"use magnitude\(norm=l2\)"):
        codec("affine(zero=symmetric,scale=l2)")
    with pytest.raises(CodecError, match="goes with scale=max or scale=percentile"):
        codec("affine(zero=symmetric)")


# ---- the default ----


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


def test_constants_are_exact_where_bf16_is() -> None:
    for value in (0.0, 1.0, -2.5):
        x = torch.full((300,), value)
        assert torch.equal(round_trip(Affine(1), x), x)
        assert not Affine(1).error(x).variance.any()


def test_payload_of_the_default() -> None:
    x = torch.tensor([0.0] * 8 + [15.0] * 8)
    sections = ((torch.uint8, 8), (torch.bfloat16, 2), (torch.bfloat16, 2))
    found = carve(Affine(4, 8).encode(x, step_key(), 0), *sections)
    assert [section.tolist() for section in found] == [[0] * 8, [0.0, 0.0], [0.0, 15.0]]
    assert Affine(4).encode(x, step_key(), 0)[:8].tolist() == [0xF0] * 8


# ---- kernels ----


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
