"""What a codec is: the face that planner, rewriter and ops see.

A family is one file: a frozen dataclass of numbers with its bytes, its reference in plain ATen ops
(the definition), its error model and, where there are any, its kernels.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs.groups import Groups, mean_square
from fxcompress.errors import CodecError
from fxcompress.kernels import triton

log = logging.getLogger("fxcompress")

Keys = tuple[Tensor, Tensor]  # (k_a, k_b) of rng.stream_keys: two 0-dim int64 tensors

_unbuilt: set[str] = set()  # families whose GPU kernels failed to compile

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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

    The tensor is dense and given in storage order: its last dimension is the fastest in memory, as
    (N, H, W, C) for a channels-last feature map. Codecs to which axes matter have a field
    `channels`, the position of the channel axis in that order (negative counts from the end).

    name: of the family. dtypes: what `encode` takes. lossless: decode(encode(x)) == x.
    stochastic: `encode` draws random bits and needs a key. decode_needs_key: `decode` does too.
    shapes_noise: it puts its noise where the gradient was seen to read the tensor least.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    lossless: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True
    decode_needs_key: ClassVar[bool] = False
    shapes_noise: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """The canonical text, as "affine(bits=4,group=256)"; `codec(spec)` reads it back.

        Fields at their default are left out, except the first.
        """
        first, *others = fields(self)
        shown = [first, *(f for f in others if getattr(self, f.name) != f.default)]
        return f"{self.name}({','.join(f'{f.name}={getattr(self, f.name)}' for f in shown)})"

    def __str__(self) -> str:
        return self.spec

    @property
    def unbiased(self) -> bool:
        """The mean of decode(encode(x)) over random keys is x."""
        return True

    @property
    def fuses(self) -> bool:
        """`encode_filled`, `encode_standardised` and `decode_filled` (codecs/fused.py) run in one
        pass, where a kernel runs at all."""
        return False

    @abstractmethod
    def payload_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Exact payload size of a tensor of `shape` (storage order) and `dtype`.

        Sizes may be SymInts: only + - * // are used on them, no guards.
        """

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """`payload_bytes`, remembered: a step asks for the sizes of the step before."""
        key = (dtype, *shape)
        try:
            return self._sizes[key]
        except KeyError:
            found = self._sizes[key] = self.payload_bytes(shape, dtype)
            return found
        except TypeError:  # SymInts have no hash
            return self.payload_bytes(shape, dtype)

    @cached_property
    def _sizes(self) -> dict[tuple[Any, ...], int]:
        return {}

    def workspace_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that `encode`, and `decode`, need besides the tensor and its payload while it runs.

        Next to nothing for kernels. What a codec made of ATen operations allocates counts where it
        says so; the planner weighs it.
        """
        return 0

    @abstractmethod
    def encode_reference(self, x: Tensor, payload: Tensor, keys: Keys | None) -> None:
        """Fill `payload`, uint8 zeros, from a contiguous `x` in plain ATen ops: the definition."""

    @abstractmethod
    def decode_reference(self, payload: Tensor, x: Tensor, keys: Keys | None) -> None:
        """Fill a contiguous `x` from its payload in plain ATen ops: the definition."""

    @property
    def is_pointwise(self) -> bool:
        """An element can be decoded by itself, bit for bit: `pointwise` does it."""
        return False

    def pointwise(
        self, payload: Tensor, numel: int, dtype: torch.dtype, keys: Keys | None
    ) -> Tensor:
        """`decode_reference`, flat, as operations on each element that a compiler can fuse."""
        raise CodecError(f"{self} cannot decode an element by itself: call decode")

    @abstractmethod
    def error(self, x: Tensor) -> ErrorModel:
        """The error that `encode` then `decode` would add to each element of a contiguous x."""

    def effect(self, x: Tensor, *weights: Tensor) -> tuple[float, float]:
        """(variance, squared bias) that coding x adds to ``(w * x).sum()``, means over `weights`.

        As if the errors of different elements were independent; codecs that know better override.
        """
        error = self.error(x)
        noise = torch.where(error.variance.isfinite(), error.variance, 0.0)
        variance = float((mean_square(weights) * noise).sum(dtype=torch.float64))
        if not bool(error.bias.any()):
            return variance, 0.0
        biases = [float((w.float() * error.bias).sum(dtype=torch.float64)) for w in weights]
        return variance, sum(b**2 for b in biases) / len(biases)

    def noise(self, seen: Groups) -> float | None:
        """The variance that `effect` gives of what these sums are of; None: they do not tell."""
        return None

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        """`encode_reference`, bit for bit, by a kernel for x's device; False if there is none."""
        return False

    def decode_kernel(self, payload: Tensor, x: Tensor, key: Tensor | None, stream: int) -> bool:
        """`decode_reference`, bit for bit, by a kernel for x's device; False if there is none."""
        return False

    def encode(self, x: Tensor, key: Tensor | None, stream: int) -> Tensor:
        """uint8[payload_bytes(x.shape, x.dtype)] of a contiguous x.

        key: int64[2] of `rng.next_key` on x's device (None where not stochastic); stream: the
        tensor's number, which sets its random bits apart from those of other tensors. Raises
        CodecError on a dtype outside `dtypes`, a shape the codec cannot hold and a missing key.
        """
        self.check_dtype(x.dtype)
        if self.stochastic and key is None:
            raise CodecError(f"{self} draws random bits: pass the key of fxcompress.next_key")
        x = (x.detach() if x.requires_grad else x).contiguous()
        payload = x.new_empty(self.size(x.shape, x.dtype), dtype=torch.uint8)
        if not self.runs(self.encode_kernel, x, payload, key, stream):
            keys = None if key is None else rng.stream_keys(key, stream)
            self.encode_reference(x, payload.zero_(), keys)
        return payload

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
        payload = self.check_payload(payload, shape, dtype, key)
        x = payload.new_empty(list(shape), dtype=dtype)
        if not self.runs(self.decode_kernel, payload, x, key, stream):
            keys = None if key is None else rng.stream_keys(key, stream)
            self.decode_reference(payload, x, keys)
        return x

    def check_payload(
        self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype, key: Tensor | None
    ) -> Tensor:
        """The payload, contiguous; raises CodecError where `decode` does."""
        self.check_dtype(dtype)
        if self.decode_needs_key and key is None:
            raise CodecError(f"{self} draws random bits: pass the key the tensor was encoded with")
        expected = self.size(shape, dtype)
        if payload.numel() != expected or payload.dtype != torch.uint8:
            raise CodecError(
                f"{self} wants uint8[{expected}] for {math.prod(shape)} elements, "
                f"got {payload.dtype}{list(payload.shape)}: pass the payload with its own shape"
            )
        return payload.contiguous()

    def runs(self, kernel: Callable[..., bool], *arguments: object) -> bool:
        """The kernel did it. Where it cannot be built the family goes on by its reference."""
        if self.name in _unbuilt:
            return False
        try:
            return kernel(*arguments)
        except triton.BuildError as error:
            _unbuilt.add(self.name)
            log.warning(
                "the GPU kernel of %s cannot be built (%s): PyTorch operations, slower, do its "
                "work; fxcompress doctor tells more",
                self,
                error,
            )
            return False

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise CodecError where the codec cannot hold `dtype`."""
        if dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            raise CodecError(f"{self} does not take {dtype}: cast to one of {names} first")


def channel_axis(channels: int, rank: int) -> int:
    """`channels` as a position in 0..rank-1; the last axis where there are too few dimensions."""
    axis = channels + rank if channels < 0 else channels
    return min(max(axis, 0), max(rank - 1, 0))
