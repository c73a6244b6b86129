"""The counter-based generator: its bits, its independence, and the state behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress import rng

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def follow_torch_seed() -> Iterator[None]:
    rng.manual_seed(None)
    yield
    rng.manual_seed(None)


def hashes(key: Tensor, stream: int, count: int, start: int = 0) -> Tensor:
    return rng.hash_range(start, count, *rng.stream_keys(key, stream))


def uniform(key: Tensor, stream: int, count: int) -> Tensor:
    return hashes(key, stream, count).double() / 2**32


def keys(count: int) -> list[list[int]]:
    return [rng.next_key(CPU).tolist() for _ in range(count)]


def test_mix_is_lowbias32() -> None:
    # Worked out with the C code of the published hash, uint32_t throughout.
    assert [rng.mix(x) for x in (0, 1, 0xDEADBEEF, 0xFFFFFFFF)] == [
        0x00000000,
        0x688990C0,
        0xE628C683,
        0x6768824A,
    ]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32))
def test_tensor_and_int_versions_agree(base: int, counter: int, stream: int) -> None:
    key = torch.tensor([base, counter])
    k_a, k_b = rng.stream_keys(key, stream)
    assert (k_a.item(), k_b.item()) == rng.stream_key_ints(key, stream)
    ints = [rng.mix((rng.mix(i ^ int(k_a)) + int(k_b)) & rng.MASK) for i in range(5)]
    assert hashes(key, stream, 5).tolist() == ints


def test_element_index_wraps_at_32_bits() -> None:
    key = rng.next_key(CPU)
    assert torch.equal(hashes(key, 1, 4, start=2**32 + 3), hashes(key, 1, 4, start=3))


def test_hash_is_uniform() -> None:
    count = 1 << 18
    for stream in range(4):
        values = uniform(rng.next_key(CPU), stream, count)
        bins = torch.histc(values, 64, 0, 1)
        chi_square = ((bins - count / 64) ** 2 / (count / 64)).sum().item()
        assert chi_square < 63 + 5 * (2 * 63) ** 0.5
        shift = values - 0.5
        for lag in (1, 8, 256):  # neighbours, lanes, groups
            correlation = 12 * (shift[lag:] * shift[:-lag]).mean().item()
            assert abs(correlation) < 5 / count**0.5


def test_streams_steps_and_seeds_are_independent() -> None:
    count = 1 << 17
    base, counter = rng.next_key(CPU).tolist()
    first = torch.tensor([base, counter])
    draws = [uniform(first, stream, count) for stream in (0, 1, 2)]
    draws += [uniform(torch.tensor([base, counter + n]), 0, count) for n in (1, 2, 2**32)]
    draws += [uniform(torch.tensor([base ^ bit, counter]), 0, count) for bit in (1, 2**40)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / count**0.5


def test_key_advances_and_follows_torch_seed() -> None:
    torch.manual_seed(7)
    first = keys(3)
    assert [counter for _, counter in first] == [0, 1, 2]
    torch.manual_seed(8)
    other = keys(2)
    assert [counter for _, counter in other] == [0, 1]
    assert other[0][0] != first[0][0]
    torch.manual_seed(7)
    assert keys(3) == first


def test_manual_seed_is_reproducible_and_overrides_torch_seed() -> None:
    rng.manual_seed(3)
    first = keys(3)
    torch.manual_seed(99)
    assert keys(1)[0] == [first[0][0], 3]
    rng.manual_seed(3)
    assert keys(3) == first
    rng.manual_seed(None)
    assert keys(1)[0][0] != first[0][0]


def test_torch_generator_is_untouched() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    hashes(rng.next_key(CPU), 0, 1000)
    rng.manual_seed(1)
    rng.set_state(rng.get_state())
    assert torch.equal(before, torch.random.get_rng_state())


def test_state_round_trips_through_json() -> None:
    torch.manual_seed(11)
    keys(4)
    state = json.loads(json.dumps(rng.get_state()))
    expected = keys(3)
    torch.manual_seed(12)  # as in a new process that has another seed
    keys(2)
    rng.set_state(state)
    assert keys(3) == expected
    torch.manual_seed(11)
    assert keys(1)[0] == [expected[0][0], 0]


def test_ranks_draw_different_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rank0 = keys(1)[0]
    state = rng.get_state()
    monkeypatch.setattr(rng, "_rank", lambda: 1)
    rank1 = keys(1)[0]
    assert rank1[1] == 0
    assert rank1[0] != rank0[0]
    rng.set_state(state)  # rank 0's checkpoint, loaded on rank 1
    assert keys(1)[0] == [rank1[0], 1]
