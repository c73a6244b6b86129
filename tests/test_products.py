"""Products of a weight that is used twice: made where they stand, not at the backward's end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fxcompress
from fxcompress.passes.products import held_for_sums, keep_products
from fxcompress.passes.properties import op_name
from fxcompress.record import Recorder, gradients


class Tied(nn.Module):
    """Its last layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(11, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.embedding(x)))
        return F.linear(hidden, self.embedding.weight).logsumexp(-1).mean()


@pytest.fixture
def tokens() -> Tensor:
    torch._dynamo.reset()
    return torch.randint(11, (4, 64))


def test_only_what_holds_more_than_it_makes(tokens: Tensor) -> None:
    recorder = Recorder(0)
    torch.compile(Tied(), backend=recorder)(tokens).backward()
    (recording,) = recorder.recordings()
    cut = recording.cut.copy()
    ((product, total, operands),) = held_for_sums(cut)
    assert (op_name(product), op_name(total)) == ("mm", "add")
    # The gradient of the logits and the last layer's input; the weight itself is there anyway.
    assert sum(n.meta["val"].numel() for n in operands) == 4 * 64 * (11 + 16)
    keep_products(cut)
    assert not held_for_sums(cut)
    for found, exact in zip(
        gradients(recording, cut), gradients(recording, recording.cut), strict=True
    ):
        assert torch.equal(found, exact)


def test_inductor_does_not_put_it_off(tokens: Tensor) -> None:
    def code(backend: object) -> str:
        torch._dynamo.reset()
        compiled = torch.compile(Tied(), backend=backend)
        _, (_, backward) = run_and_get_code(lambda: compiled(tokens).backward())
        return str(backward)

    assert "addmm(" in code("inductor")  # else this pass has had its day
    assert "addmm(" not in code(fxcompress.backend(policy="uniform4", min_bytes=0))
