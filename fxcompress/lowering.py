"""Lowering: by what code a tensor's payload is decoded.

    triton, cpu   an opaque operator: our kernel for that device, one pass over payload and tensor
    aten          the same operator, where a codec has no kernel there: its definition, op by op
    inductor      the definition as operations on each element, in the graph, for Inductor to fuse
                  with the readers (codecs/pointwise.py): no decoded tensor in memory

All give the same bits. Encoding is the opaque operator under each: a grid needs all of its group
before the first code, and its division is not exact in Inductor's Triton code.

``auto`` on a GPU goes by bytes moved: decoded in a kernel, a tensor is written and read again, by
each cluster of readers; fused with a reader it is neither, unless all readers are calls (matrix
products, convolutions) that want it in memory. On a CPU it goes by measurement, where
``fxcompress bench kernels --lowerings`` took one on this machine, else by ours: the kernel was
faster in the four cases measured, 1.5 times (bf16) to 7 (masks, as bytes: passes/booleans.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, fx

from fxcompress import costs, torch_private
from fxcompress.codecs import codec
from fxcompress.errors import SettingsError
from fxcompress.kernels import cpu
from fxcompress.passes import properties as prop
from fxcompress.passes.rewrite import Choice


def lowered(choices: Sequence[Choice], wanted: str) -> tuple[Choice, ...]:
    """The choices, each with the lowering of its codec.

    Raises:
        SettingsError: the lowering that was asked for cannot be had for one of them.
    """
    return tuple(
        c if c.codec_spec is None else replace(c, lowering=_of(c, wanted)) for c in choices
    )


def of_mask(spec: str, value: Tensor, readers: Sequence[fx.Node], wanted: str) -> str:
    """The lowering of a packed mask or index; where ``wanted`` cannot be had, that of ``auto``."""
    fits = wanted == "inductor" and _is_static(value)
    return "inductor" if fits else _automatic(spec, value, readers)


def _of(choice: Choice, wanted: str) -> str:
    spec, value, name = choice.representation, choice.candidate.fake, choice.candidate.name
    device = value.device.type
    if wanted == "auto":
        return _automatic(spec, value, choice.candidate.smooth)
    if wanted == "inductor":
        if not codec(spec).is_pointwise:
            raise SettingsError(
                f"lowering='inductor' cannot decode {spec}, chosen for {name}: its elements need "
                "each other, or its sums would be rounded otherwise. Take lowering='auto', or a "
                "policy of affine, dither or bf16 codecs: uniform4, dither4, cast(format=bf16)"
            )
        if not _is_static(value):
            raise SettingsError(
                f"lowering='inductor' needs sizes that are known, and those of {name} are not: "
                "compile with dynamic=False, or take lowering='auto'"
            )
        return "inductor"
    if device != {"triton": "cuda", "cpu": "cpu"}[wanted]:
        raise SettingsError(
            f"lowering={wanted!r} cannot handle {name}, which is on {device}: move the model "
            "there, or take lowering='auto'"
        )
    if wanted == "cpu" and not cpu.available():
        raise SettingsError(
            "lowering='cpu' needs a C++ compiler, and none works here: install one (g++ or "
            "clang++, as Inductor needs it), or take lowering='auto'"
        )
    return _kernel(spec, device)


def _automatic(spec: str, value: Tensor, readers: Sequence[fx.Node]) -> str:
    device = value.device.type
    if codec(spec).is_pointwise and _is_static(value):
        if device == "cuda" and any(not prop.is_extern(reader) for reader in readers):
            return "inductor"
        if device == "cpu" and costs.is_faster_inlined(spec):
            return "inductor"
    return _kernel(spec, device)


def _kernel(spec: str, device: str) -> str:
    if device == "cuda":
        return "triton"
    return "cpu" if device == "cpu" and _has_cpu_kernel(spec) else "aten"


@cache
def _has_cpu_kernel(spec: str) -> bool:
    """Whether a kernel, rather than the definition, takes a few elements."""
    if spec.startswith("transform"):
        return True  # made of coders that have kernels
    found = codec(spec)
    with torch_private.outside_compile(), torch.no_grad():
        x = torch.zeros(64, dtype=found.dtypes[0])
        payload = torch.empty(found.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
        return found.encode_kernel(x, payload, torch.zeros(2, dtype=torch.int64), 0)


def _is_static(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)
