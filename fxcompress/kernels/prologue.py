"""What an encoder's kernel does to the values that it reads. See `codecs.fused`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Filled:
    """``where(x <= 0, fill, x)`` is coded, and the mask ``x <= 0`` is written.

    fill: 0-dim, of x's dtype. mask: uint8, room for the payload of bits(bits=1).
    """

    fill: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Standardised:
    """``(x - mean) * rstd`` is coded, in fp32.

    mean, rstd: fp32[channels], contiguous. inner: how many elements of x, in storage order, lie in
    one channel before the next one begins: element i belongs to channel i // inner % channels.
    """

    mean: Tensor
    rstd: Tensor
    inner: int


Prologue = Filled | Standardised
