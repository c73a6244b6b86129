"""rotate, dither, subsample by property: sizes, distortion, bias, kernels equal to references."""

from __future__ import annotations

import math

import pytest
import torch
from codec_checks import (
    FLOATS,
    awkward,
    check_kernel,
    check_noise,
    check_symbolic_bytes,
    float_types,
    round_trip,
    shapes,
    step_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.codecs import Affine, Codec, codec, levels
from fxcompress.codecs.dither import Dither
from fxcompress.codecs.rotate import Rotate, hadamard
from fxcompress.codecs.subsample import Subsample
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu

RATES = (0.5, 0.25, 0.125, 0.0625)
SIZES = (0, 1, 7, 31, 32, 33, 127, 129, 255, 256, 257, 513, 1000, 4097, 100003)
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
group_sizes = st.sampled_from((128, 256, 512))
rotates = st.builds(
    Rotate,
    st.integers(1, 5),
    group_sizes,
    st.sampled_from(("eden", "lsq")),
    st.sampled_from(("group", "none")),
)
dithers = st.builds(Dither, st.integers(1, 8), st.sampled_from((8, 64, 256, 1000)))
subsamples = st.builds(Subsample, st.sampled_from(RATES))
codecs = st.one_of(rotates, dithers, subsamples)


def relative_error(c: Codec, x: Tensor, draws: int = 4) -> float:
    """Measured squared error over squared deviation, mean over keys."""
    errors = [float((round_trip(c, x, n) - x).square().mean()) for n in range(draws)]
    return sum(errors) / draws / float(x.var())


# ---- all three ----


@given(codecs)
def test_spec_round_trips(c: Codec) -> None:
    assert codec(c.spec) == c
    assert c.unbiased == ("lsq" not in c.spec)


@pytest.mark.parametrize(
    "spec",
    [
        *("rotate(bits=0)", "rotate(bits=6)", "rotate(group=64)", "rotate(scale=l2)"),
        *("rotate(mean=tensor)", "dither(bits=9)", "dither(group=12)"),
        *("subsample(rate=1.0)", "subsample(rate=0.3)"),
    ],
)
def test_bad_parameters_are_refused(spec: str) -> None:
    with pytest.raises(CodecError):
        codec(spec)


@pytest.mark.parametrize(
    "spec",
    ["rotate(bits=3,group=128)", "rotate(bits=2,group=512,mean=none)", "dither", "subsample"],
)
def test_bytes_of_symbolic_sizes(spec: str) -> None:
    check_symbolic_bytes(codec(spec))


@given(codecs, shapes, float_types)
@settings(max_examples=100)
def test_any_shape_survives(c: Codec, shape: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    decoded, stated = round_trip(c, x), c.error(x)
    assert bool(stated.variance.isfinite().all())
    if x.numel():
        # No error is beyond 8 standard deviations (a group's error is one vector: its norm).
        bound = 64 * (stated.variance.sum() + stated.bias.square().sum())
        slack = x.float().square().sum() / 2**10
        assert float((decoded.float() - x.float()).square().sum()) <= float(bound + slack)


@given(codecs, st.floats(-5, 5), float_types, st.integers(1, 700))
@settings(max_examples=60)
def test_constants_survive(c: Codec, value: float, dtype: torch.dtype, size: int) -> None:
    x = torch.full((size,), value).to(torch.bfloat16).to(dtype)
    decoded = round_trip(c, x)
    if "mean=none" in c.spec:
        assert bool(decoded.isfinite().all())
    else:
        # The mean of equal bf16 numbers is one, unless 2^-16 of the group's largest cuts it off.
        assert torch.allclose(decoded, x, rtol=2**-8, atol=1e-30)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "spec",
    [
        *(f"rotate(bits={bits},group={g})" for bits in range(1, 6) for g in (128, 256, 512)),
        *(f"rotate(bits={bits},scale=lsq,mean=none)" for bits in range(1, 6)),
        *(f"dither(bits={bits},group={g})" for bits in range(1, 9) for g in (24, 256)),
        *(f"subsample(rate={rate})" for rate in RATES),
    ],
)
def test_kernels_equal_references(spec: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        if size < 5000 or spec in ("rotate(bits=2,group=256)", "subsample(rate=0.25)"):
            check_kernel(codec(spec), awkward(size, dtype))


@pytest.mark.parametrize("spec", ["rotate", "dither", "subsample"])
def test_decoding_needs_the_key(spec: str) -> None:
    c, x = codec(spec), torch.randn(1000)
    payload = c.encode(x, step_key(), 0)
    with pytest.raises(CodecError, match="was encoded with"):
        c.decode(payload, x.shape, x.dtype, None, 0)


# ---- rotate ----


@given(rotates, st.integers(0, 3000))
def test_rotate_bytes_are_the_formula(c: Rotate, size: int) -> None:
    whole, tail = divmod(size, c.group)
    last = max(32, 2 ** math.ceil(math.log2(tail))) if tail else 0
    metadata = (4 if c.mean == "group" else 2) * math.ceil(size / c.group)
    expected = (whole * c.group + last) // 8 * c.bits + metadata
    assert c.payload_bytes([size], torch.float32) == expected


@pytest.mark.parametrize("group", [128, 256, 512])
@pytest.mark.parametrize(
    ("scale", "mean", "limit"),
    [
        ("eden", "none", 0.135),
        ("lsq", "none", 0.118),
        ("eden", "group", 0.135),
        ("lsq", "group", 0.118),
    ],
)
def test_two_bits_on_normal_data(group: int, scale: str, mean: str, limit: float) -> None:
    torch.manual_seed(0)
    assert relative_error(Rotate(2, group, scale, mean), torch.randn(1 << 19)) <= limit


@pytest.mark.parametrize("bits", range(1, 6))
def test_error_does_not_depend_on_the_distribution(bits: int) -> None:
    torch.manual_seed(0)
    normal = torch.randn(1 << 17)
    theory = 1 / (1 - levels.levels(bits).distortion) - 1
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((1 << 17,))
    for x in (normal, laplace, normal.clamp(min=0), (normal > 2).float(), normal.exp()):
        rows = x.view(-1, 256)
        stated = float((rows - rows.mean(1, keepdim=True)).square().mean())
        measured = relative_error(Rotate(bits), x, 2) * float(x.var())
        assert measured == pytest.approx(theory * stated, rel=0.04)


@pytest.mark.parametrize("spikes", [1, 2, 3])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unbiased_on_single_large_elements(bits: int, spikes: int) -> None:
    # One rotation turns these into a few values next to thresholds: 9 % of squared bias.
    x = torch.zeros(64, 256)
    x[:, 10 : 10 + spikes] = torch.tensor([1.0, -0.7, 0.4])[:spikes]
    check_noise(Rotate(bits, mean="none"), x, 400)


@pytest.mark.parametrize("spec", ["rotate(bits=1)", "rotate(bits=3)", "subsample(rate=0.5)"])
@pytest.mark.parametrize("size", [32, 40, 100, 129, 300])
def test_unbiased_in_short_groups(size: int, spec: str) -> None:
    torch.manual_seed(size)
    # Few coordinates have fewer far ones than a normal: 13 % less error in 32 than is stated.
    check_noise(codec(spec), torch.randn(size) + 0.5, 2000, within=0.05 + 3 / size)


def test_hadamard_is_its_own_inverse() -> None:
    y = torch.randint(-1000, 1000, (3, 128), dtype=torch.int32)
    assert torch.equal(hadamard(hadamard(y)), 128 * y)
    assert torch.equal(
        hadamard(torch.eye(2, dtype=torch.int32)).long(), torch.tensor([[1, 1], [1, -1]])
    )


def test_level_tables_are_lloyd_max() -> None:
    # Max (1960), table I: distortion of 2, 4, 8, 16 and 32 levels of the unit normal.
    for bits, known in zip(range(1, 6), (0.3634, 0.1175, 0.03454, 0.009497, 0.002499), strict=True):
        found = levels.levels(bits)
        assert found.distortion == pytest.approx(known, rel=0.015)
        assert len(found.levels) == len(found.thresholds) + 1 == 2 ** (bits - 1)


# ---- dither ----


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_dither_has_half_the_variance_of_stochastic_rounding(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(1 << 17)  # evenly spread over the cells of the grid
    assert relative_error(Dither(bits), x) == pytest.approx(
        relative_error(Affine(bits), x) / 2, rel=0.02
    )
    stated = Dither(bits).error(x).variance.mean() / Affine(bits).error(x).variance.mean()
    assert float(stated) == pytest.approx(0.5, rel=0.02)


@given(dithers, shapes, float_types)
@settings(max_examples=60)
def test_dither_has_affines_payload(c: Dither, shape: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    assert torch.equal(c.encode(x, step_key(), 3), Affine(c.bits, c.group).encode(x, step_key(), 3))


# ---- subsample ----


@pytest.mark.parametrize("rate", RATES)
def test_subsample_draws_one_element_a_block(rate: float) -> None:
    torch.manual_seed(0)
    k, x = round(1 / rate), torch.randn(256 * 64)
    means = x.view(-1, 256 * k).mean(1).bfloat16().float().repeat_interleave(256)[:, None]
    hits = torch.zeros(k)
    for n in range(64):
        drawn = (round_trip(Subsample(rate), x, n).view(-1, k) - means).abs() > 0.02
        assert bool((drawn.sum(1) <= 1).all())  # the others decode to the mean
        hits += drawn.sum(0)
    assert float(hits.sum()) > 0.98 * 64 * len(means)
    assert float(hits.max() / hits.min()) < 1.15  # each place as often


@pytest.mark.parametrize("rate", RATES)
def test_subsample_error_is_the_formula(rate: float) -> None:
    torch.manual_seed(0)
    d = levels.levels(1).distortion
    expected = (1 + d / (1 - d)) / rate - 1
    assert relative_error(Subsample(rate), torch.randn(1 << 18)) == pytest.approx(
        expected, rel=0.03
    )


@pytest.mark.parametrize("rate", RATES)
def test_subsample_bytes(rate: float) -> None:
    bits = 8 * Subsample(rate).payload_bytes([1 << 20], torch.float32) / (1 << 20)
    assert bits == rate * (1 + 32 / 256)
