"""Train a torchvision classifier on folders of images: ImageNet, Tiny ImageNet, your own.

    python examples/imagenet.py --data imagenet/ --model resnet50 --budget-mb 8000 --amp bf16
    python examples/imagenet.py --data tiny-imagenet-200/ --size 64 --model resnet18 --policy auto

`--data` holds train/<class>/**/*.jpg (or .JPEG, .png), and val/ likewise if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count

import torch
import torchvision
import training
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Drawn:
    """Batches of indices without end: batch `i` follows from the seed and `i`."""

    def __init__(self, length: int, batch: int, seed: int, start: int) -> None:
        self.length, self.batch, self.seed, self.start = length, batch, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        for index in count(self.start):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            yield torch.randint(self.length, (self.batch,), generator=generator).tolist()


def folder(path: str, size: int, *, train: bool) -> Dataset[tuple[Tensor, int]]:
    crop = (
        [v2.RandomResizedCrop(size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip()]
        if train
        else [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    )
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    found: Dataset[tuple[Tensor, int]] = torchvision.datasets.ImageFolder(
        path, v2.Compose([*crop, *to_tensor])
    )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = training.parser(__doc__, batch=128)
    parser.add_argument("--model", default="resnet50", help="a torchvision classifier")
    parser.add_argument("--size", type=int, default=224, help="image side, pixels")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("--data is needed: a folder with train/<class>/*.jpg")
    images = folder(str(args.data / "train"), args.size, train=True)
    classes = len(images.classes)  # type: ignore[attr-defined]
    torch.manual_seed(args.seed)
    model = torchvision.models.get_model(args.model, num_classes=classes)

    def batches(dataset: Dataset[tuple[Tensor, int]], start: int) -> Iterator[list[Tensor]]:
        drawn = Drawn(len(dataset), args.batch, args.seed, start)  # type: ignore[arg-type]
        return iter(DataLoader(dataset, batch_sampler=drawn, num_workers=args.workers))

    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    training.train(model, lambda start: batches(images, start), loss_of, args)
    if (args.data / "val").is_dir():
        held_out = folder(str(args.data / "val"), args.size, train=False)
        print(f"accuracy on val: {training.accuracy(model, batches(held_out, 0), args):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
