"""The small ResNets for CIFAR of He et al. (arXiv 1512.03385, section 4.2): 6n + 2 layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut; where it changes size, the shortcut has none."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, self.more)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, norm and ReLU before each (arXiv 1603.05027); out: `width`."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        sizes = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, width, 1, 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size, *_ in sizes)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False) for a, b, kernel, step in sizes
        )
        same = inputs == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        y = self.convs[1](F.relu(self.norms[1](y)))
        return shortcut + self.convs[2](F.relu(self.norms[2](y)))


class ResNet(nn.Module):
    """Three stages of n blocks, of `width`, 2·width and 4·width channels after a stem of `stem`."""

    def __init__(
        self,
        n: int,
        width: int = 16,
        classes: int = 10,
        stem: int | None = None,
        block: type[nn.Module] = Block,
    ) -> None:
        super().__init__()
        stem = width if stem is None else stem
        self.conv = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(stem)
        sizes = [stem] + [width << stage for stage in range(3) for _ in range(n)]
        strides = [2 if i in (n, 2 * n) else 1 for i in range(3 * n)]
        self.blocks = nn.Sequential(
            *(block(a, b, s) for a, b, s in zip(sizes, sizes[1:], strides, strict=False))
        )
        self.last = nn.BatchNorm2d(sizes[-1]) if block is Bottleneck else None
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        if self.last is not None:
            x = F.relu(self.last(x))
        features = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.head(features)
        return logits


def resnet20(classes: int = 10) -> ResNet:
    """0.27 million parameters."""
    return ResNet(3, classes=classes)


def resnet8(classes: int = 10) -> ResNet:
    """0.08 million parameters: one block a stage."""
    return ResNet(1, classes=classes)


def resnet164(classes: int = 10) -> ResNet:
    """1.7 million parameters: 54 bottlenecks (9n + 2 layers), norms before convolutions."""
    return ResNet(18, 64, classes, stem=16, block=Bottleneck)


def wrn28_10(classes: int = 10) -> ResNet:
    """36 million parameters: four blocks a stage, ten times as wide (arXiv 1605.07146)."""
    return ResNet(4, 160, classes, stem=16)
