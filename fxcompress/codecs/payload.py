"""Payload: several typed sections in one buffer of bytes."""

from __future__ import annotations

import torch
from torch import Tensor

Section = tuple[torch.dtype, int]  # (dtype, count); the count may be a SymInt


def section_bytes(*sections: Section) -> int:
    """Bytes of the sections one after the other, each starting at a multiple of its item size."""
    end = 0
    for dtype, count in sections:
        end = _aligned(end, dtype.itemsize) + count * dtype.itemsize
    return end


def carve(payload: Tensor, *sections: Section) -> list[Tensor]:
    """The sections of uint8[section_bytes(*sections)] as flat views of their dtypes."""
    views, end = [], 0
    for dtype, count in sections:
        start = _aligned(end, dtype.itemsize)
        end = start + count * dtype.itemsize
        views.append(payload[start:end].view(dtype))
    return views


def _aligned(offset: int, size: int) -> int:
    return (offset + size - 1) // size * size
