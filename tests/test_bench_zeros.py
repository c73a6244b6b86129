"""bench zeros: its bytes, on a network of ReLUs whose zeros are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxcompress.record import Recorder
from fxcompress.tools.bench_zeros import measure


def test_sizes_follow_from_the_zeros() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    recorder = Recorder(0)
    layers = [nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model, x = nn.Sequential(*layers, nn.Linear(64, 64), nn.SiLU()), torch.randn(128, 64)
    torch.compile(model, backend=recorder)(x).sum().backward()
    rows = measure(recorder.recordings()[0])
    positives = int((model[0](x) > 0).sum())
    size = 4 * x.numel()
    found = [row for row in rows if row.zeros == pytest.approx(1 - positives / x.numel())]
    assert len(found) == 1
    assert found[0].has_mask
    assert found[0].fp32_mb == size / 1e6
    assert found[0].lossless_mb == (x.numel() / 8 + 4 * positives) / 1e6
    assert found[0].plain_4_bits_mb == x.numel() / 256 * (128 + 4) / 1e6
    assert found[0].sparse_4_bits_mb < found[0].plain_4_bits_mb * 0.6  # its mask is saved anyway
    dense = [row for row in rows if row.zeros == 0]
    assert dense
    assert all(row.lossless_mb == row.fp32_mb for row in dense)
