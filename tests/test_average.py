"""average by property: sizes, which elements share a mean, its noise, and that it is biased."""

from __future__ import annotations

import itertools
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
    step_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fxcompress import rng
from fxcompress.codecs import Average, blocks, codec
from fxcompress.errors import CodecError

BETAS = (1.0, 0.5, 0.25, 0.125)
SPACE = {1.0: (1, 2), 0.5: (2, 2), 0.25: (2, 4), 0.125: (4, 4)}
averages = st.one_of(
    st.builds(
        Average,
        st.sampled_from(BETAS),
        st.sampled_from((8, 32, 128, 256)),
        st.sampled_from(("storage", "space")),
        st.integers(-2, 2),
    ),
    st.builds(Average, st.just(0.0), st.sampled_from((8, 24, 256))),
)


def relative_error(c: Average, x: Tensor) -> float:
    return float((round_trip(c, x) - x).square().sum() / x.square().sum())


@given(averages)
def test_spec_round_trips(c: Average) -> None:
    assert codec(c.spec) == c
    assert not c.unbiased


@pytest.mark.parametrize(
    "fields", ["beta=2", "beta=0.75", "beta=nan", "group=12", "along=time", "beta=0,along=space"]
)
def test_bad_parameters_are_refused(fields: str) -> None:
    with pytest.raises(CodecError):
        codec(f"average({fields})")


def test_bytes_of_symbolic_sizes() -> None:
    check_symbolic_bytes(codec("average"))
    check_symbolic_bytes(codec("average(beta=0.25,along=space)"))
    check_symbolic_bytes(codec("average(beta=0)"))


@given(averages, shapes, float_types)
@settings(max_examples=60)
def test_round_trip_stays_within_a_step_of_the_mean(
    c: Average, shape: list[int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    decoded = round_trip(c, x)
    stated = c.error(x)
    assert bool(stated.variance.isfinite().all())
    if x.numel():
        step = (x.max() - x.min()).float() / 3 * (1 + 1 / 64) + 2**-100
        slack = x.abs().max().float() / 128  # lo in bf16, and dtype's own rounding
        assert float((decoded.float() - x.float() - stated.bias).abs().max()) <= step + slack


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("group", [256, 128])
def test_bytes_along_storage(beta: float, group: int) -> None:
    for numel in (0, 1, 2, 16, 4096, 4097, 100_003):
        means = -(-numel // int(2 / beta))
        expected = 4 * -(-means // group) + 2 * -(-means // 8)
        assert Average(beta, group).payload_bytes([numel], torch.float32) == expected


@pytest.mark.parametrize("beta", BETAS)
def test_bits_an_element(beta: float) -> None:
    shape = [8, 64, 56, 56]
    for along, channels in itertools.product(("storage", "space"), (1, -1)):
        size = Average(beta, 256, along, channels).payload_bytes(shape, torch.float32)
        assert 8 * size / math.prod(shape) == pytest.approx(beta * (1 + 32 / 512), rel=1e-3)
    assert Average(0.0).payload_bytes([2560], torch.float32) == 20


@pytest.mark.parametrize("beta", BETAS)
def test_neighbours_in_storage_share_their_true_mean(beta: float) -> None:
    run = int(2 / beta)
    x = torch.randn(5, 7, 11)  # 385: a remainder for every run
    expected = torch.cat(
        [piece.double().mean().expand(len(piece)) for piece in x.view(-1).split(run)]
    )
    bias = Average(beta).error(x).bias
    torch.testing.assert_close(bias + x, expected.float().view(x.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_neighbours_in_space_share_their_mean(beta: float) -> None:
    block = SPACE[beta]
    x = torch.randn(2, 3, 8, 12)
    expected = torch.kron(avg_pool2d(x, block), torch.ones(block))
    c = Average(beta, along="space")
    torch.testing.assert_close(c.error(x).bias + x, expected, rtol=1e-5, atol=1e-6)
    tokens = torch.randn(2, 48, 5)
    runs = tokens.unflatten(1, (-1, math.prod(block))).mean(2)
    found = Average(beta, along="space", channels=-1).error(tokens).bias + tokens
    expected = runs.repeat_interleave(math.prod(block), 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 4)))
@settings(max_examples=40)
def test_ragged_blocks_have_their_true_mean(h: int, w: int, bh: int, bw: int) -> None:
    x = torch.randn(2, h, w)
    means = blocks.pool(x, [bh, bw])
    for i, j in itertools.product(range(-(-h // bh)), range(-(-w // bw))):
        part = x[:, i * bh : (i + 1) * bh, j * bw : (j + 1) * bw]
        torch.testing.assert_close(means[:, i, j], part.mean((1, 2)))
    spread = blocks.spread(means, [bh, bw], [h, w])
    assert torch.equal(spread, means[:, torch.arange(h) // bh][:, :, torch.arange(w) // bw])


def test_means_of_huge_numbers_are_finite() -> None:
    x = torch.full((4, 16), torch.finfo(torch.float32).max)
    assert torch.equal(blocks.pool(x, [16]), x[:, :1])


@pytest.mark.parametrize(
    "spec",
    [
        "average(beta=1)",
        "average(beta=0.5,group=128)",
        "average(beta=0.125,group=32,along=space)",
        "average(beta=0.25,along=space,channels=-1)",
    ],
)
def test_the_noise_of_means_is_as_stated(spec: str) -> None:
    torch.manual_seed(0)
    check_noise(codec(spec), feature_map(3, 5, 14, 18))


def test_beta_0_is_one_mean_a_group() -> None:
    c, x = codec("average(beta=0,group=24)"), torch.randn(100)
    decoded = round_trip(c, x)
    for piece, found in zip(x.split(24), decoded.split(24), strict=True):
        assert torch.equal(found, piece.mean().bfloat16().float().expand(len(piece)))
    stated = c.error(x)
    assert not stated.variance.any()
    torch.testing.assert_close(stated.bias, decoded - x)


def test_space_is_the_same_in_either_memory_format() -> None:
    x = feature_map(2, 8, 16, 16)
    last = x.permute(0, 2, 3, 1).contiguous()
    first, second = (Average(0.25, along="space", channels=c) for c in (1, -1))
    assert torch.equal(round_trip(first, x), round_trip(second, last).permute(0, 3, 1, 2))


def test_space_is_better_where_channels_are_fastest() -> None:
    torch.manual_seed(0)
    last = feature_map(2, 16, 32, 32).permute(0, 2, 3, 1).contiguous()
    for beta in (1.0, 0.5, 0.25):
        space = relative_error(Average(beta, along="space", channels=-1), last)
        assert space < 0.75 * relative_error(Average(beta), last)


@pytest.mark.parametrize("spec", ["average(beta=0.5,group=8)", "average(beta=0,group=32)"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_group_stays_alone(spec: str, dtype: torch.dtype, bad: float) -> None:
    c = codec(spec)
    clean = torch.randn(1000).to(dtype)
    spoilt = clean.clone()
    spoilt[70] = bad
    expected, decoded = round_trip(c, clean), round_trip(c, spoilt)
    lost = torch.zeros(1000, dtype=torch.bool)
    lost[64:96] = True  # 8 means of 4, or one of 32
    assert torch.equal(decoded.isnan(), lost)
    assert torch.equal(decoded[~lost], expected[~lost])
    assert torch.equal(c.error(spoilt).variance.isinf(), lost)


@pytest.mark.parametrize("spec", ["average", "average(beta=0.125,along=space)", "average(beta=0)"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_ranges(spec: str, dtype: torch.dtype) -> None:
    for x in extreme((2, 3, 9, 9), dtype):
        decoded = round_trip(codec(spec), x)
        assert bool(decoded.isfinite().all())
        if not x.any():
            assert not decoded.any()


@pytest.mark.parametrize("spec", ["average", "average(beta=0.25,along=space)"])
def test_kernels_equal_the_reference(spec: str) -> None:
    c, x, keys = codec(spec), feature_map(3, 4, 30, 17), rng.stream_keys(step_key(), 3)
    payload = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
    c.encode_reference(x, payload, keys)
    assert torch.equal(c.encode(x, step_key(), 3), payload)
    decoded = torch.empty_like(x)
    c.decode_reference(payload, decoded, keys)
    assert torch.equal(round_trip(c, x), decoded)
