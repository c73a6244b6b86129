"""average: neighbours share their mean, and means take 2 bits. Biased; below 1 bit an element.

Average Quantization (code of 2023; its successor is ALAM, ICLR 2024). For beta bits an element,
a = 2/beta neighbours become their fp32 mean (blocks.py), and the means, as a vector, are coded by
affine(bits=2,group), stochastically:

    x'   = clamp(decoded mean, finite range of dtype)       beta > 0
    x'   = clamp(bf16(mean), finite range of dtype)         beta = 0: one mean a `group` of elements

Neighbours follow each other in storage (along=storage, as published; a last, shorter block has its
true mean), or in space (along=space): blocks of 1x2, 2x2, 2x4 or 4x4 in H x W, with ragged edges of
partial blocks, or runs along the tokens. Means in space are ordered samples x channels x positions,
whatever the memory format, so that a group has few channels. Channels-last, neighbours in storage
are channels. Squared error over squared values, mean of 40 tensors of ResNet-18 (64x64 images, 100
steps in), at beta 1, 0.5, 0.25 and 0.125:

    storage  channels-last 0.60 0.72 0.76 0.79   NCHW 0.46 0.55 0.62 0.67
    space    either        0.46 0.55 0.60 0.64   (small maps leave blocks partly filled: more bits)

`group` counts means: 256 is the layout of the ActNN side, 256*beta that of the GACT side, and 128
at beta=0.5 that of ALAM; the last group is not padded. A group with NaN or Inf decodes to NaN.

payload = that of affine for m means;                     beta = 0: mean bf16[groups]
bytes   = 2*ceil(m/8) + 4*ceil(m/group);                  beta = 0: 2*ceil(n/group)
error   = bias mean - x, variance affine's of the mean, the same noise for a whole block;
          beta = 0: no variance
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fxcompress.codecs import blocks
from fxcompress.codecs.affine import Affine
from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.grid import narrow
from fxcompress.codecs.planar import group_chunks
from fxcompress.errors import CodecError
from fxcompress.kernels import triton

if TYPE_CHECKING:
    from fxcompress.kernels.triton.space import Space

_BF16 = torch.bfloat16
_SPACE = {1.0: (1, 2), 0.5: (2, 2), 0.25: (2, 4), 0.125: (4, 4)}  # block (H, W) of each beta


@dataclass(frozen=True)
class Average(Codec):
    """`beta` (1, 0.5, 0.25, 0.125 or 0) bits an element, a bf16 pair a `group` of means."""

    beta: float = 0.5
    group: int = 256
    along: str = "storage"
    channels: int = 1

    name: ClassVar[str] = "average"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS

    def __post_init__(self) -> None:
        if self.beta != 0 and self.beta not in _SPACE:
            raise CodecError(f"{self}: beta must be 1, 0.5, 0.25, 0.125 or 0")
        if self.group < 8 or self.group % 8:
            raise CodecError(f"{self}: group must be a multiple of 8, at least 8")
        if self.along not in {"storage", "space"}:
            raise CodecError(f"{self}: along must be storage or space")
        if self.beta == 0 and self.along == "space":
            raise CodecError(f"{self}: groups of beta=0 follow storage: leave out along")

    @property
    def unbiased(self) -> bool:
        """Never: a mean is not its elements, over whatever keys."""
        return False

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        means = math.prod(self._means_shape(shape))
        return 2 * means if self.beta == 0 else self._code.payload_bytes([means], torch.float32)

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if self._on_gpu(x):
            from fxcompress.kernels.triton import average as gpu

            if self.beta == 0:
                triton.run(gpu.means(x, payload.view(_BF16), self.group))
                return True
            assert key is not None
            if self.along == "storage":
                parts = self._code.carve(payload, self._means_shape(x.shape))
                triton.run(gpu.encode(x, parts, self._run(), self.group, key, stream))
                return True
            if (where := self._space(x)) is not None:
                from fxcompress.kernels.triton import space

                means = torch.empty(self._means_shape(x.shape), device=x.device).view(-1)
                triton.run(space.survey(x, means, None, where, means=True, raw=True))
                return self._code.encode_kernel(means, payload, key, stream)
        return self.beta > 0 and self._code.encode_kernel(self._means(x), payload, key, stream)

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if self._on_gpu(x):
            from fxcompress.kernels.triton import average as gpu

            if self.beta == 0:
                triton.run(gpu.fill(payload.view(_BF16), x, self.group))
                return True
            parts = self._code.carve(payload, self._means_shape(x.shape))
            if self.along == "storage":
                triton.run(gpu.decode(parts, x, self._run(), self.group))
                return True
            if (where := self._space(x)) is not None:
                triton.run(gpu.fill_space(parts, x, where, self.group))
                return True
        if self.beta == 0:
            return False
        means = torch.empty(math.prod(self._means_shape(x.shape)), device=x.device)
        if not self._code.decode_kernel(payload, means, key, stream):
            return False
        self._spread(means, x)
        return True

    def _on_gpu(self, x: Tensor) -> bool:
        group = (
            self.group * self._run() if self.beta > 0 and self.along == "storage" else self.group
        )
        return x.numel() > 0 and triton.takes(x, group)

    def _space(self, x: Tensor) -> Space | None:
        """Where the kernels find the blocks of x in space; None where ATen does the work."""
        from fxcompress.kernels.triton.space import space

        sides = self._blocks(len(blocks.layout(x.shape, self.channels)[0]))
        return space(x.shape, self.channels, sides)

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        if self.beta == 0:
            payload.view(_BF16).copy_(_rounded(self._means(x)))
        else:
            self._code.encode_reference(self._means(x), payload, keys)

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        means = torch.empty(math.prod(self._means_shape(x.shape)), device=x.device)
        if self.beta == 0:
            means.copy_(payload.view(_BF16))
        else:
            self._code.decode_reference(payload, means, keys)
        self._spread(means, x)

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        x = x.detach().contiguous()
        means = self._means(x)
        if self.beta == 0:
            means = _rounded(means).float()
            noise = torch.where(means.isnan(), math.inf, 0.0)
        else:
            noise = self._code.error(means).variance
        mean, variance = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
        self._spread(means, mean)
        self._spread(noise, variance, math.inf)
        return ErrorModel(variance, torch.where(variance.isfinite(), mean - x, 0.0))

    @property
    def _code(self) -> Affine:
        """What codes the means."""
        return Affine(2, self.group)

    def _blocks(self, rank: int) -> tuple[int, ...]:
        """Block lengths of the last axes of positions of a tensor of `rank` (>= 3) axes."""
        return _SPACE[self.beta] if rank > 3 else (math.prod(_SPACE[self.beta]),)

    def _means_shape(self, shape: Sequence[int]) -> list[int]:
        if self.along == "space":
            laid, axis = blocks.layout(shape, self.channels)
            return blocks.pooled(laid, axis, self._blocks(len(laid)))
        size = self._run()
        return [(math.prod(shape) + size - 1) // size]

    def _run(self) -> int:
        """Elements a block in storage."""
        return self.group if self.beta == 0 else math.prod(_SPACE[self.beta])

    def _means(self, x: Tensor) -> Tensor:
        """The fp32 means of a contiguous x, flat, in the order of `_means_shape`."""
        means = torch.empty(self._means_shape(x.shape), device=x.device)
        if x.numel() == 0:
            return means.view(-1)
        if self.along == "space":
            laid, axis = blocks.layout(x.shape, self.channels)
            x = x.view(laid)
            for part in blocks.samples(laid, x.device):
                values = blocks.planes(x[part], axis).float()
                means[part] = blocks.pool(values, self._blocks(len(laid)))
            return means.view(-1)
        flat, run = x.view(-1), self._run()
        for start, rows, size in group_chunks(flat.numel(), run, x.device):
            values = flat[start : start + rows * size].view(rows, size).float()
            block = 1 << (run - 1).bit_length()
            means[start // run : start // run + rows] = blocks.pool(values, [block]).view(-1)
        return means

    def _spread(self, means: Tensor, x: Tensor, limit: float | None = None) -> None:
        """Fill x with the mean of each element, clamped to the finite range of its dtype."""
        limit = limit or torch.finfo(x.dtype).max
        means = means.clamp(-limit, limit).to(x.dtype)
        if self.along == "space" and x.numel():
            laid, axis = blocks.layout(x.shape, self.channels)
            target, lengths = blocks.planes(x.view(laid), axis), self._blocks(len(laid))
            means = means.view(self._means_shape(x.shape))
            target.copy_(blocks.spread(means, lengths, target.shape[-len(lengths) :]))
        else:
            x.view(-1).copy_(means.repeat_interleave(self._run())[: x.numel()])


def _rounded(means: Tensor) -> Tensor:
    """To bf16; NaN where the mean is not finite."""
    limit = torch.finfo(_BF16).max
    return narrow(torch.where(means.isfinite(), means.clamp(-limit, limit), math.nan), _BF16)
