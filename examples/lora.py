"""Adapt a frozen GPT to a text by low-rank adapters (LoRA, arXiv 2106.09685).

    python examples/gpt.py --data old.txt --checkpoint gpt.pt
    python examples/lora.py --weights gpt.pt --data new.txt --rank 8 --policy auto --budget-mb 100

Frozen weights need no gradient, but gradients pass through them, so activations are saved all the
same: they are most of the memory here. Keep characters to those of the text it was trained on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import gpt
import torch
import training
from torch import Tensor, nn


class Adapted(nn.Module):
    """A frozen linear layer, plus scale · B A x of low rank; B starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), scale
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.linear(x) + self.scale * self.b(self.a(x))
        return adapted


def adapt(model: gpt.GPT, rank: int) -> gpt.GPT:
    """All frozen but adapters in the blocks' linear layers."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "merge", "up", "down"):
            setattr(block, name, Adapted(getattr(block, name), rank))
    return model


def main(argv: list[str] | None = None) -> int:
    parser = training.parser(__doc__, data=Path(__file__), batch=16)
    parser.add_argument("--weights", type=Path, help="a checkpoint of gpt.py")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--block", type=int, default=128, help="sequence length")
    args = parser.parse_args(argv)
    text, vocabulary = gpt.encode(args.data.read_text(encoding="utf-8", errors="replace"))
    torch.manual_seed(args.seed)
    config = replace(gpt.small(), vocabulary=vocabulary)
    weights = torch.load(args.weights, weights_only=True)["model"] if args.weights else None
    if weights is not None:
        known, block = weights["embedding.weight"].shape[0], weights["position.weight"].shape[0]
        config = replace(config, vocabulary=known, block=block)
        text = text.clamp(max=known - 1)
    model = gpt.GPT(config)
    if weights is not None:
        model.load_state_dict(weights)
    adapt(model, args.rank)
    length = min(args.block, config.block)

    def sample(generator: torch.Generator) -> list[Tensor]:
        return gpt.sample(text, args.batch, length, generator)

    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        loss: Tensor = model(*batch)
        return loss

    training.train(model, training.seeded(args.seed, sample), loss_of, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
