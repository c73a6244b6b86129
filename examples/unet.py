"""Train a small diffusion U-Net: its skip connections hold memory from one end to the other.

    python examples/unet.py --data images/ --size 32 --policy auto --budget-mb 200 --amp bf16

`--data` as in cifar.py. The network predicts the noise that was added (DDPM, arXiv 2006.11239), at
a continuous time with a cosine schedule.
"""

from __future__ import annotations

import math
import sys

import torch
import training
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.tools import data


class Block(nn.Module):
    """Two 3×3 convolutions with group norms, the time added between them."""

    def __init__(self, inputs: int, width: int, times: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, width, 3, 1, 1)
        self.time = nn.Linear(times, width)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """Three resolutions of `width`, 2·width and 4·width channels."""

    def __init__(self, width: int = 32, channels: int = 3) -> None:
        super().__init__()
        times = 4 * width
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, times), nn.SiLU(), nn.Linear(times, times))
        self.stem = nn.Conv2d(channels, width, 3, 1, 1)
        sizes = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(
            Block(a, b, times) for a, b in zip([width, *sizes], sizes, strict=False)
        )
        self.middle = Block(sizes[-1], sizes[-1], times)
        self.up = nn.ModuleList(
            Block(2 * b, a, times) for a, b in zip([width, *sizes], sizes, strict=False)
        )
        self.head = nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """The noise in images x (batch, channels, side, side) at time (batch,) in 0 … 1."""
        frequencies = torch.exp(torch.linspace(0, math.log(1000), self.width // 2, device=x.device))
        angles = time[:, None] * frequencies
        embedded = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.stem(x)
        skips = []
        for block in self.down:
            x = block(x, embedded)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, embedded)
        for block in reversed(self.up):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1), embedded)
        noise: Tensor = self.head(F.silu(x))
        return noise


def main(argv: list[str] | None = None) -> int:
    parser = training.parser(__doc__, lr=5e-4)
    parser.add_argument("--size", type=int, default=32, help="image side, a multiple of 8")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--images", type=int, default=10_000, help="how many of a folder to use")
    args = parser.parse_args(argv)
    images = data.load(args.data, args.size, args.images)
    torch.manual_seed(args.seed)

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        pixels, _ = images.batch(args.batch, generator)
        time = torch.rand(args.batch, generator=generator)
        noise = torch.randn(pixels.shape, generator=generator)
        share = (time * math.pi / 2)[:, None, None, None]
        return share.cos() * pixels + share.sin() * noise, time, noise

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        noisy, time, noise = batch
        return F.mse_loss(model(noisy, time), noise)

    training.train(UNet(args.width), training.seeded(args.seed, sample), loss_of, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
