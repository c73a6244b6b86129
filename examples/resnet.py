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


class ResNet(nn.Module):
    """Three stages of n blocks, of `width`, 2·width and 4·width channels."""

    def __init__(self, n: int, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        sizes = [width] + [width << stage for stage in range(3) for _ in range(n)]
        strides = [2 if i in (n, 2 * n) else 1 for i in range(3 * n)]
        self.blocks = nn.Sequential(
            *(Block(a, b, s) for a, b, s in zip(sizes, sizes[1:], strides, strict=False))
        )
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        features = torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1)
        logits: Tensor = self.head(features)
        return logits


def resnet20(classes: int = 10) -> ResNet:
    """0.27 million parameters."""
    return ResNet(3, classes=classes)


def resnet8(classes: int = 10) -> ResNet:
    """0.08 million parameters: one block a stage."""
    return ResNet(1, classes=classes)
