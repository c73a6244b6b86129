"""frequency by property: its cost formula, that R carries L's error, planes, noise."""

from __future__ import annotations

import math

import pytest
import torch
from codec_checks import (
    FLOATS,
    check_noise,
    check_symbolic_bytes,
    extreme,
    feature_map,
    float_types,
    round_trip,
    shapes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.codecs import Affine, Frequency, codec
from fxcompress.errors import CodecError

frequencies = st.builds(
    Frequency,
    st.integers(1, 8),
    st.sampled_from((2, 4, 8, 16)),
    st.sampled_from(("bf16", "8bit")),
    st.integers(-3, 3),
    st.sampled_from(("blocks", "stretched")),
)


def stated_error(c: Frequency | Affine, x: torch.Tensor) -> float:
    return float(c.error(x).variance.sum() / x.square().sum())


@given(frequencies)
def test_spec_round_trips(c: Frequency) -> None:
    assert codec(c.spec) == c
    assert c.unbiased


@pytest.mark.parametrize(
    "fields", ["bits=0", "bits=9", "block=1", "block=6", "low=fp32", "group=8"]
)
def test_bad_parameters_are_refused(fields: str) -> None:
    with pytest.raises(CodecError):
        codec(f"frequency({fields})")


def test_bytes_of_symbolic_sizes() -> None:
    check_symbolic_bytes(codec("frequency"))
    check_symbolic_bytes(codec("frequency(low=8bit,channels=-1)"))
    check_symbolic_bytes(codec("frequency(edges=stretched)"))


@given(frequencies, shapes, float_types)
@settings(max_examples=60)
def test_round_trip_stays_within_a_step(c: Frequency, shape: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    decoded, stated = round_trip(c, x), c.error(x)
    assert not stated.bias.any()
    if x.numel():
        # R spans at most twice x's range: a block of one leaves out only L's rounding.
        step = 2 * (x.max() - x.min()).float() / ((1 << c.bits) - 1) * (1 + 1 / 64)
        slack = x.abs().max().float() / 32
        assert float((decoded.float() - x.float()).abs().max()) <= step + slack


@pytest.mark.parametrize("channels", [1, -1])
@pytest.mark.parametrize("side", [64, 56, 32, 28, 14, 8, 7, 4, 2])
@pytest.mark.parametrize("block", [2, 4, 8, 16])
def test_cost_is_divisions_formula(side: int, block: int, channels: int) -> None:
    shape = [8, 24, side, side] if channels == 1 else [8, side, side, 24]
    area, cells = side * side, math.ceil(side / block) ** 2
    bits = 8 * Frequency(2, block, channels=channels).payload_bytes(shape, torch.float32)
    assert bits / math.prod(shape) == pytest.approx(2 + 16 * cells / area + 32 / area, abs=1e-12)
    bits = 8 * Frequency(2, block, "8bit", channels).payload_bytes(shape, torch.float32)
    expected = 2 + (8 + 32 / 256) * cells / area + 32 / area
    assert bits / math.prod(shape) == pytest.approx(expected, rel=2e-3)


def test_ratio_on_large_planes() -> None:
    for shape in ([16, 64, 56, 56], [16, 64, 112, 112]):
        size = Frequency(2, 8).payload_bytes(shape, torch.float32)
        assert 4 * math.prod(shape) / size > 14


@pytest.mark.parametrize("low", ["bf16", "8bit"])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 5, 14, 18), "bits=2,block=8,channels=1"),
        ((3, 14, 18, 5), "bits=1,block=4,channels=-1"),
        ((2, 3, 4, 10, 9), "bits=3,block=2,channels=1"),
        ((3, 50, 12), "bits=2,block=8,channels=-1"),
        ((40, 70), "bits=2,block=8"),
        ((2000,), "bits=4,block=16"),
        ((3, 5, 14, 11), "bits=2,block=4,channels=1,edges=stretched"),
    ],
)
def test_unbiased_with_the_stated_variance(shape: tuple[int, ...], spec: str, low: str) -> None:
    torch.manual_seed(0)
    x = feature_map(*shape) if len(shape) == 4 else torch.randn(shape) + 3
    check_noise(codec(f"frequency({spec},low={low})"), x)


@pytest.mark.parametrize("low", ["bf16", "8bit"])
def test_the_residual_carries_the_error_of_the_averages(low: str) -> None:
    # bf16 numbers near 1000 lie 4 apart, 8-bit ones over 0..1000 do too; x is spread over 0.01.
    x = 1000.3 + 0.01 * torch.rand(2, 4, 16, 16)
    x[:, 1] -= 1000
    decoded = round_trip(Frequency(8, 8, low), x)
    ulp = 2**-14  # fp32's own, near 1000
    assert float((decoded - x).abs().max()) < 0.01 * 4 / 255 + 4 / 255 + 2 * ulp
    flat = round_trip(Frequency(1, 8, low), torch.full((1, 1, 8, 8), 1000.3))
    assert float((flat - 1000.3).abs().max()) <= 2**-8 * 2  # R is one constant, held in bf16


def test_memory_formats_have_the_same_planes() -> None:
    x = feature_map(3, 5, 14, 18)
    last = x.permute(0, 2, 3, 1).contiguous()
    for low in ("bf16", "8bit"):
        first = Frequency(2, 4, low, 1).error(x).variance
        second = Frequency(2, 4, low, -1).error(last).variance
        assert torch.equal(first, second.permute(0, 3, 1, 2))


def test_less_noise_than_one_grid_a_group_where_planes_drift() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 10, 64)
    x = torch.randn(2, 4, 64, 64) * 0.2 + ramp + ramp[:, None]
    better, plain = Frequency(2, 8), Affine(2, 4096)
    assert stated_error(better, x) < 0.05 * stated_error(plain, x)


@pytest.mark.parametrize("low", ["bf16", "8bit"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_plane_stays_alone(low: str, dtype: torch.dtype, bad: float) -> None:
    c = Frequency(2, 4, low)
    clean = torch.randn(2, 3, 9, 9).to(dtype)
    clean[1, 1, 4:8, 4:8] = 0  # so that 8-bit averages need not change with this block's
    spoilt = clean.clone()
    spoilt[1, 1, 5, 5] = bad
    expected, decoded = round_trip(c, clean), round_trip(c, spoilt)
    lost = torch.zeros(2, 3, 9, 9, dtype=torch.bool)
    lost[1, 1] = True
    assert torch.equal(decoded.isnan(), lost)
    assert torch.equal(decoded[~lost], expected[~lost])
    assert torch.equal(c.error(spoilt).variance.isinf(), lost)


@pytest.mark.parametrize("low", ["bf16", "8bit"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_ranges(low: str, dtype: torch.dtype) -> None:
    for x in extreme((2, 3, 9, 9), dtype):
        decoded = round_trip(Frequency(2, 4, low), x)
        assert bool(decoded.isfinite().all())
        if not x.any():
            assert not decoded.any()


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (9, 16), (23, 5), (56, 56)])
def test_stretched_edges_are_floor_pooling_and_nearest_upsampling(size: tuple[int, int]) -> None:
    x, block = feature_map(2, 3, *size), 8
    kernel = [min(block, side) for side in size]
    means = torch.nn.functional.avg_pool2d(x, kernel).bfloat16().float()
    low = torch.nn.functional.interpolate(means, size, mode="nearest")
    c = Frequency(8, block, channels=1, edges="stretched")
    cells = means.shape[2] * means.shape[3]
    assert c.payload_bytes(x.shape, x.dtype) == 8 * math.ceil(x.numel() / 8) + 6 * (4 + 2 * cells)
    # The residual spans x - low of each plane: a step of 8 bits, rounded up to bf16, is its error.
    spread = (x - low).flatten(2).amax(2) - (x - low).flatten(2).amin(2)
    error = (round_trip(c, x) - x).abs().flatten(2).amax(2)
    assert bool((error <= spread / 255 * 1.02 + 1e-5).all())
    # Where both differ, blocks of their own fit closer.
    ours = Frequency(8, block, channels=1)
    if any(side > block and side % block for side in size):
        assert float(c.error(x).variance.mean()) > float(ours.error(x).variance.mean())
    else:
        assert torch.equal(c.error(x).variance, ours.error(x).variance)
