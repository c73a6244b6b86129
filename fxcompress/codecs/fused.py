"""fused: coding in one pass with what a graph does to the tensor just before, or just after.

    filled         a ReLU's output y: where(y <= 0, fill, y) is coded, beside the mask y <= 0; what
                   is decoded becomes 0 again under the mask (passes/rectified.py)
    standardised   a batch norm's input: (x - mean) * rstd is coded (passes/standardise.py)

In the graph each of these writes a tensor that the codec then reads, or reads what it has just
written. The `compose_*` functions do so: they are the definitions, for every codec. The others give
the same bits, in one pass where the codec has a kernel for it (`Codec.fuses`).

Tensors are given as to `Codec.encode`: in storage order. A mask is the payload of bits(bits=1).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codecs.base import FLOATS, Codec
from fxcompress.codecs.bits import Bits
from fxcompress.kernels.prologue import Filled, Prologue, Standardised

_MASK = Bits(1)
GROUP = 256  # elements of a group, of a mask as of the codecs that fuse


@dataclass(frozen=True)
class Fusing(Codec):
    """A codec whose kernels take a prologue, and a mask of what is 0."""

    @abstractmethod
    def encode_kernel(
        self,
        x: Tensor,
        payload: Tensor,
        key: Tensor | None,
        stream: int,
        before: Prologue | None = None,
    ) -> bool:
        """As `Codec.encode_kernel`, of what `before` makes of x."""

    @abstractmethod
    def decode_kernel(
        self,
        payload: Tensor,
        x: Tensor,
        key: Tensor | None,
        stream: int,
        mask: Tensor | None = None,
    ) -> bool:
        """As `Codec.decode_kernel`, then 0 where `mask` is set."""

    def encode_prepared(
        self, x: Tensor, key: Tensor | None, stream: int, before: Prologue
    ) -> Tensor | None:
        """The payload of what `before` makes of a contiguous x; None where no kernel does it."""
        if not self.fuses or x.dtype not in FLOATS or (self.stochastic and key is None):
            return None
        dtype = x.dtype if isinstance(before, Filled) else torch.float32
        payload = x.new_empty(self.size(x.shape, dtype), dtype=torch.uint8)
        done = self.runs(self.encode_kernel, x, payload, key, stream, before)
        return payload if done else None

    def decode_masked(
        self,
        payload: Tensor,
        mask: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        key: Tensor | None,
        stream: int,
    ) -> Tensor | None:
        """What is decoded, and 0 where the mask is set; None where no kernel does it."""
        if not self.fuses:
            return None
        payload = self.check_payload(payload, shape, dtype, key)
        mask = _MASK.check_payload(mask, shape, torch.bool, None)
        x = payload.new_empty(list(shape), dtype=dtype)
        return x if self.runs(self.decode_kernel, payload, x, key, stream, mask) else None


def mask_bytes(shape: Sequence[int]) -> int:
    """Of a mask of that shape, packed; sizes may be SymInts."""
    return _MASK.size(shape, torch.bool)


# ---- filled ----


def compose_filled(
    codec: Codec, x: Tensor, fill: Tensor, key: Tensor | None, stream: int
) -> tuple[Tensor, Tensor]:
    """(payload of ``where(x <= 0, fill, x)``, mask ``x <= 0``). fill: 0-dim, of x's dtype."""
    mask = x <= 0
    return codec.encode(torch.where(mask, fill, x), key, stream), _MASK.encode(mask, None, 0)


def encode_filled(
    codec: Codec, x: Tensor, fill: Tensor, key: Tensor | None, stream: int
) -> tuple[Tensor, Tensor]:
    """As `compose_filled`."""
    x, fill = x.detach().contiguous(), fill.detach()
    if isinstance(codec, Fusing) and not fill.dim() and _kind(fill) == _kind(x):
        mask = x.new_empty(mask_bytes(x.shape), dtype=torch.uint8)
        payload = codec.encode_prepared(x, key, stream, Filled(fill, mask))
        if payload is not None:
            return payload, mask
    return compose_filled(codec, x, fill, key, stream)


def compose_unfilled(
    codec: Codec,
    payload: Tensor,
    mask: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    key: Tensor | None,
    stream: int,
) -> Tensor:
    """What is decoded, and 0 where the mask is set; arguments as of `Codec.decode`."""
    x = codec.decode(payload, shape, dtype, key, stream)
    return x.masked_fill_(_MASK.decode(mask, shape, torch.bool, None, 0), 0)


def decode_filled(
    codec: Codec,
    payload: Tensor,
    mask: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    key: Tensor | None,
    stream: int,
) -> Tensor:
    """As `compose_unfilled`."""
    if isinstance(codec, Fusing):
        x = codec.decode_masked(payload, mask, shape, dtype, key, stream)
        if x is not None:
            return x
    return compose_unfilled(codec, payload, mask, shape, dtype, key, stream)


# ---- standardised ----


def compose_standardised(
    codec: Codec, x: Tensor, mean: Tensor, rstd: Tensor, key: Tensor | None, stream: int
) -> Tensor:
    """The payload of ``(x - mean) * rstd``. mean, rstd: of x's rank, broadcastable to x."""
    return codec.encode((x - mean) * rstd, key, stream)


def encode_standardised(
    codec: Codec, x: Tensor, mean: Tensor, rstd: Tensor, key: Tensor | None, stream: int
) -> Tensor:
    """As `compose_standardised`."""
    x, mean, rstd = x.detach().contiguous(), mean.detach(), rstd.detach()
    before = _by_channel(x, mean, rstd)
    if isinstance(codec, Fusing) and before is not None:
        payload = codec.encode_prepared(x, key, stream, before)
        if payload is not None:
            return payload
    return compose_standardised(codec, x, mean, rstd, key, stream)


def _by_channel(x: Tensor, mean: Tensor, rstd: Tensor) -> Standardised | None:
    """Statistics as kernels take them: fp32, one number for each index of one dimension of x."""
    wide = [dim for dim, size in enumerate(mean.shape) if size != 1]
    alike = mean.shape == rstd.shape and _kind(mean) == _kind(rstd) == (torch.float32, x.device)
    if not alike or mean.dim() != x.dim() or len(wide) != 1:
        return None
    (dim,) = wide
    inner = math.prod(x.shape[dim + 1 :])
    if mean.shape[dim] != x.shape[dim] or inner >= 1 << 30:  # kernels count in 32 bits
        return None
    return Standardised(mean.reshape(-1).contiguous(), rstd.reshape(-1).contiguous(), inner)


def _kind(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device
