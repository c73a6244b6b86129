"""Coding in one pass with what stands around it: the bits of its parts one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from codec_checks import FLOATS, awkward, same_numbers, step_key
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxcompress.ops  # noqa: F401  (registers torch.ops.fxcompress)
from fxcompress.codecs import codec
from fxcompress.codecs.fused import Fusing, decode_filled
from fxcompress.errors import CodecError
from fxcompress.kernels import cpu
from fxcompress.kernels.prologue import Filled, Standardised

OPS, KEY, STREAM = torch.ops.fxcompress, step_key(), 3
FUSED = (
    *("affine(bits=1)", "affine(bits=3)", "affine(bits=4)", "dither(bits=2)", "dither(bits=8)"),
    *("rotate(bits=2)", "rotate(bits=5,scale=lsq)", "rotate(bits=1,mean=none)"),
)
COMPOSED = (
    *("affine(bits=3,group=40)", "affine(bits=4,meta=fp32)", "affine(bits=4,rounding=nearest)"),
    *("dither(bits=2,group=512)", "rotate(bits=2,group=128)", "cast(format=e4m3,group=256)"),
    *("magnitude(levels=4)", "sign(scale=mean)", "subsample(rate=0.5)", "average(beta=0.5)"),
    *("mixture(base_levels=4)", "adaptive(bits=2)", "frequency(bits=2,channels=1)"),
)
CHANNELS_LAST, CHANNELS_FIRST = [0, 2, 3, 1], [0, 1, 2, 3]

sizes = st.tuples(*(st.integers(1, top) for top in (3, 40, 9, 9))).map(list)
cases = st.tuples(
    sizes,
    st.sampled_from([CHANNELS_LAST, CHANNELS_FIRST]),
    st.sampled_from([CHANNELS_LAST, CHANNELS_FIRST]),
    st.sampled_from(FLOATS),
)


def laid_out(shape: list[int], layout: list[int], dtype: torch.dtype) -> Tensor:
    """Values of every kind, in memory that is dense in `layout`."""
    stored = awkward(math.prod(shape), dtype).view([shape[dim] for dim in layout])
    return stored.permute(sorted(range(len(shape)), key=layout.__getitem__))


def check_filled(spec: str, x: Tensor, order: list[int]) -> None:
    fill = torch.tensor(0.7, dtype=x.dtype)
    payload, mask = OPS.encode_filled(x, fill, KEY, spec, STREAM, order)
    zeros = x <= 0
    expected = OPS.encode(torch.where(zeros, fill, x), KEY, spec, STREAM, order)
    assert torch.equal(payload, expected)
    assert torch.equal(mask, OPS.encode(zeros, None, "bits(bits=1)", 0, order))
    how = (KEY, spec, STREAM, x.shape, order, x.dtype)
    decoded = OPS.decode_filled(payload, mask, *how)
    expected = torch.where(zeros, 0, OPS.decode(payload, *how))
    assert decoded.permute(order).is_contiguous()
    assert same_numbers(decoded, expected)


def check_standardised(spec: str, x: Tensor, dim: int, order: list[int]) -> None:
    shape = [size if d == dim else 1 for d, size in enumerate(x.shape)]
    mean, rstd = torch.randn(shape), torch.rand(shape) + 0.1
    payload = OPS.encode_standardised(x, mean, rstd, KEY, spec, STREAM, order)
    assert torch.equal(payload, OPS.encode((x - mean) * rstd, KEY, spec, STREAM, order))


@pytest.mark.parametrize("spec", FUSED)
@settings(max_examples=15)
@given(cases, st.integers(0, 3))
def test_fused_equals_its_parts(
    spec: str, case: tuple[list[int], list[int], list[int], torch.dtype], dim: int
) -> None:
    shape, layout, order, dtype = case
    x = laid_out(shape, layout, dtype)
    check_filled(spec, x, order)
    check_standardised(spec, x, dim, order)


@pytest.mark.parametrize("spec", COMPOSED)
def test_other_codecs_do_the_same_by_parts(spec: str) -> None:
    assert not codec(spec).fuses
    x = laid_out([2, 33, 5, 7], CHANNELS_LAST, torch.bfloat16)
    check_filled(spec, x, CHANNELS_LAST)
    check_standardised(spec, x, 1, CHANNELS_LAST)


@pytest.mark.parametrize("spec", FUSED)
def test_rows_and_many_threads(spec: str) -> None:
    for dtype in FLOATS:
        x = laid_out([257, 300], [0, 1], dtype)
        check_filled(spec, x, [0, 1])
        check_standardised(spec, x, 1, [0, 1])
        check_standardised(spec, x, 0, [0, 1])
        check_standardised(spec, x, 1, [1, 0])


def test_empty_and_scalar() -> None:
    for spec in FUSED:
        for x in (torch.ones(0, 3), torch.tensor(-1.5)):
            order = list(range(x.dim()))
            check_filled(spec, x, order)
            check_standardised(spec, x, x.dim() - 1, order)


@pytest.mark.parametrize("spec", FUSED)
def test_statistics_that_kernels_do_not_take(spec: str) -> None:
    x, order = torch.randn(4, 6, 5, 3), CHANNELS_FIRST
    for mean in (
        torch.randn(4, 6, 1, 1),  # of two dimensions
        torch.randn(1, 1, 1, 1),
        torch.randn(1, 6, 1, 1).expand(4, 6, 5, 3),
        torch.randn(1, 12, 1, 1)[:, ::2],  # in strides
    ):
        for rstd in (mean.square(), torch.ones(1, 6, 1, 1), torch.ones(1, 1, 1, 3)):
            payload = OPS.encode_standardised(x, mean, rstd, KEY, spec, STREAM, order)
            assert torch.equal(payload, OPS.encode((x - mean) * rstd, KEY, spec, STREAM, order))


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
@pytest.mark.parametrize("spec", FUSED)
def test_a_kernel_does_it(spec: str) -> None:
    c, x = codec(spec), torch.randn(4, 300)
    assert isinstance(c, Fusing)
    assert c.fuses
    mask = torch.empty(150, dtype=torch.uint8)
    for before in (Filled(torch.tensor(0.7), mask), Standardised(x[0], x[1], 1)):
        payload = c.encode_prepared(x, KEY, STREAM, before)
        assert payload is not None
        assert c.decode_masked(payload, mask, x.shape, x.dtype, KEY, STREAM) is not None


def test_wrong_mask_is_refused() -> None:
    c, x = codec("affine(bits=4)"), torch.randn(300)
    payload, short = c.encode(x, KEY, STREAM), torch.zeros(37, dtype=torch.uint8)
    with pytest.raises(CodecError, match=r"bits\(bits=1\) wants uint8\[38\]"):
        decode_filled(c, payload, short, x.shape, x.dtype, KEY, STREAM)
