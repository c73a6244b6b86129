"""The operators that a rewritten graph calls: fxcompress::next_key, encode and decode; those that
code with what the graph does just before or after, in one pass; and, where payloads wait in host
memory, or tensors as they are, to_host and to_device. fxcompress::fence orders what Inductor does,
fxcompress::region stands in users' graphs.

They are opaque to Inductor (single-pass kernels), deterministic given their key, and carry no
autograd formula: they appear in graphs that AOTAutograd has already differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress import rng
from fxcompress.codecs import codec as parse
from fxcompress.codecs import fused

# Called with the plan's name whenever a step draws its key, before anything is encoded.
on_step: list[Callable[[str], None]] = []

_library: Any = torch.library.Library("fxcompress", "DEF")  # type: ignore[no-untyped-call]
# flexible_layout: encode sorts out any layout by itself, and an Inductor that laid x out anew
# should not pay for a copy that restores the traced strides.
_library.define(
    "encode(Tensor x, Tensor? key, str codec, int stream, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "decode(Tensor payload, Tensor? key, str codec, int stream, SymInt[] shape, int[] order, "
    "ScalarType dtype) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "encode_filled(Tensor x, Tensor fill, Tensor? key, str codec, int stream, int[] order) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "encode_standardised(Tensor x, Tensor mean, Tensor rstd, Tensor? key, str codec, int stream, "
    "int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "decode_filled(Tensor payload, Tensor mask, Tensor? key, str codec, int stream, "
    "SymInt[] shape, int[] order, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
# nondeterministic_seeded: not dropped, folded into a constant or recomputed. AOTAutograd's CSE
# respects it on 2.14 but merges equal calls on 2.11: insert one a graph, after partitioning.
_library.define(
    "next_key(str plan, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_library.define("region(str policy) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "fence(Tensor(a!)[] xs) -> ()",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "to_host(Tensor x, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "to_device(Tensor x, Device device, SymInt[] shape, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)


def encode(x: Tensor, key: Tensor | None, codec: str, stream: int, order: Sequence[int]) -> Tensor:
    """The payload, uint8[codec.payload_bytes], of x.

    order: the dimensions of x from slowest to fastest in memory, as (0, 2, 3, 1) for channels-last.
    The payload holds the elements in that order. Where x is not laid out so, it is copied first.
    """
    return parse(codec).encode(_stored(x, order), key, stream)


def decode(
    payload: Tensor,
    key: Tensor | None,
    codec: str,
    stream: int,
    shape: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The tensor of a payload: `shape` as x had it, its memory dense in `order`."""
    stored = [shape[dim] for dim in order]
    return _unstored(parse(codec).decode(payload, stored, dtype, key, stream), order)


def encode_filled(
    x: Tensor, fill: Tensor, key: Tensor | None, codec: str, stream: int, order: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The payload of ``where(x <= 0, fill, x)``, and that of ``x <= 0`` by bits(bits=1).

    fill: 0-dim, of x's dtype. The rest, and in which order payloads hold the elements: as `encode`.
    """
    return fused.encode_filled(parse(codec), _stored(x, order), fill, key, stream)


def encode_standardised(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    key: Tensor | None,
    codec: str,
    stream: int,
    order: Sequence[int],
) -> Tensor:
    """The payload of ``(x - mean) * rstd``, in the dtype that PyTorch gives it.

    mean, rstd: of x's rank, broadcastable to x. The rest as `encode`.
    """
    x, mean, rstd = (t.permute(list(order)) for t in (x, mean, rstd))
    return fused.encode_standardised(parse(codec), x.contiguous(), mean, rstd, key, stream)


def decode_filled(
    payload: Tensor,
    mask: Tensor,
    key: Tensor | None,
    codec: str,
    stream: int,
    shape: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """What `decode` gives, and 0 where the mask that `encode_filled` gave is set."""
    stored = [shape[dim] for dim in order]
    decoded = fused.decode_filled(parse(codec), payload, mask, stored, dtype, key, stream)
    return _unstored(decoded, order)


def next_key(plan: str, device: torch.device) -> Tensor:
    """This step's key, int64[2] on `device`; advances the step and calls the `on_step` hooks.

    plan: the name under which a runtime finds the plan of the calling graph.
    """
    key = rng.next_key(device)
    for hook in on_step:
        hook(plan)
    return key


def region(policy: str) -> None:
    """Nothing: a mark in a traced graph's code, where a region begins or (empty) ends."""
    torch.ops.fxcompress.region(policy)


def fence(xs: Sequence[Tensor]) -> None:
    """Nothing: a compiler that believes the schema has them in memory by then, and reads
    them anew after it (passes/realise.py, settle.py).

    xs: intermediate results of the graph, never its inputs or outputs.
    """


def to_host(x: Tensor, order: Sequence[int]) -> Tensor:
    """The elements of x, flat and in storage order, in host memory: pinned, and copied while the
    device goes on, where there is one.

    No stream is waited for: the copy is ordered on the current one, as are those that follow. But
    nothing on the CPU may read it, and a compiler that finds a layout it does not like does: on an
    H200, Inductor laid out channels-last feature maps anew with a loop of its own, which ran before
    they had arrived. A flat tensor has one layout.
    """
    pinned = x.device.type == "cuda"
    flat = x.permute(list(order)).reshape(-1)
    host = torch.empty_like(flat, device="cpu", pin_memory=pinned)
    return host.copy_(flat, non_blocking=pinned)


def to_device(
    x: Tensor, device: torch.device, shape: Sequence[int], order: Sequence[int]
) -> Tensor:
    """A copy on ``device`` of what :func:`to_host` gave: `shape` as the tensor had it (a flat one,
    [-1]), its memory dense in `order`."""
    stored = [shape[dim] for dim in order]
    return x.to(device, non_blocking=True, copy=True).view(stored).permute(_inverse(order))


def _stored(x: Tensor, order: Sequence[int]) -> Tensor:
    """x with its dimensions in that order, and its memory too."""
    # Without the operators that would change nothing: there are hundreds of such calls a step.
    x = x if _is_straight(order) else x.permute(list(order))
    return x if x.is_contiguous() else x.contiguous()


def _unstored(x: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse, as a view."""
    return x if _is_straight(order) else x.permute(_inverse(order))


def _is_straight(order: Sequence[int]) -> bool:
    return list(order) == sorted(order)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _nothing(policy: str) -> None:
    return None


_library.impl("encode", encode, "CompositeExplicitAutograd")
_library.impl("decode", decode, "CompositeExplicitAutograd")
_library.impl("encode_filled", encode_filled, "CompositeExplicitAutograd")
_library.impl("encode_standardised", encode_standardised, "CompositeExplicitAutograd")
_library.impl("decode_filled", decode_filled, "CompositeExplicitAutograd")
_library.impl("next_key", next_key, "CompositeExplicitAutograd")
_library.impl("region", _nothing, "CompositeExplicitAutograd")
_library.impl("fence", fence, "CompositeExplicitAutograd")
_library.impl("to_host", to_host, "CompositeExplicitAutograd")
_library.impl("to_device", to_device, "CompositeExplicitAutograd")


@torch.library.register_fake("fxcompress::encode", lib=_library)
def _encode_fake(
    x: Tensor, key: Tensor | None, codec: str, stream: int, order: Sequence[int]
) -> Tensor:
    stored = [x.shape[dim] for dim in order]
    return x.new_empty(parse(codec).payload_bytes(stored, x.dtype), dtype=torch.uint8)


@torch.library.register_fake("fxcompress::decode", lib=_library)
def _decode_fake(
    payload: Tensor,
    key: Tensor | None,
    codec: str,
    stream: int,
    shape: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    stored = [shape[dim] for dim in order]
    return payload.new_empty(stored, dtype=dtype).permute(_inverse(order))


@torch.library.register_fake("fxcompress::encode_filled", lib=_library)
def _encode_filled_fake(
    x: Tensor, fill: Tensor, key: Tensor | None, codec: str, stream: int, order: Sequence[int]
) -> tuple[Tensor, Tensor]:
    stored = [x.shape[dim] for dim in order]
    sizes = parse(codec).payload_bytes(stored, x.dtype), fused.mask_bytes(stored)
    payload, mask = (x.new_empty(size, dtype=torch.uint8) for size in sizes)
    return payload, mask


@torch.library.register_fake("fxcompress::encode_standardised", lib=_library)
def _encode_standardised_fake(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    key: Tensor | None,
    codec: str,
    stream: int,
    order: Sequence[int],
) -> Tensor:
    stored = [x.shape[dim] for dim in order]
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), rstd.dtype)
    return x.new_empty(parse(codec).payload_bytes(stored, dtype), dtype=torch.uint8)


@torch.library.register_fake("fxcompress::decode_filled", lib=_library)
def _decode_filled_fake(
    payload: Tensor,
    mask: Tensor,
    key: Tensor | None,
    codec: str,
    stream: int,
    shape: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return _decode_fake(payload, key, codec, stream, shape, order, dtype)


@torch.library.register_fake("fxcompress::next_key", lib=_library)
def _next_key_fake(plan: str, device: torch.device) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=device)


torch.library.register_fake("fxcompress::region", _nothing, lib=_library)
torch.library.register_fake("fxcompress::fence", fence, lib=_library)


@torch.library.register_fake("fxcompress::to_host", lib=_library)
def _to_host_fake(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.empty(x.numel(), dtype=x.dtype, device="cpu")


@torch.library.register_fake("fxcompress::to_device", lib=_library)
def _to_device_fake(
    x: Tensor, device: torch.device, shape: Sequence[int], order: Sequence[int]
) -> Tensor:
    stored = [shape[dim] for dim in order]
    return torch.empty_like(x, device=device).view(stored).permute(_inverse(order))
