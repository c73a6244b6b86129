"""bench soak: what it calls growth, and a short run of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fxcompress.tools import cli
from fxcompress.tools.bench_soak import Sample, judge

STEADY = [Sample(100 * i, 500.0, 40, 9000, 2.0, 3.0, 1.0) for i in range(1, 31)]


def failures(*samples: Sample) -> list[str]:
    return judge(samples, budget_mb=3.5, steps=3000).failures


def test_steady_is_no_growth() -> None:
    assert failures(*STEADY) == []
    # Caches that fill up in the first tenth, and a sample that something else disturbed.
    first = [replace(s, rss_mb=300.0, objects=100, step_ms=9.0) for s in STEADY[:3]]
    disturbed = [replace(STEADY[20], step_ms=50.0)]
    assert failures(*first, *STEADY[3:20], *disturbed, *STEADY[21:]) == []


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("rss_mb", "resident memory grew"),
        ("tensors", "tensors piled up"),
        ("objects", "Python objects piled up"),
        ("step_ms", "steps became slower"),
    ],
)
def test_growth_is_found(what: str, text: str) -> None:
    """A tenth more in the end than in the beginning, evenly along the way."""
    slope = 0.2 if what == "step_ms" else 0.1
    grown = [
        replace(s, **{what: type(getattr(s, what))(getattr(s, what) * (1 + slope * i / 30))})
        for i, s in enumerate(STEADY)
    ]
    assert failures(*grown) == [text]


def test_one_step_above_the_budget_is_enough() -> None:
    assert failures(replace(STEADY[0], peak_mb=3.6), *STEADY[1:]) == ["the budget was exceeded"]


@pytest.mark.slow
def test_a_thousand_steps(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["bench", "soak", "--steps", "1000", "--samples", "20", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["failures"] == []
    assert code == 0
    assert found["samples"][-1]["loss"] < found["samples"][0]["loss"]


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "soak", "--steps", "20"]) == 2
    assert "10 steps or more" in capsys.readouterr().err
