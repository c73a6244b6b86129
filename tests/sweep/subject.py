"""Subject: a model to try, with one batch; what a trial of it is compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Trained:
    """A model in training mode and the arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    Attributes:
        name: "family:model", unique.
        make: builds it; called under a fixed seed.
        group: elements that share a scale; modules with tiny inputs need few, to be coded at all.
        draws: steps to average over for noise and bias.
        predict: whether to calibrate and compare the noise with what that predicts.
        representative: tried with code generation by Inductor, too.
    """

    name: str
    make: Callable[[], Trained]
    group: int = 256
    draws: int = 4
    representative: bool = False
    predict: bool = True

    @property
    def family(self) -> str:
        return self.name.partition(":")[0]


def loss_of(output: Any) -> Tensor:
    """Sum of all differentiable outputs, each element with a weight of its own.

    The weights are the same in every call. Means and sums would hide errors that cancel out.
    """
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(())
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator)
            total = total + (leaf.float() * weights).sum()
    return total
