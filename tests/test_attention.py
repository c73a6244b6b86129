"""Fused attention: what is coded of its operands and results is as noisy as priced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress import rng
from fxcompress.calibrate import evidence_of
from fxcompress.choose import codable_choice
from fxcompress.evidence import signature
from fxcompress.passes.analyse import analyse
from fxcompress.passes.properties import op_name
from fxcompress.passes.rewrite import KEEP, Choice, rewrite
from fxcompress.record import Recorder, Recording, gradients

SEEDS = 32
SPEC = "affine(bits=4)"


class Model(nn.Module):
    """One layer with peaked scores."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inside(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k, v = (part.contiguous() for part in parts)
        mixed = F.scaled_dot_product_attention(3 * q, 3 * k, v)
        return self.outside(mixed.transpose(1, 2).flatten(2)).square().mean()


@pytest.fixture(scope="module")
def recording() -> Recording:
    torch.manual_seed(0)
    recorder = Recorder(0)
    torch.compile(Model(), backend=recorder)(torch.randn(4, 24, 32)).backward()
    (found,) = recorder.recordings()
    return found


def test_each_alone_is_as_noisy_as_priced(recording: Recording) -> None:
    evidence = evidence_of([recording], probes=16).of(signature(recording.cut))
    assert evidence is not None
    exact = gradients(recording, recording.cut)
    norm = sum(float(g.double().square().sum()) for g in exact)
    read = [c.name for c in recording.candidates if c.attention and c.fake.dim() == 4]
    assert len(read) == 4  # q, k, v and what comes of them
    for name in read:
        cut = recording.cut.copy()
        found = analyse(cut, 0, channels_last=recording.channels_last)
        choices = [codable_choice(c, SPEC) if c.name == name else Choice(c, KEEP) for c in found]
        rewritten = rewrite(cut, choices, "", channels_last=recording.channels_last)
        names = [op_name(n) for n in rewritten.backward.graph.nodes]
        assert "_scaled_dot_product_flash_attention_for_cpu" in names
        rng.manual_seed(1)
        errors = [
            sum(float((a - b).double().square().sum()) for a, b in zip(noisy, exact, strict=True))
            for noisy in (gradients(recording, rewritten) for _ in range(SEEDS))
        ]
        rng.manual_seed(None)
        measured, priced = sum(errors) / SEEDS / norm, evidence[name].prices[SPEC].variance
        assert 0.6 * priced <= measured < 1.7 * priced + 1e-9, name
