"""What Inductor writes because it is read more than once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fxcompress.passes import properties as prop
from fxcompress.passes.reuse import reuse
from fxcompress.record import Recorder


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("act", "count"), [(nn.SiLU, 2), (nn.ReLU, 0)])
def test_what_is_written_for_its_second_reader(act: type[nn.Module], count: int) -> None:
    """A sigmoid, however the release spells it, and a norm's output, computed from five tensors."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), act())
    recorder = Recorder(0)
    torch.compile(model, backend=recorder)(torch.randn(4, 3, 8, 8)).sum().backward()
    (recording,) = recorder.recordings()
    written = reuse(recording.cut.backward.graph).written
    assert sum(prop.tensor_bytes(n) == 4 * 4 * 8 * 64 for n in written) == count
