"""mixture by property: sizes, the draw, bounds, bias and variance, awkward ranges."""

from __future__ import annotations

import math

import pytest
import torch
from codec_checks import (
    FLOATS,
    check_noise,
    check_symbolic_bytes,
    extreme,
    float_types,
    round_trip,
    shapes,
    step_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.codecs import Mixture, codec
from fxcompress.errors import CodecError

mixtures = st.builds(
    Mixture,
    st.integers(1, 127),
    st.integers(1, 127),
    st.sampled_from((0.0, 0.2, 0.3, 0.5, 1.0)),
    st.sampled_from((8, 64, 512)),
    st.sampled_from(("max", "l2")),
)


@given(mixtures)
def test_spec_round_trips(c: Mixture) -> None:
    assert codec(c.spec) == c


@pytest.mark.parametrize(
    "fields",
    ["base_levels=0", "mix_levels=128", "prob=1.1", "prob=nan", "bucket=12", "norm=l1", "bits=2"],
)
def test_bad_parameters_are_refused(fields: str) -> None:
    with pytest.raises(CodecError):
        codec(f"mixture({fields})")


def test_bytes_of_symbolic_sizes() -> None:
    check_symbolic_bytes(codec("mixture(prob=0.3)"))


@given(mixtures, shapes, float_types)
@settings(max_examples=60)
def test_bytes_and_bound(c: Mixture, shape: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    decoded = round_trip(c, x)
    numel = x.numel()
    whole, last = divmod(numel, c.bucket)
    wide = math.floor(c.prob * whole + 0.5)
    base, mix = ((2 * n).bit_length() for n in (c.base_levels, c.mix_levels))
    codes = c.bucket // 8 * (wide * mix + (whole - wide) * base) + -(-last // 8) * base
    assert c.payload_bytes(shape, dtype) == 2 * -(-numel // c.bucket) + codes
    if numel == 0:
        return
    padded = torch.nn.functional.pad(x.float().view(-1), (0, -numel % c.bucket))
    rows = padded.view(-1, c.bucket)
    scale = rows.abs().amax(1) if c.norm == "max" else rows.norm(dim=1)
    allowed = scale * (1 + 1 / 64) / min(c.base_levels, c.mix_levels)
    allowed = (allowed + scale * torch.finfo(dtype).eps).repeat_interleave(c.bucket)[:numel]
    assert bool(((decoded.float() - x.float()).abs().view(-1) <= allowed + 1e-30).all())


@pytest.mark.parametrize(
    "spec",
    [
        "mixture",
        "mixture(mix_levels=64,prob=0.3,bucket=64)",
        "mixture(base_levels=8,norm=l2,bucket=128)",
        "mixture(base_levels=127,mix_levels=1,prob=0.2,bucket=16)",
    ],
)
def test_unbiased_with_the_stated_variance(spec: str) -> None:
    torch.manual_seed(0)
    assert codec(spec).unbiased
    check_noise(codec(spec), torch.cat([torch.randn(2048), torch.rand(1100) * 0.01 + 5]))


def test_a_fixed_number_of_buckets_is_wide() -> None:
    c, draws = Mixture(2, 16, 0.3, 64), 300
    x = torch.rand(20 * 64)
    x[::64] = 1.0  # the scale of every bucket
    halves = torch.stack([round_trip(c, x, n) for n in range(draws)]).view(draws, 20, 64) * 2
    wide = (halves != halves.round()).any(2)
    assert bool((wide.sum(1) == 6).all())
    # Each bucket as often: 0.3 within 4.5 standard errors, and no draw follows another.
    error = math.sqrt(0.3 * 0.7 / draws)
    assert bool(((wide.float().mean(0) - 0.3).abs() < 4.5 * error).all())
    assert len({tuple(row) for row in wide.tolist()}) > draws * 0.9


def test_decoding_needs_the_key() -> None:
    c, x = Mixture(), torch.randn(4096)
    payload = c.encode(x, step_key(), 0)
    with pytest.raises(CodecError, match="pass the key"):
        c.decode(payload, x.shape, x.dtype, None, 0)


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_bucket_stays_alone(norm: str, dtype: torch.dtype, bad: float) -> None:
    c = Mixture(bucket=64, norm=norm)
    clean = torch.randn(1000).to(dtype)
    spoilt = clean.clone()
    spoilt[70] = bad
    expected, decoded = round_trip(c, clean), round_trip(c, spoilt)
    lost = torch.zeros(1000, dtype=torch.bool)
    lost[64:128] = True
    assert torch.equal(decoded.isnan(), lost)
    assert torch.equal(decoded[~lost], expected[~lost])
    assert torch.equal(c.error(spoilt).variance.isinf(), lost)


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_ranges(norm: str, dtype: torch.dtype) -> None:
    c = Mixture(bucket=64, norm=norm)
    for x in extreme((700,), dtype):
        decoded = round_trip(c, x)
        assert bool(decoded.isfinite().all())
        if not x.any():
            assert not decoded.any()
            assert not c.error(x).variance.any()


def test_the_largest_of_a_bucket_is_exact_where_bf16_is() -> None:
    x = torch.rand(512) * 0.9
    x[17] = -3.0
    assert float(round_trip(Mixture(), x)[17]) == -3.0
