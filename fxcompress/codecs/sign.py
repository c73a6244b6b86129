"""sign: one bit an element. Biased, without noise.

Auxiliary sign activations (ASA; Woo, Lee and Jeon, "Learning with Auxiliary Activation for
Memory-Efficient Training", ICLR 2023): a linear layer saves s = sign(x), 0 -> -1, and adds eps*s to
its own input, so that the weight gradient may be taken from s. Decoding gives a stand-in for x:

    scale=one   s
    scale=mean  m*s, m = mean|x| of a group of consecutive elements: the least-squares best of all
                multiples of s (XNOR-Net, Rastegari et al., ECCV 2016, section 3.1)

    m = M * (sum rint(|x|/M * 2^15) / (size*2^15)), M = max|x|, rounded to the nearest bf16

in fp32 and integers, so that the order of the sum changes no bit. With mean, a group with NaN or
Inf decodes to NaN, alone. With one there is nothing to hold that: NaN comes back as -1.

payload = bits (planar) | mean: m bf16[groups]
bytes   = ceil(n/8), with mean even(ceil(n/8)) + 2*ceil(n/group)
error   = variance 0, bias x' - x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.codecs.base import FLOATS, Codec, ErrorModel, Keys
from fxcompress.codecs.grid import check_choice, fixed_error, narrow
from fxcompress.codecs.payload import Section, carve, section_bytes
from fxcompress.codecs.planar import code_bytes, group_chunks, pack, unpack
from fxcompress.errors import CodecError
from fxcompress.kernels import triton

_BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sign(Codec):
    """Signs, times one or times the mean magnitude of a `group` (a multiple of 8)."""

    scale: str = "one"
    group: int = 256

    name: ClassVar[str] = "sign"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "scale", ("one", "mean"))
        if self.group < 8 or self.group % 8:
            raise CodecError(f"{self}: group must be a multiple of 8, at least 8")

    @property
    def unbiased(self) -> bool:
        """As `Codec.unbiased`."""
        return False

    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return section_bytes(*self._sections(math.prod(shape)))

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        if not triton.takes(x, self.group):
            return False
        from fxcompress.kernels.triton import sign as gpu

        triton.run(gpu.encode(x, carve(payload, *self._sections(x.numel())), self.group))
        return True

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        if not triton.takes(x, self.group):
            return False
        from fxcompress.kernels.triton import sign as gpu

        triton.run(gpu.decode(carve(payload, *self._sections(x.numel())), x, self.group))
        return True

    def error(self, x: Tensor) -> ErrorModel:
        self.check_dtype(x.dtype)
        return fixed_error(self, x)

    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        flat = x.view(-1)
        bits, *scales = carve(payload, *self._sections(flat.numel()))
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            values = flat[start : start + rows * size].view(rows, size)
            packed = pack((values > 0).to(torch.uint8), 1).view(-1)
            at = code_bytes(start, 1)
            bits[at : at + packed.numel()] = packed
            if scales:
                group = start // self.group
                scales[0][group : group + rows] = narrow(_mean_magnitude(values.float()), _BF16)

    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        flat, limit = x.view(-1), torch.finfo(x.dtype).max
        bits, *scales = carve(payload, *self._sections(flat.numel()))
        for start, rows, size in group_chunks(flat.numel(), self.group, flat.device):
            at = code_bytes(start, 1)
            packed = bits[at : at + rows * code_bytes(size, 1)].view(rows, -1)
            values = unpack(packed, 1, size).float() * 2 - 1
            if scales:
                group = start // self.group
                values *= scales[0][group : group + rows, None].float()
            flat[start : start + rows * size] = values.clamp(-limit, limit).view(-1)

    def _sections(self, numel: int) -> list[Section]:
        groups = (numel + self.group - 1) // self.group
        scales: list[Section] = [(_BF16, groups)] if self.scale == "mean" else []
        return [(torch.uint8, code_bytes(numel, 1)), *scales]


def _mean_magnitude(values: Tensor) -> Tensor:
    """mean|x| of each row; NaN where the row has NaN or Inf."""
    largest, size = values.abs().amax(1), values.shape[1]
    shares = values.abs() / largest[:, None]
    total = (shares * (1 << 15)).round().nan_to_num(0.0).to(torch.int64).sum(1)
    mean = largest * (total.float() / (size << 15))
    return torch.where(largest.isfinite(), mean, math.nan)
