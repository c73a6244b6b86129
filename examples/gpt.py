"""A plain GPT, and a script that trains it on a text file, character by character.

    python examples/gpt.py --data shakespeare.txt --policy auto --budget-mb 150 --steps 200

One line is ours, in training.py: `model.compile(backend=fxcompress.backend(...))`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `block` is the longest sequence, in tokens."""

    layers: int
    width: int
    heads: int
    block: int
    vocabulary: int = 65
    dropout: float = 0.1


def small() -> Config:
    """3.2 million parameters; 65 tokens are the characters of the usual Shakespeare file."""
    return Config(layers=4, width=256, heads=4, block=256)


def base() -> Config:
    """85 million parameters: GPT-2's layers, for a GPU."""
    return Config(layers=12, width=768, heads=12, block=512)


def tiny() -> Config:
    """0.4 million parameters: to compare policies over several seeds on a CPU."""
    return Config(layers=3, width=128, heads=4, block=64, dropout=0.0)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=-1)
        )
        # No dropout inside the attention probabilities: with it PyTorch has no fused kernel on
        # CPU, and the (length x length) probabilities would be saved for the backward.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(y.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and a head tied to the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.block, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self._init_weights(config)

    def _init_weights(self, config: Config) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # The two layers that write to the residual stream, as in GPT-2.
                writes = name.endswith(("merge.weight", "down.weight"))
                scale = math.sqrt(2 * config.layers) if writes else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocabulary); the mean cross-entropy when `targets` are given."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.position(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def encode(text: str) -> tuple[Tensor, int]:
    """Character ids of a text and the size of its vocabulary."""
    letters = sorted(set(text))
    ids = {letter: index for index, letter in enumerate(letters)}
    return torch.tensor([ids[letter] for letter in text]), len(letters)


def sample(text: Tensor, batch: int, length: int, generator: torch.Generator) -> list[Tensor]:
    """Random windows of the text: inputs, and the same moved on by one character."""
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    window = starts + torch.arange(length)
    return [text[window], text[window + 1]]


def main(argv: list[str] | None = None) -> int:
    import training  # beside this file

    parser = training.parser(__doc__, data=Path(__file__), batch=16)
    parser.add_argument("--block", type=int, default=small().block, help="sequence length")
    args = parser.parse_args(argv)
    text, vocabulary = encode(args.data.read_text(encoding="utf-8", errors="replace"))
    if len(text) <= args.block:
        parser.error(f"{args.data} has {len(text)} characters: give more than --block")
    torch.manual_seed(args.seed)
    model = GPT(replace(small(), vocabulary=vocabulary, block=args.block))

    def batch_of(generator: torch.Generator) -> list[Tensor]:
        return sample(text, args.batch, args.block, generator)

    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        loss: Tensor = model(*batch)
        return loss

    training.train(model, training.seeded(args.seed, batch_of), loss_of, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
