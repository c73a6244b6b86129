"""adaptive by property: sizes, the allocation, noise, and what more bits for wide samples gain."""

from __future__ import annotations

import heapq
import itertools
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
from torch import Tensor

from fxcompress.codecs import Adaptive, Affine, codec
from fxcompress.errors import CodecError

averages = st.one_of(
    st.sampled_from((1.0, 2.0, 2.37, 8.0)), st.integers(100, 800).map(lambda b: b / 100)
)
adaptives = st.builds(Adaptive, averages, st.sampled_from((8, 24, 256)))


def allocation(c: Adaptive, x: Tensor) -> list[int]:
    """The bits of each sample, from the payload: behind 4 bytes a group."""
    groups = x.shape[0] * -(-math.prod(x.shape[1:]) // c.group)
    payload = c.encode(x, step_key(), 0)
    return payload[4 * groups : 4 * groups + x.shape[0]].tolist()


def costs(c: Adaptive, x: Tensor) -> list[int]:
    """C of each sample, naively."""
    ranges = [[float(g.max() - g.min()) for g in row.split(c.group)] for row in x.flatten(1)]
    largest = max(itertools.chain(*ranges))
    return [sum(math.trunc(r / largest * 2**20) ** 2 for r in row) for row in ranges]


def distortion(costs: list[int], bits: list[int]) -> float:
    return sum(c / (2**b - 1) ** 2 for c, b in zip(costs, bits, strict=True))


def greedy(costs: list[int], total: int) -> list[int]:
    """ActNN's heap: the bit that loses least goes, until `total` are left."""
    bits = [8] * len(costs)

    def loss(n: int) -> tuple[float, int, int]:
        b = bits[n]
        return costs[n] * ((2.0 ** (b - 1) - 1) ** -2 - (2.0**b - 1) ** -2), -b, -n

    heap = [(loss(n), n) for n in range(len(costs))]
    heapq.heapify(heap)
    while sum(bits) > total:
        _, n = heapq.heappop(heap)
        bits[n] -= 1
        if bits[n] > 1:
            heapq.heappush(heap, (loss(n), n))
    return bits


@given(adaptives)
def test_spec_round_trips(c: Adaptive) -> None:
    assert codec(c.spec) == c
    assert c.unbiased


@pytest.mark.parametrize("fields", ["bits=0.9", "bits=8.1", "bits=nan", "group=12", "block=2"])
def test_bad_parameters_are_refused(fields: str) -> None:
    with pytest.raises(CodecError):
        codec(f"adaptive({fields})")


def test_bytes_of_symbolic_sizes() -> None:
    check_symbolic_bytes(codec("adaptive(bits=2.3)"))


@given(adaptives, shapes, float_types)
@settings(max_examples=60)
def test_bytes_and_bound(c: Adaptive, shape: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    decoded = round_trip(c, x)
    samples, size = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    total = samples * round(c.bits * 100) // 100
    expected = 4 * samples * -(-size // c.group) + samples + total * -(-size // 8)
    assert c.payload_bytes(shape, dtype) == expected
    assert c.error(x).variance.isfinite().all()
    if x.numel():
        step = (x.max() - x.min()).float() * (1 + 1 / 64)  # at 1 bit
        slack = x.abs().max().float() / 64
        assert float((decoded.float() - x.float()).abs().max()) <= step + slack


@given(st.integers(1, 40), averages, st.integers(0, 2**32))
@settings(max_examples=60)
def test_the_allocation_is_the_greedy_one(samples: int, bits: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = 4 ** torch.randn(samples, 1, generator=generator)
    x = torch.randn(samples, 50, generator=generator) * spread
    c = Adaptive(bits, 24)
    found = allocation(c, x)
    assert sum(found) == samples * round(bits * 100) // 100
    assert found == greedy(costs(c, x), sum(found))


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.sampled_from((1.0, 2.0, 3.3, 6.5))
)
@settings(max_examples=25)
def test_no_allocation_is_better(spread: list[float], bits: float) -> None:
    x = torch.randn(len(spread), 64) * torch.tensor(spread)[:, None]
    c = Adaptive(bits, 64)
    found, c_n = allocation(c, x), costs(c, x)
    total = int(bits * len(spread))
    every = itertools.product(range(1, 9), repeat=len(spread))
    best = min(distortion(c_n, list(b)) for b in every if sum(b) <= total)
    assert distortion(c_n, found) <= best * (1 + 1e-9)


def test_equal_samples_get_equal_bits() -> None:
    for x in (torch.zeros(12, 100), torch.arange(100.0).repeat(12, 1)):
        assert sorted(allocation(Adaptive(2.5), x)) == [2] * 6 + [3] * 6


def test_wide_samples_get_more_and_noise_falls() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 8, 8) * 2 ** torch.arange(-4.0, 4).repeat(2)[:, None, None, None]
    bits = allocation(Adaptive(2.0), x)
    assert bits[:8] == sorted(bits[:8])
    assert bits[7] > 3
    noise = Adaptive(2.0).error(x).variance.sum()
    assert float(noise) < 0.5 * float(Affine(2).error(x).variance.sum())


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("adaptive", (12, 3, 10, 10)),
        ("adaptive(bits=1.0)", (4, 700)),
        ("adaptive(bits=3.3,group=24)", (30, 77)),
        ("adaptive(bits=8.0)", (3, 1000)),
        ("adaptive(bits=4.6)", (1000,)),  # one sample
    ],
)
def test_unbiased_with_the_stated_variance(spec: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    spread = 3 ** torch.randn(shape[0], *[1] * (len(shape) - 1))
    check_noise(codec(spec), torch.randn(shape) * spread + 0.3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_group_stays_alone(dtype: torch.dtype, bad: float) -> None:
    c = Adaptive(2.0, 64)
    clean = torch.randn(6, 200).to(dtype)
    clean[2, 64:128] = 0  # counts as much as a lost group: the others keep their bits
    spoilt = clean.clone()
    spoilt[2, 70] = bad
    expected, decoded = round_trip(c, clean), round_trip(c, spoilt)
    lost = torch.zeros(6, 200, dtype=torch.bool)
    lost[2, 64:128] = True
    assert torch.equal(decoded.isnan(), lost)
    assert torch.equal(decoded[~lost], expected[~lost])
    assert torch.equal(c.error(spoilt).variance.isinf(), lost)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_ranges(dtype: torch.dtype) -> None:
    for x in extreme((5, 3, 40), dtype):
        decoded = round_trip(Adaptive(2.0, 64), x)
        assert bool(decoded.isfinite().all())
        if not x.any():
            assert not decoded.any()
