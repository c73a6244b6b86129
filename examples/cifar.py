"""Train a classifier of small images: CIFAR-10, CIFAR-100, or your own.

    python examples/cifar.py --data ~/data --download cifar10 --policy auto --budget-mb 100
    python examples/cifar.py --data images/ --model resnet20 --policy uniform4 --csv log.csv

`--data` is a folder with torchvision's CIFAR, or one with train/<class>/*.jpg, or a .tar.gz of
that; without it, the digits of scikit-learn. Several policies: `fxcompress bench accuracy`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import resnet
import torch
import torchvision
import training
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.tools import data

OWN = {
    "resnet20": resnet.resnet20,
    "resnet164": resnet.resnet164,
    "wrn28-10": resnet.wrn28_10,
}
STORED = {
    "cifar-10-batches-py": torchvision.datasets.CIFAR10,
    "cifar-100-python": torchvision.datasets.CIFAR100,
}


def make(name: str, classes: int) -> nn.Module:
    """One of ours for 32 × 32, or any of torchvision's, ResNets with a stem for small images."""
    if name in OWN:
        return OWN[name](classes)
    model: nn.Module = torchvision.models.get_model(name, num_classes=classes)
    if isinstance(model, torchvision.models.ResNet):
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model


def load(path: Path | None, size: int, count: int) -> tuple[data.Images, data.Images]:
    """(to train on, held out)."""
    for name, dataset in STORED.items():
        if path is not None and (path / name).is_dir():
            return _stored(dataset, path, True), _stored(dataset, path, False)
    images = data.load(path, size, count)
    held_out = torch.arange(len(images.labels)) % 10 == 9
    return _part(images, ~held_out), _part(images, held_out)


def _stored(dataset: type, path: Path, train: bool) -> data.Images:
    found = dataset(path, train=train)
    pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return data.Images(dataset.__name__, pixels, torch.tensor(found.targets), len(found.classes))


def _part(images: data.Images, chosen: Tensor) -> data.Images:
    return replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])


def main(argv: list[str] | None = None) -> int:
    parser = training.parser(__doc__, batch=64)
    parser.add_argument("--model", default="resnet18", help=f"{', '.join(OWN)}, or torchvision's")
    parser.add_argument("--size", type=int, default=32, help="image side, pixels")
    parser.add_argument("--images", type=int, default=10_000, help="how many of a folder to use")
    parser.add_argument("--download", choices=["cifar10", "cifar100"], help="into --data first")
    args = parser.parse_args(argv)
    if args.download:
        dict(zip(("cifar10", "cifar100"), STORED.values(), strict=True))[args.download](
            args.data, download=True
        )
    images, held_out = load(args.data, args.size, args.images)
    torch.manual_seed(args.seed)
    model = make(args.model, images.classes)

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels, labels = images.batch(args.batch, generator)
        flip = torch.rand(args.batch, generator=generator) < 0.5
        return torch.where(flip[:, None, None, None], pixels.flip(-1), pixels), labels

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    training.train(model, training.seeded(args.seed, sample), loss_of, args)
    tests = training.seeded(1, lambda generator: held_out.batch(args.batch, generator))
    print(f"accuracy on held-out images: {training.accuracy(model, tests(0), args):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
