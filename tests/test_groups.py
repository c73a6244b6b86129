"""Sums over groups tell what codecs' own error models do."""

from __future__ import annotations

import pytest
import torch

from fxcompress.codecs import codec
from fxcompress.codecs.groups import groups
from fxcompress.ladder import specs


@pytest.mark.parametrize("size", [256, 40, 256 * 9, 256 * 33 + 77])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_noise_is_that_of_the_error_model(size: int, offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(size) * torch.linspace(0.1, 3, size) + offset
    w = torch.randn(size) * torch.linspace(3, 0.1, size)
    sums, told = groups(x[None], w[None].square()), 0
    for spec in specs():
        noise = codec(spec).noise(sums)
        if noise is not None:
            assert noise == pytest.approx(codec(spec).effect(x, w)[0], rel=2e-3), spec
            told += 1
    assert told == 15  # all but the grids without dither


def test_rows_are_told_apart() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 600), torch.randn(3, 600)
    for spec in ("rotate(bits=2)", "dither(bits=4)", "subsample(rate=0.5)"):
        together = codec(spec).noise(groups(x, w.square()))
        apart = [codec(spec).noise(groups(x[i : i + 1], w[i : i + 1].square())) for i in range(3)]
        assert together == pytest.approx(sum(n for n in apart if n is not None), rel=1e-5)
        some = codec(spec).noise(groups(x, w.square()).rows(torch.tensor([2, 0])))
        assert some == pytest.approx((apart[0] or 0) + (apart[2] or 0), rel=1e-5)


def test_what_is_not_finite_is_not_priced() -> None:
    x, w = torch.randn(1, 512), torch.ones(1, 512)
    whole = groups(x[:, :256], w[:, :256].square())
    x[0, 300] = torch.nan
    for spec in ("rotate(bits=2)", "dither(bits=4)", "subsample(rate=0.5)"):
        noise, first = codec(spec).noise(groups(x, w.square())), codec(spec).noise(whole)
        assert noise is not None
        assert first is not None
        assert noise < 3 * first


def test_other_groups_are_told_by_the_error_model() -> None:
    sums = groups(torch.randn(1, 512), torch.ones(1, 512))
    for spec in ("rotate(bits=2,group=128)", "dither(bits=4,group=64)", "rotate(bits=2,scale=lsq)"):
        assert codec(spec).noise(sums) is None
