"""A plan is tried on a recorded step before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import trial
from fxcompress.calibrate import evidence_of
from fxcompress.choose import codable_choice, is_codable
from fxcompress.codecs import codec
from fxcompress.evidence import signature
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.record import Recorder, Recording

COARSE, FINE = (codec(f"affine(bits={b},group=256)").spec for b in (2, 8))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Exploding(nn.Module):
    """The second layer's gradient is the exponential of what the first one saves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(torch.tanh(x)) + torch.exp(x)
        return self.last(y).square().mean()


def batch(rows: int = 512) -> Tensor:
    return 4 * torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def recording() -> Recording:
    recorder = Recorder(min_bytes=1024, inner="aot_eager")
    torch.compile(Exploding(), backend=recorder)(batch()).backward()
    (found,) = recorder.recordings()
    return found


def choices_of(recording: Recording, spec: str) -> list[Choice]:
    return [
        codable_choice(c, spec) if is_codable(c) else Choice(c, KEEP) for c in recording.candidates
    ]


def test_a_sound_plan_takes_one_run(recording: Recording) -> None:
    evidence = evidence_of([recording]).of(signature(recording.cut))
    assert evidence is not None
    choices = [
        replace(c, representation="affine(bits=8,group=256)") if c.codec_spec else c
        for c in choices_of(recording, COARSE)
    ]
    found = trial.attempt(recording, choices, evidence)
    assert found.evidence is None
    assert found.measured < 3 * found.predicted + 1e-3


def test_the_tensor_at_fault_is_found(recording: Recording) -> None:
    """Measurements that make one tensor out to be harmless are put right; others stay."""
    evidence = evidence_of([recording]).of(signature(recording.cut))
    assert evidence is not None
    choices = choices_of(recording, COARSE)
    honest = trial.attempt(recording, choices, evidence)
    coded = [c.candidate.name for c in choices if c.codec_spec]
    assert len(coded) > 1
    worst = max(coded, key=lambda n: evidence[n].prices[COARSE].variance)
    harmless = {
        spec: replace(price, variance=1e-9 * price.variance)
        for spec, price in evidence[worst].prices.items()
    }
    wrong = {**evidence, worst: replace(evidence[worst], prices=harmless)}
    found = trial.attempt(recording, choices, wrong)
    assert found.measured == pytest.approx(honest.measured, rel=1e-3)
    assert found.evidence is not None
    changed = {n for n in coded if found.evidence[n] != wrong[n]}
    assert worst in changed
    right = found.evidence[worst].prices
    only = [c if c.candidate.name == worst else Choice(c.candidate, KEEP) for c in choices]
    alone = trial.attempt(recording, only, evidence).measured
    assert right[COARSE].variance == pytest.approx(alone, rel=1e-3)
    assert right[FINE] == harmless[FINE], "only what is as coarse"


def test_a_compile_mends_its_plan(caplog: pytest.LogCaptureFixture) -> None:
    """Of measurements on data of another kind, which hold for none of the tensors."""
    model, x = Exploding(), batch(4096)
    calibration = fxcompress.calibrate(model, x[:512] / 50, loss=lambda loss: loss, min_bytes=1024)
    settings = {"calibration": calibration, "ratio_saved": 50.0, "min_bytes": 1024}
    backend = fxcompress.backend(inner="aot_eager", **settings)
    compiled = torch.compile(model, backend=backend)
    with caplog.at_level("INFO", logger="fxcompress"):
        compiled(x).backward()
    assert "a trial was off by" in caplog.text
    plan = backend.plan()
    assert plan.tried_variance is not None
    assert plan.tried_variance <= max(trial.TRUSTED * plan.predicted_variance, trial.NEGLIGIBLE)
    assert "predicted" in plan.remarks
