"""grid: codes on a uniform grid, one grid for the elements that share a scale.

In fp32, with L the highest code, 22 fractional bits and a lower end of the codes of -zero:

    r  = 2^22 / step, one true division a scale; 0 where step is 0 or NaN
    T  = floor((x - lo) * r), clamped to [-zero, L - zero] * 2^22
    q  = ((T + u) >> 22) + zero        u = hash >> 10 (stochastic) or 2^21 (nearest, ties up)
    x' = clamp(lo + (q - zero)*step, finite range of dtype)

x = lo always comes back exact. One of lo and zero is 0, and where lo is not, step has at most 16
bits, so that q*step is exact: no sum follows a rounded product, and an FMA changes no bit.

Metadata are rounded before the codes are drawn, steps upwards and minima downwards: the grid
covers what it did, and rounding adds no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs.base import Codec, ErrorModel, Keys
from fxcompress.codecs.planar import code_bytes, pack, unpack
from fxcompress.codecs.sharing import Piece, Sharing
from fxcompress.errors import CodecError

META = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIN_STEP = 2.0**-100  # keeps r = 2^22/step finite

_ONE = 1 << 22
_NEAREST = 1 << 21
_NAN = {
    torch.float32: 0x7FC00000,
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7F,
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def check_choice(codec: Codec, field: str, choices: tuple[str, ...]) -> None:
    """Raise CodecError where a field of a codec is none of its choices."""
    if getattr(codec, field) not in choices:
        raise CodecError(f"{codec}: {field} must be one of {', '.join(choices)}")


# ---- numbers ----


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to the nearest number of `dtype`; every NaN the same (ATen's casts disagree on it)."""
    bits = values.to(dtype).view(_INTEGERS[dtype.itemsize])
    # All ones where NaN. Integers: on CPU a mask of booleans takes twice as long.
    nan = ((0x7F800000 - (values.view(torch.int32) & 0x7FFFFFFF)) >> 31).to(bits.dtype)
    return ((bits & ~nan) | (nan & _NAN[dtype])).view(dtype)


def round_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of `dtype` (in fp32) not below positive fp32 values."""
    near = values.to(dtype)
    if dtype == torch.float32:
        return near
    return (near.view(torch.int16) + (near.float() < values)).view(dtype).float()


def shorten(values: Tensor) -> Tensor:
    """Positive fp32 values rounded up to 16 bits, so that a product with 8 bits is exact."""
    return ((values.view(torch.int32) + 0xFF) & -0x100).view(torch.float32)


def round_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest numbers of `dtype` (in fp32) not above fp32 values."""
    near = values.to(dtype)
    if dtype == torch.float32:
        return near
    bits = near.view(torch.int16)
    below = bits + torch.where(bits < 0, 1, -1) * (near.float() > values)
    return below.to(torch.int16).view(dtype).float()


def ends(x: Tensor, shared: Sharing) -> tuple[Tensor, Tensor]:
    """(lowest, highest) fp32[outer, scales] of flat x in the total order, where -0 < +0.

    -NaN < -Inf and Inf < NaN: both are finite where all elements are.
    """
    size = (shared.outer, shared.scales)
    lowest = torch.full(size, 0x7FFFFFFF, dtype=torch.int32, device=x.device)
    highest = ~lowest
    for piece in shared.pieces(x.device):
        order = _order(piece.fold(x[piece.span]).float().view(torch.int32))
        at = piece.scales
        lowest[at] = torch.minimum(lowest[at], order.amin((1, 3)))
        highest[at] = torch.maximum(highest[at], order.amax((1, 3)))
    return _order(lowest).view(torch.float32), _order(highest).view(torch.float32)


def _order(bits: Tensor) -> Tensor:
    """Float bits as integers that compare in the total order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# ---- the grid ----


@dataclass(frozen=True)
class Grid:
    """Codes 0 .. top on lo + (code - zero)*step; tensors are fp32[outer, scales], zero integral."""

    step: Tensor
    lo: Tensor | float
    zero: Tensor | int
    top: int

    def within(self, piece: Piece) -> Grid:
        """The grid of a piece, to broadcast in its shape."""
        lo = piece.spread(self.lo) if isinstance(self.lo, Tensor) else self.lo
        zero = piece.spread(self.zero) if isinstance(self.zero, Tensor) else self.zero
        return Grid(piece.spread(self.step), lo, zero, self.top)

    def positions(self, values: Tensor) -> Tensor:
        """T of the formula; anything where step is NaN."""
        r = torch.where(self.step > 0, _ONE / self.step, 0.0)
        low, high = self.zero * -_ONE, (self.top - self.zero) * _ONE
        found = ((values - self.lo) * r).clamp(low, high).floor_()  # type: ignore[arg-type]
        # int64 is four times slower, and only zeros of their own, up to 2^15, need it.
        return found.to(torch.int64 if isinstance(self.zero, Tensor) else torch.int32)


def encode(
    x: Tensor, packed: Tensor, block: int, shared: Sharing, grid: Grid, keys: Keys | None
) -> None:
    """Draw the codes of flat x and pack them by `block`; keys None rounds to nearest."""
    writer = _Writer(packed, grid.top.bit_length(), block)
    for piece in shared.pieces(x.device):
        part, start = grid.within(piece), piece.span.start
        fixed = part.positions(piece.fold(x[piece.span]).float())
        if keys is None:
            fixed += _NEAREST
        else:
            noise = rng.hash_range(start, piece.span.stop - start, *keys) >> 10
            fixed += piece.fold(noise.to(torch.int32))
        codes = ((fixed >> 22) + part.zero) * (part.step > 0)
        writer.write(piece.unfold(codes.to(torch.uint8)))
    writer.close()


def decode(packed: Tensor, x: Tensor, block: int, shared: Sharing, grid: Grid) -> None:
    """Fill flat x from its codes."""
    limit = torch.finfo(x.dtype).max
    for piece in shared.pieces(x.device):
        part = grid.within(piece)
        codes = piece.fold(_read(packed, grid.top.bit_length(), block, piece.span, x.numel()))
        values = part.lo + (codes.float() - part.zero) * part.step
        x[piece.span] = piece.unfold(values.clamp_(-limit, limit))


def stochastic_error(x: Tensor, shared: Sharing, grid: Grid, unbiased: bool) -> ErrorModel:
    """Of stochastic rounding on the grid: step^2 * f*(1-f), f = frac(T); bias where it is cut."""
    flat = x.detach().reshape(-1)
    variance = torch.zeros_like(flat, dtype=torch.float32)
    bias = torch.zeros_like(variance)
    for piece in shared.pieces(flat.device):
        part = grid.within(piece)
        values = piece.fold(flat[piece.span]).float()
        fixed = part.positions(values)
        f = (fixed & (_ONE - 1)).float() / _ONE
        noise = part.step.square() * f * (1 - f)
        variance[piece.span] = piece.unfold(torch.where(part.step.isnan(), math.inf, noise))
        if not unbiased:
            mean = part.lo + fixed.double() / _ONE * part.step.double() - values
            bias[piece.span] = piece.unfold(torch.where(part.step.isnan(), 0.0, mean)).float()
    return ErrorModel(variance.view(x.shape), bias.view(x.shape))


def fixed_error(codec: Codec, x: Tensor) -> ErrorModel:
    """Of a codec that draws nothing: its actual error, as bias; variance inf where that is lost."""
    x = x.detach().contiguous()
    payload = x.new_zeros(codec.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
    codec.encode_reference(x, payload, None)
    decoded = torch.empty_like(x)
    codec.decode_reference(payload, decoded, None)
    bias = decoded.float() - x.float()
    lost = ~bias.isfinite()
    return ErrorModel(torch.where(lost, math.inf, 0.0), bias.masked_fill(lost, 0.0))


# ---- codes in blocks ----


class _Writer:
    """Packs codes that come in pieces of any length, `block` by `block`."""

    def __init__(self, packed: Tensor, bits: int, block: int) -> None:
        self.packed, self.bits, self.block = packed, bits, block
        self.rest = packed.new_empty(0)
        self.at = 0

    def write(self, codes: Tensor) -> None:
        codes = torch.cat([self.rest, codes]) if self.rest.numel() else codes
        whole = codes.numel() // self.block * self.block
        self._put(codes[:whole].view(-1, self.block))
        self.rest = codes[whole:]

    def close(self) -> None:
        self._put(self.rest[None])

    def _put(self, codes: Tensor) -> None:
        if codes.numel():
            packed = pack(codes, self.bits).view(-1)
            self.packed[self.at : self.at + packed.numel()] = packed
            self.at += packed.numel()


def _read(packed: Tensor, bits: int, block: int, span: slice, numel: int) -> Tensor:
    """The codes of a span of `numel` codes, unpacking only the blocks it touches."""
    first = span.start // block * block
    end = min((span.stop + block - 1) // block * block, numel)
    split = end if end % block == 0 else end // block * block  # where a short block starts
    middle = code_bytes(split, bits)
    whole = packed[code_bytes(first, bits) : middle].view(-1, code_bytes(block, bits))
    codes = unpack(whole, bits, block).reshape(-1)
    if end > split:
        tail = packed[None, middle : code_bytes(end, bits)]
        codes = torch.cat([codes, unpack(tail, bits, end - split).view(-1)])
    return codes[span.start - first : span.stop - first]
