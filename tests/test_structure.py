"""bench codecs --beyond: what is known of a tensor is what the figures say of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcompress.tools.structure import _dct, _haar, _hadamard, structure


def errors(
    first: Tensor, second: Tensor, before: tuple[Tensor, Tensor, int] | None = None
) -> dict[str, float]:
    rows = structure("x", first, second, -1, before)
    return {row["model"]: row["error at 2 bits"] for row in rows}


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_transforms_are_orthonormal(side: int) -> None:
    for matrix in (_hadamard(side), _dct(side), _haar(side)):
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(side))


def test_what_is_white_has_the_bound_whatever_the_transform() -> None:
    torch.manual_seed(0)
    found = errors(torch.randn(64, 8, 8, 16), torch.randn(64, 8, 8, 16))
    for name in ("channels alone", "Walsh–Hadamard", "DCT", "Haar", "KLT over space"):
        assert found[name] == pytest.approx(1 / 16, rel=0.03)


def test_what_is_smooth_gains_by_space_most_by_its_own_basis() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8, 8, 16).cumsum(1).cumsum(2)
    found = errors(x[:100], x[100:])
    assert found["DCT"] < found["Walsh–Hadamard"] < found["channels alone"]
    assert found["KLT over space"] < 1.02 * found["DCT"]


def test_what_follows_from_the_tensor_before_needs_no_bits_of_its_own() -> None:
    torch.manual_seed(0)
    before = torch.randn(512, 64) * torch.logspace(0, -3, 64)
    x = before @ torch.randn(64, 256)
    found = errors(x[:256], x[256:], (before[:256], before[256:], -1))
    assert found["Walsh–Hadamard, predicted from the tensor before"] < 0.2 * found["Walsh–Hadamard"]


def test_a_rank_is_paid_for() -> None:
    torch.manual_seed(0)
    strong = 20 * torch.randn(8, 64, 1) @ torch.randn(8, 1, 64)  # each sample has its own
    x = strong + torch.randn(8, 64, 64)
    found = errors(x, x)
    assert found["Walsh–Hadamard, without rank 1 of each sample"] < 0.9 * found["Walsh–Hadamard"]
    white = torch.randn(8, 64, 64)
    found = errors(white, torch.randn(8, 64, 64))
    assert found["Walsh–Hadamard, without rank 1 of each sample"] > found["Walsh–Hadamard"]
