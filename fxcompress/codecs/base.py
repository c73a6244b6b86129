"""What a codec is: the face that planner, rewriter and ops see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fxcompress.errors import CodecError


@dataclass(frozen=True)
class ErrorModel:
    """What a codec adds to each element: decoded = x + bias + noise.

    variance: of the noise over random keys, float32 in x's shape, in x's units squared; inf where
    the element does not survive (a group with NaN or Inf). bias: the mean, float32, x's units.
    """

    variance: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Codec(ABC):
    """A way to write a tensor as bytes. Subclasses are frozen dataclasses of numbers.

    name: of the family. dtypes: what `encode` takes. lossless: decode(encode(x)) == x.
    stochastic: `encode` draws random bits and needs a key. decode_needs_key: `decode` does too.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    lossless: ClassVar[bool]
    stochastic: ClassVar[bool]
    decode_needs_key: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """The canonical text, as "affine(bits=4,group=256)"; `codec(spec)` reads it back."""
        args = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}({args})"

    def __str__(self) -> str:
        return self.spec

    @abstractmethod
    def payload_bytes(self, numel: int) -> int:
        """Exact payload size. `numel` may be a SymInt: only + - * // are used, no guards."""

    @abstractmethod
    def encode(self, x: Tensor, key: Tensor | None, stream: int) -> Tensor:
        """uint8[payload_bytes(x.numel())] of a contiguous x.

        key: int64[2] of `rng.next_key` on x's device (None where not stochastic); stream: the
        tensor's number, which sets its random bits apart from those of other tensors. Raises
        CodecError on a dtype outside `dtypes` and on a missing key.
        """

    @abstractmethod
    def decode(
        self,
        payload: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        key: Tensor | None,
        stream: int,
    ) -> Tensor:
        """A contiguous tensor of `shape` and `dtype`; the other arguments as they were encoded.

        Raises CodecError where the payload's length does not belong to the shape.
        """

    @abstractmethod
    def error(self, x: Tensor) -> ErrorModel:
        """The error that `encode` then `decode` would add to each element of a contiguous x."""

    def check_encode(self, x: Tensor, key: Tensor | None) -> None:
        """Raise CodecError where `encode` cannot take x or lacks its key."""
        self.check_dtype(x.dtype)
        if self.stochastic and key is None:
            raise CodecError(f"{self} draws random bits: pass the key of fxcompress.next_key")

    def check_decode(self, payload: Tensor, numel: int, dtype: torch.dtype) -> None:
        """Raise CodecError where the payload is not one of `numel` elements."""
        self.check_dtype(dtype)
        expected = self.payload_bytes(numel)
        if payload.numel() != expected or payload.dtype != torch.uint8:
            raise CodecError(
                f"{self} wants uint8[{expected}] for {numel} elements, "
                f"got {payload.dtype}{list(payload.shape)}: pass the payload with its own shape"
            )

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise CodecError where the codec cannot hold `dtype`."""
        if dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            raise CodecError(f"{self} does not take {dtype}: cast to one of {names} first")
