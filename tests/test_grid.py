"""grid, sharing and magnitude: which elements share a scale, metadata, bytes, levels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from codec_checks import round_trip, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.codecs import Affine, Magnitude, grid, sharing

groups = st.sampled_from((8, 24, 256, 1000))


def scale_ids(per: str, shape: list[int], group: int, channels: int) -> Tensor:
    """The number of each element's scale, from its coordinates."""
    shape = shape or [1]
    numel, rank = math.prod(shape), len(shape)
    index = torch.arange(numel)
    sample = numel // shape[0] if numel else 1
    axis = min(max(channels + rank if channels < 0 else channels, 0), rank - 1)
    channel = index // max(1, math.prod(shape[axis + 1 :])) % max(1, shape[axis])
    if per == "group":
        return index // group
    if per == "sample-group":
        return index // sample * -(-sample // group) + index % sample // group
    if per == "tensor":
        return index * 0
    if per == "sample":
        return index // sample
    return channel if per == "channel" or axis == 0 else index // sample * shape[axis] + channel


# ---- which elements share a scale ----


@settings(max_examples=40)
@given(st.sampled_from(sharing.PER), shapes, groups, st.integers(-3, 3), st.integers(1, 3000))
def test_pieces_cover_all_elements_with_their_scales(
    per: str, shape: list[int], group: int, channels: int, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sharing._PIECE, "cpu", most)
        shared = sharing.sharing(per, shape, group, channels)
        pieces = shared.pieces(torch.device("cpu"))
    numbers = torch.arange(shared.count).view(shared.outer, shared.scales)
    index = torch.arange(math.prod(shape))
    ids, seen = [index[:0]], [index[:0]]
    for piece in pieces:
        assert piece.span.stop - piece.span.start <= most
        seen.append(piece.unfold(piece.fold(index[piece.span])))
        ids.append(piece.unfold(piece.spread(numbers).expand(piece.shape)))
    assert torch.equal(torch.cat(seen), index)
    assert torch.equal(torch.cat(ids), scale_ids(per, shape, group, channels))
    if len(index):
        expected = scale_ids(per, shape, group, channels).bincount(minlength=shared.count)
        rows = shared.rows(index)
        found = torch.cat([part.new_full(part.shape[:2], part.shape[2]) for part in rows], 1)
        assert torch.equal(found.view(-1), expected)
        sums = torch.cat([part.sum(2) for part in rows], 1).view(-1)
        assert torch.equal(sums, torch.zeros_like(sums).index_add_(0, torch.cat(ids), index))


# ---- metadata ----


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(list(grid.META)))
def test_metadata_is_rounded_outwards(numbers: list[float], meta: str) -> None:
    values, dtype = torch.tensor(numbers), grid.META[meta]
    down, up = grid.round_down(values, dtype), grid.round_up(values.abs(), dtype)
    assert bool((down <= values).all())
    assert bool((up >= values.abs()).all())
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    finite = down.isfinite() & up.isfinite() & values.isfinite()
    assert bool((values - down <= values.abs() * eps + tiny)[finite].all())
    assert bool((up - values.abs() <= values.abs() * eps + tiny)[finite].all())
    for rounded in (down, up):
        again = grid.narrow(rounded, dtype).float()
        assert torch.equal(again.view(torch.int32), rounded.view(torch.int32))


@given(st.lists(st.floats(0, 2.0**120, width=32), min_size=1), st.integers(0, 255))
def test_products_of_short_steps_are_exact(numbers: list[float], code: int) -> None:
    values = torch.tensor(numbers)
    short = grid.shorten(values)
    assert bool((short >= values).all())
    assert bool((short - values <= values * 2**-15 + 2.0**-141).all())
    products = short.double() * code
    fits = products < torch.finfo(torch.float32).max
    assert torch.equal((short * code)[fits].double(), products[fits])


def test_bytes() -> None:
    for c, codes, metadata in (
        (Affine(4), 4, 4 * 40),
        (Affine(4, meta="fp32"), 4, 8 * 40),
        (Affine(4, zero="integer"), 4, 4 * 40),
        (Affine(4, zero="integer", meta="fp32"), 4, 6 * 40),
        (Affine(2, zero="symmetric", scale="max", per="plane"), 2, 2 * 80),
        (Affine(2, per="channel", channels=-1), 2, 4 * 4),
        (Affine(3, per="sample"), 3, 4 * 8),
        (Affine(3, per="tensor"), 3, 4),
        (Affine(3, per="sample-group", group=1000), 3, 4 * 16),
        (Magnitude(4), 4, 2 * 20),
        (Magnitude(16, 256), 6, 2 * 40),
        (Magnitude(127, 8, meta="fp32"), 8, 4 * 1280),
    ):
        assert c.payload_bytes([8, 10, 32, 4], torch.float32) == codes * 1280 + metadata


# ---- magnitude ----


@pytest.mark.parametrize("levels", [1, 4, 16, 127])
def test_magnitude_has_its_levels(levels: int) -> None:
    torch.manual_seed(levels)
    x = torch.randn(2000)
    c = Magnitude(levels, 512)
    decoded = torch.cat([round_trip(c, x, n) for n in range(20)]).view(20, -1)[:, :512]
    step = x[:512].abs().max() / levels
    values = (decoded / step).unique()
    assert len(values) <= 2 * levels + 1
    assert bool(((values - values.round()).abs() <= 2**-7 * levels).all())
    assert bool((decoded * x[:512] >= 0).all())  # no sign changes
    l2 = round_trip(replace(c, norm="l2"), x)[:512]
    unit = l2[l2 != 0].abs().min() * levels if l2.any() else x[:512].norm()
    assert abs(unit / x[:512].norm() - 1) < 2**-7
