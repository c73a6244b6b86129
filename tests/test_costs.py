"""The table of codec times, and what it says of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress import costs, torch_private
from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.codecs.transform import Transform
from fxcompress.fit import at_rate, fit
from fxcompress.ladder import specs
from fxcompress.record import Recorder, Recording


@pytest.fixture(scope="module")
def rates() -> costs.Rates:
    return costs.rates("cpu")


@pytest.fixture(scope="module")
def recording() -> Recording:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))
    recorder = Recorder(1024)
    torch.compile(model, backend=recorder)(torch.randn(256, 64)).square().sum().backward()
    return recorder.recordings()[0]


def test_every_codec_that_is_priced_is_timed(rates: costs.Rates) -> None:
    assert set(rates.coders) == set(specs())
    assert min(rates.coders.values()) > 0
    assert min(rates.flops, rates.bytes, rates.basis) > 0
    assert 0 < rates.call < 1e-3
    assert 0 < rates.basis_call < 1e-3


def test_the_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "cache_dir", lambda: tmp_path)
    first = costs._own.__wrapped__("cpu")
    assert costs._own.__wrapped__("cpu") == first
    (found,) = (tmp_path / "fxcompress").glob("rates-*")
    found.write_text("{")  # a damaged table is measured again
    again = costs._own.__wrapped__("cpu")
    assert set(again.coders) == set(first.coders)


def test_a_step_takes_as_long_as_its_products(rates: costs.Rates, recording: Recording) -> None:
    cut, candidates = recording.cut, recording.candidates
    alone = costs.step_seconds(cut, [], rates)
    # Three products a layer, less the gradient of the input that nobody asks for.
    assert alone == pytest.approx(256 * (2 * 2 * 64 * 128 + 3 * 2 * 128 * 8) / rates.flops)
    assert costs.step_seconds(cut, candidates, rates) > alone
    assert costs.step_seconds(cut, [], replace(rates, flops=rates.flops / 2)) > 1.9 * alone


def test_codecs_add_their_time_by_the_element(rates: costs.Rates, recording: Recording) -> None:
    found = next(c for c in recording.candidates if is_codable(c) and c.own_bytes == 256 * 128 * 4)
    assert costs.added_seconds(exact_choice(found), rates) == 0
    slow = replace(rates, coders={**rates.coders, "rotate(bits=2)": 1000.0})
    choice = codable_choice(found, "rotate(bits=2)")
    seconds = costs.added_seconds(choice, slow)
    assert seconds == pytest.approx(256 * 128 * 1e-6, rel=0.2)
    later = costs.added_seconds(choice, replace(slow, call=1.0))
    assert later == pytest.approx(seconds + 1 - slow.call)
    # As long as its kin where a variant was not timed.
    other = codable_choice(found, "rotate(bits=2,group=128)")
    assert costs.added_seconds(other, slow) == pytest.approx(seconds)


def test_a_transform_takes_its_basis_and_its_coders(
    rates: costs.Rates, recording: Recording
) -> None:
    found = next(c for c in recording.candidates if is_codable(c) and c.own_bytes == 256 * 128 * 4)
    x = torch.randn(256, 128)
    codec = at_rate(fit(x, [torch.randn_like(x)], -1), 1.0)
    assert isinstance(codec, Transform)
    choice = codable_choice(found, codec.spec)
    with_basis = costs.added_seconds(choice, rates)
    coded = replace(rates, basis=0.0, basis_call=0.0)
    without = costs.added_seconds(choice, coded)
    of_basis = 256 * 128 * rates.basis * 1e-9 + rates.basis_call
    assert with_basis - without == pytest.approx(of_basis)
    assert without > 0
