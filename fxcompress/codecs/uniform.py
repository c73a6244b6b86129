"""uniform: rows that a codec lays out itself, each on the grid of affine (see there).

For a row of fp32 values and L = top, which may differ from row to row:

    lo   = min rounded down to bf16
    step = (max - lo) * fp32(1/L) rounded up to bf16, at least 2^-100; 0 where max == lo
    q    = (min(trunc((x - lo) * (2^22/step)), L << 22) + (hash >> 10)) >> 22
    x'   = lo + q*step

A row with NaN or Inf, or whose grid overflows fp32 (L*step), has step = NaN, lo = 0 and q = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxcompress.codecs.grid import MIN_STEP, round_down, round_up
from fxcompress.codecs.planar import code_bytes, pack, unpack

_BF16 = torch.bfloat16
_PACKED = 256  # codes a planar group


def extremes(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(min, max, whether all are finite) over the last axis of fp32 values, by total order."""
    # Float bits, with a negative's magnitude flipped, compare as int32 in the total order.
    # -NaN < -Inf < ... < Inf < NaN, so the two ends tell whether the row is finite.
    bits = values.view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return numbers(torch.stack([order.amin(-1), order.amax(-1)]))


def numbers(ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`extremes` from int32[2, ...], integers that compare in the total order."""
    ends = ends ^ ((ends >> 31) & 0x7FFFFFFF)
    finite = (ends & 0x7FFFFFFF).amax(0) < 0x7F800000
    return ends[0].view(torch.float32), ends[1].view(torch.float32), finite


def grid(values: Tensor, top: int | Tensor) -> tuple[Tensor, Tensor]:
    """(lo, step) of each row (the last axis) of fp32 values, as fp32 holding bf16 numbers."""
    lowest, highest, finite = extremes(values)
    lo = round_down(lowest, _BF16)
    step = round_up(((highest - lo) * (1.0 / top)).clamp(min=MIN_STEP), _BF16)
    step = torch.where(highest > lo, step, 0.0)
    finite &= (step * top).isfinite()
    return torch.where(finite, lo, 0.0), torch.where(finite, step, math.nan)


def draw(values: Tensor, lo: Tensor, step: Tensor, top: int | Tensor, hashes: Tensor) -> Tensor:
    """The uint8 codes of `values`; the rest broadcasts against it."""
    regular = step > 0  # neither constant nor NaN
    r = torch.where(regular, 2.0**22 / step, 0.0)
    fixed = ((values - lo) * r).to(torch.int32).clamp(max=top << 22)  # type: ignore[arg-type]
    codes = ((fixed + (hashes >> 10)) >> 22) * regular
    return codes.to(torch.uint8)


def variance(values: Tensor, lo: Tensor, step: Tensor) -> Tensor:
    """Of stochastic rounding, at each value: step^2 * f*(1-f); inf where the row is lost."""
    f = ((values - lo) / step).frac()
    noise = torch.where(step == 0, 0.0, step.square() * f * (1 - f))
    return torch.where(step.isnan(), math.inf, noise)


def pack_flat(codes: Tensor, bits: int) -> Tensor:
    """uint8[n] codes -> uint8[code_bytes(n, bits)], planar in groups of 256."""
    whole = codes.numel() // _PACKED * _PACKED
    rows = pack(codes[:whole].view(-1, _PACKED), bits).view(-1)
    return torch.cat([rows, pack(codes[None, whole:], bits).view(-1)])


def unpack_flat(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse of `pack_flat`: uint8[numel]."""
    whole = numel // _PACKED * _PACKED
    split = code_bytes(whole, bits)
    rows = unpack(packed[:split].view(-1, code_bytes(_PACKED, bits)), bits, _PACKED)
    return torch.cat([rows.view(-1), unpack(packed[None, split:], bits, numel - whole).view(-1)])
