"""Small real image sets for the demo and the examples, held as bytes in memory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import FxCompressError


class DataError(FxCompressError):
    """The data set cannot be read; the message names the remedy."""


@dataclass(frozen=True)
class Images:
    """Labelled images: `pixels` uint8 (count, 3, size, size), `labels` int64 (count,)."""

    name: str
    pixels: Tensor
    labels: Tensor
    classes: int

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch, normalised to about zero mean and unit variance."""
        chosen = torch.randint(len(self.labels), (size,), generator=generator)
        pixels = self.pixels[chosen].float()
        return (pixels - 128) / 64, self.labels[chosen]


def load(path: Path | None, size: int, count: int = 10_000) -> Images:
    """CIFAR-like JPEG folders where a path is given, the digits of scikit-learn where none is."""
    return digits(size) if path is None else jpeg_folders(path, size, count)


def digits(size: int) -> Images:
    """The 1797 handwritten digits bundled with scikit-learn (8x8), upscaled to 3 x size x size."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn: pip install 'fxcompress[dev]', or give --data "
            "a folder of JPEG images"
        ) from error
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images.reshape(-1, 1, 8, 8).astype(np.float32)) * (255 / 16)
    pixels = _resize(grey, size).to(torch.uint8).expand(-1, 3, -1, -1)
    return Images("digits", pixels, torch.from_numpy(labels.astype(np.int64)), 10)


def jpeg_folders(path: Path, size: int, count: int) -> Images:
    """About `count` images of `train/<class>/*.jpg` under a folder or in a .tar.gz, all classes."""
    try:
        by_class = {
            label: [_decode(image, size) for image in images]
            for label, images in _by_class(path, count).items()
        }
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {error}; give a folder or a .tar.gz") from error
    if not by_class:
        raise DataError(f"{path} has no train/<class>/*.jpg: give such a folder, or its .tar.gz")
    names = sorted(by_class)
    pixels = torch.stack([image for name in names for image in by_class[name]])
    labels = torch.tensor([names.index(name) for name in names for _ in by_class[name]])
    return Images(path.name.split(".")[0], pixels, labels, len(names))


def _by_class(path: Path, count: int) -> dict[str, list[bytes]]:
    """The first JPEG files of each class, evenly many, undecoded."""
    found: dict[str, list[bytes]] = {}
    for label, content in _training_files(path):
        found.setdefault(label, []).append(content)
    each = max(1, count // max(1, len(found)))
    return {label: images[:each] for label, images in found.items()}


def _training_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(class, JPEG bytes) of each training image."""
    if path.is_dir():
        for file in sorted(path.glob("**/train/*/*.jp*g")):
            yield file.parent.name, file.read_bytes()
        return
    with tarfile.open(path) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if parts[-3:-2] == ("train",) and parts[-1].endswith((".jpg", ".jpeg")):
                content = archive.extractfile(member)
                if content is not None:
                    yield parts[-2], content.read()


def _decode(content: bytes, size: int) -> Tensor:
    """Bytes of a JPEG file as uint8 (3, size, size)."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return _resize(image[None].float(), size)[0].to(torch.uint8)


def _resize(images: Tensor, size: int) -> Tensor:
    """Float images (count, channels, height, width) at size x size, values kept in 0 to 255."""
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return resized.clamp(0, 255)
