"""Pointwise: decoding as arithmetic on an element's own number, which a compiler can fuse.

What `decode_reference` does group by group, each element for itself: it reads the bytes that its
code and its group's metadata are in. A compiler that sees these operations decodes within the
reader, in registers. Only codecs whose products are exact (a code of 8 bits by a step of 8) have
it: whether a product is contracted with the sum after it then changes no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.codecs.planar import code_bytes, sections


def numbers(numel: int, device: torch.device) -> Tensor:
    """int64[numel]: the number of each element."""
    return torch.arange(numel, device=device)


def codes(payload: Tensor, index: Tensor, numel: int, bits: int, group: int) -> Tensor:
    """int32: codes of these elements, planar in groups, from the payload's first byte on."""
    first = index // group * group
    within = index - first
    eighth = ((numel - first).clamp(max=group) + 7) // 8
    found = torch.zeros_like(index, dtype=torch.int32)
    for width, shift in sections(bits):
        period = eighth * width
        turn = within // period
        byte = first // 8 * bits + eighth * shift + within - turn * period
        part = payload[byte].to(torch.int32) >> (turn * width).to(torch.int32)
        found = found | ((part & ((1 << width) - 1)) << shift)
    return found


def bf16(payload: Tensor, start: int, index: Tensor) -> Tensor:
    """fp32: the numbers of a section of bf16 that starts at that byte."""
    at = start + 2 * index
    bits = payload[at].to(torch.int32) | (payload[at + 1].to(torch.int32) << 8)
    return (bits << 16).view(torch.float32)


def after_codes(numel: int, bits: int, group: int) -> tuple[int, int]:
    """Where two sections of bf16, one number a group, start after the codes."""
    first = (code_bytes(numel, bits) + 1) // 2 * 2
    return first, first + 2 * ((numel + group - 1) // group)
