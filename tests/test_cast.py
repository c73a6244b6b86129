"""cast and sign: what they keep, neighbours, scales, non-finite numbers."""

from __future__ import annotations

import math

import pytest
import torch
from codec_checks import FLOATS, float_types, round_trip, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.codecs import Cast, Sign, codec
from fxcompress.errors import CodecError

FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
casts = st.builds(
    Cast,
    st.sampled_from(("fp16", "e4m3", "e5m2")),
    st.sampled_from(("nearest", "stochastic")),
    st.sampled_from((0, 1, 32, 256, 1000)),
) | st.builds(Cast, st.just("bf16"), st.sampled_from(("nearest", "stochastic")))


def group_maximum(c: Cast, x: Tensor) -> Tensor:
    """max|x| of each element's group, flat."""
    magnitude = x.float().abs().view(-1)
    group = c.group or max(1, x.numel())
    padded = torch.nn.functional.pad(magnitude, (0, -x.numel() % group)).view(-1, group)
    return padded.amax(1).repeat_interleave(group)[: x.numel()]


@given(casts, shapes, float_types, st.floats(-3, 3))
def test_rounding_is_that_of_the_format(
    c: Cast, shape: list[int], dtype: torch.dtype, size: float
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 10**size).to(dtype)
    decoded = round_trip(c, x)
    assert codec(c.spec) == c
    scales = 0 if c.format == "bf16" else -(-x.numel() // c.group) if c.group else 1
    width = FORMATS[c.format].itemsize
    numbers = x.numel() * width
    assert c.payload_bytes(shape, dtype) == numbers + (numbers % 2 if scales else 0) + 2 * scales
    if not x.numel():
        return
    info = torch.finfo(FORMATS[c.format])
    exact, found = x.float().view(-1), decoded.float().view(-1)
    part = 0.5 if c.rounding == "nearest" else 1.0
    largest = group_maximum(c, x) if c.format != "bf16" else torch.full_like(exact, info.max)
    allowed = part * torch.maximum(exact.abs(), largest * 2 * info.tiny / info.max) * info.eps
    allowed = allowed + exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert bool(((found - exact).abs() <= allowed).all())
    assert bool((found * exact >= 0).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_the_format_come_back_exact(name: str, rounding: str) -> None:
    dtype = FORMATS[name]
    integers = torch.int16 if dtype.itemsize == 2 else torch.uint8
    codes = torch.arange(1 << 8 * dtype.itemsize).to(integers)
    numbers = codes.view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    c = Cast(name, rounding, *(() if name == "bf16" else (0,)))
    for power in (0,) if name == "bf16" else (-30, 0, 17):
        x = numbers * 2.0**power
        decoded = round_trip(c, x)
        assert torch.equal(decoded.view(torch.int32), x.view(torch.int32))  # -0 too
        assert not c.error(x).variance.any()


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_is_the_cast_of_torch(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096) * torch.logspace(-6, 6, 4096)
    c = Cast(name)
    scale, decoded = torch.ones(4096), round_trip(c, x)
    if name != "bf16":
        exact = group_maximum(c, x) / torch.finfo(FORMATS[name]).max
        scale = exact.bfloat16().float()
        scale = torch.where(scale < exact, (exact * (1 + 2**-8)).bfloat16().float(), scale)
        top = x.abs() == group_maximum(c, x)
        assert bool(((decoded / x)[top] - 1 <= 2**-7).all())
    assert torch.equal(decoded, (x / scale).to(FORMATS[name]).float() * scale)


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_takes_a_neighbour_with_its_probability(name: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(512) * torch.logspace(-3, 0, 512)
    c, nearest, draws = Cast(name, "stochastic"), Cast(name), 600
    decoded = torch.stack([round_trip(c, x, n) for n in range(draws)]).double()
    low, high, exact = decoded.amin(0), decoded.amax(0), x.double()
    near, stated = round_trip(nearest, x).double(), c.error(x).variance.double()
    assert bool(((decoded == low) | (decoded == high)).all())
    assert bool(((near == low) | (near == high)).all())
    both = low < high
    assert both.double().mean() > 0.9
    below, above = (exact - low)[both], (high - exact)[both]
    assert bool(((below >= 0) & (above >= 0)).all())
    spacing = below + above
    assert bool(((stated[both] - below * above).abs() <= 2**-12 * spacing.square()).all())
    share = below / spacing
    error = ((decoded == high).double().mean(0)[both] - share).abs()
    assert bool((error <= 5.5 * (share * (1 - share) / draws).sqrt() + 2**-12).all())
    # Where one neighbour never came, it was unlikely to: p/(1 - p) = distance^2 / variance.
    assert bool(((exact - low).square() <= 0.02 * stated)[~both].all())


@pytest.mark.parametrize("spec", ["cast(format=e4m3)", "cast(format=fp16,rounding=stochastic)"])
def test_what_is_not_finite_is_lost_alone(spec: str) -> None:
    for dtype in FLOATS:
        x = torch.randn(600).to(dtype)
        bad = torch.zeros(600, dtype=torch.bool)
        for at, value in ((3, math.nan), (70, math.inf), (300, -math.inf)):
            bad[at] = True
            x[at] = value
        decoded = round_trip(codec(spec), x)
        assert torch.equal(decoded.isnan(), bad)
        clean = round_trip(codec(spec), x.masked_fill(bad, 0.0))
        assert torch.equal(decoded[~bad], clean[~bad])
        assert torch.equal(codec(spec).error(x).variance.isinf(), bad)
    everything = torch.full((300,), math.inf)
    assert bool(round_trip(codec(spec), everything).isnan().all())


def test_ranges_beyond_the_format() -> None:
    for name in ("fp16", "e4m3", "e5m2"):
        for scale in (1e-45, 1e-38, 1e-20, 1e20, 3e38):
            x = (torch.rand(256) - 0.5) * 2 * scale
            decoded = round_trip(Cast(name), x)
            assert bool(decoded.isfinite().all())
            eps = torch.finfo(FORMATS[name]).eps
            assert (decoded - x).abs().max() <= eps * x.abs().max() + 1e-40


@pytest.mark.parametrize(
    "spec",
    [
        "cast(format=fp32)",
        "cast(format=int8)",
        "cast(rounding=down)",
        "cast(format=fp16,group=-1)",
        "cast(format=bf16,group=64)",
        "sign(scale=median)",
        "sign(group=12)",
    ],
)
def test_bad_parameters_are_refused(spec: str) -> None:
    with pytest.raises(CodecError):
        codec(spec)


# ---- sign ----


@given(st.sampled_from(("one", "mean")), st.sampled_from((8, 256, 1000)), shapes, float_types)
def test_signs(scale: str, group: int, shape: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    c = Sign(scale, group)
    x = torch.randn(shape).to(dtype)
    x = torch.where(torch.rand(shape) < 0.2, torch.zeros_like(x), x)
    decoded = round_trip(c, x)
    groups = -(-x.numel() // group)
    code_bytes = (x.numel() + 7) // 8
    extra = code_bytes % 2 + 2 * groups if scale == "mean" else 0
    assert c.payload_bytes(shape, dtype) == code_bytes + extra
    assert codec(c.spec) == c
    if not x.numel():
        return
    magnitude = torch.ones(x.numel())
    if scale == "mean":
        padded = torch.nn.functional.pad(x.float().abs().view(-1), (0, -x.numel() % group))
        count = torch.nn.functional.pad(torch.ones(x.numel()), (0, -x.numel() % group))
        mean = padded.view(-1, group).sum(1) / count.view(-1, group).sum(1)
        magnitude = mean.repeat_interleave(group)[: x.numel()]
    expected = torch.where(x.view(-1) > 0, magnitude, -magnitude)
    torch.testing.assert_close(decoded.float().view(-1), expected, rtol=2**-7, atol=1e-6)


def test_sign_needs_no_key_and_states_its_error() -> None:
    x = torch.randn(1000) * 3
    for c in (Sign(), Sign("mean")):
        assert not c.stochastic
        assert not c.unbiased
        decoded = c.decode(c.encode(x, None, 0), x.shape, x.dtype, None, 0)
        assert torch.equal(decoded, round_trip(c, x))
        assert torch.equal(c.error(x).bias, decoded - x)
    # The mean is the best multiple of the signs.
    error = [float((round_trip(c, x) - x).square().sum()) for c in (Sign(), Sign("mean"))]
    assert error[1] < error[0]
    huge = torch.full((256,), 3e38)
    assert bool(round_trip(Sign("mean"), huge).isfinite().all())


def test_sign_of_what_is_not_finite() -> None:
    x = torch.randn(768)
    x[300] = math.nan
    assert round_trip(Sign("mean"), x).view(3, 256).isnan().all(1).tolist() == [False, True, False]
    assert round_trip(Sign(), x)[300] == -1
    assert Sign().error(x).variance[300] == math.inf
