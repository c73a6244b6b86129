"""The C++ kernels of the codecs, through ctypes. Tensors here are flat or dense CPU tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels.place import Place
from fxcompress.kernels.prologue import Filled, Prologue, Standardised
from fxcompress.torch_private import load_cpp

_FORMATS = ("bf16", "fp16", "e4m3", "e5m2")
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Below this many elements (about 20 us of work), waking other threads costs more than it saves.
_PARALLEL = 1 << 16

# What is compiled as one, after `_SHARED`, and side by side with the others: all in one took 43 s.
_UNITS = (
    *(("affine", "dither"), ("rotate", "subsample"), ("transform",)),
    *(("bits",), ("cast",), ("magnitude",)),
)
_SHARED = ("common", "prologue")
FAMILIES = tuple(family for unit in _UNITS for family in unit)
# What codes the bands of `transform`.
_CODERS = {
    "rotate": ("fxc_rotate_encode", "fxc_rotate_decode"),
    "dither": ("fxc_affine_encode", "fxc_dither_decode"),
    "subsample": ("fxc_subsample_encode", "fxc_subsample_decode"),
}

_pointer, _i64, _int, _u32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32


class _Prologue(ctypes.Structure):  # prologue.cpp
    _fields_ = [
        *((name, _pointer) for name in ("fill", "mask", "mean", "rstd")),
        *((name, _i64) for name in ("channels", "inner")),
        *(("rows", _pointer), ("length", _i64)),  # of transform.cpp
    ]


class _Place(ctypes.Structure):  # transform.cpp
    _fields_ = [
        *(("blocks", _i64 * 2), ("sides", _i64 * 2), ("strides", _i64 * 4)),
        *((name, _i64) for name in ("positions", "channels", "width")),
    ]


class _Coder(ctypes.Structure):  # transform.cpp
    _fields_ = [
        *((name, _i64) for name in ("kind", "bits", "number", "count", "at")),
        *((name, _pointer) for name in ("levels", "encode", "decode")),
    ]


_before, _where = ctypes.POINTER(_Prologue), ctypes.POINTER(_Place)
_ARGUMENTS = {
    "fxc_affine_encode": (_pointer, _pointer, _i64, _i64, _int, _int, _before, _u32, _u32, _int),
    "fxc_affine_decode": (_pointer, _pointer, _i64, _i64, _int, _int, _pointer, _int),
    "fxc_bits_encode": (_pointer, _pointer, _i64, _i64, _int, _int, _int),
    "fxc_bits_decode": (_pointer, _pointer, _i64, _i64, _int, _int, _int),
    "fxc_cast_encode": (_pointer, _pointer, _i64, _i64, _int, _int, _int, _u32, _u32, _int),
    "fxc_cast_decode": (_pointer, _pointer, _i64, _i64, _int, _int, _int),
    "fxc_dither_decode": (_pointer, _pointer, _i64, _i64, _int, _int, _pointer, _u32, _u32, _int),
    "fxc_magnitude_encode": (_pointer, _pointer, *(_i64,) * 2, *(_int,) * 4, _u32, _u32, _int),
    "fxc_magnitude_decode": (_pointer, _pointer, *(_i64,) * 2, *(_int,) * 4),
    "fxc_rotate_encode": (
        *(_pointer, _pointer, _i64, _pointer, _int, _i64, _int, _int, _int),
        *(_before, _u32, _u32, _int),
    ),
    "fxc_rotate_decode": (
        *(_pointer, _pointer, _i64, _pointer, _int, _i64, _int, _int),
        *(_pointer, _u32, _u32, _int),
    ),
    "fxc_subsample_encode": (
        *(_pointer, _pointer, _i64, _pointer, _int, _int, _before, _u32, _u32, _int),
    ),
    "fxc_subsample_decode": (_pointer, _pointer, _i64, _pointer, _int, _int, _u32, _u32, _int),
    "fxc_transform_encode": (
        *(_pointer, _pointer, _i64, *(_pointer,) * 4, _where, _pointer, _i64),
        *(_pointer, _pointer, _pointer, _i64, _int, _int),
    ),
    "fxc_transform_decode": (
        *(_pointer,) * 4,
        *(_where, _pointer, _i64, _pointer, _pointer, _i64, _int, _int),
    ),
}
_OTHERS = {
    "fxc_transform_tile": ((), _i64),
    "fxc_transform_want_huge_pages": ((_pointer, _i64), None),
}


def start() -> None:
    """Begin to compile what most plans use, in threads that wait for the compiler.

    It is done once for each machine, 30 s of one core. Whoever needs a kernel waits for its part.
    """
    for unit in _UNITS:
        if not {"cast", "magnitude"} & set(unit):
            _begun(unit)


@cache
def available(family: str = "affine") -> bool:
    """True where this family's kernels could be compiled. The first call compiles them."""
    needed = {family} | (_CODERS.keys() | {"affine"} if family == "transform" else set())
    return all(_library(name) is not None for name in needed)


def empty(shape: Sequence[int], device: torch.device) -> Tensor:
    """fp32 memory for a pass of its own; on CPU in huge pages, of which fewer fault at first."""
    x = torch.empty(list(shape), dtype=torch.float32, device=device)
    if device.type == "cpu" and _library("transform") is not None:
        _function("fxc_transform_want_huge_pages")(x.data_ptr(), x.nbytes)
    return x


@cache
def _library(family: str) -> ctypes.CDLL | None:
    return _begun(next(unit for unit in _UNITS if family in unit)).result()


@cache
def _begun(unit: tuple[str, ...]) -> Future[ctypes.CDLL | None]:
    found: Future[ctypes.CDLL | None] = Future()

    def load() -> None:
        try:
            found.set_result(_load(unit))
        except Exception as error:  # for those who wait
            found.set_exception(error)

    Thread(target=load, daemon=True).start()  # a program that ends does not wait for it
    return found


def _forget() -> None:
    """A forked process has not the threads that its parent waits for."""
    for kept in (available, _library, _begun):
        kept.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _load(unit: tuple[str, ...]) -> ctypes.CDLL | None:
    folder = files("fxcompress.kernels")
    parts = [folder.joinpath(f"{name}.cpp").read_text("utf-8") for name in (*_SHARED, *unit)]
    library = load_cpp("\n".join(parts))
    if library is not None:
        kernels = {name: (arguments, ctypes.c_bool) for name, arguments in _ARGUMENTS.items()}
        for name, (arguments, result) in {**kernels, **_OTHERS}.items():
            if _family(name) in unit:
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, result
    return library


def _family(name: str) -> str:
    """Of a function: fxc_FAMILY_...."""
    return name.split("_")[1]


def affine_encode(
    x: Tensor,
    payload: Tensor,
    bits: int,
    group: int,
    k_a: int,
    k_b: int,
    before: Prologue | None = None,
) -> None:
    """Write the payload of `x` (float32, bfloat16 or float16). See `codecs.affine`."""
    kind = _FLOATS[x.dtype]
    _call("fxc_affine_encode", x, x, payload, group, bits, kind, _prologue(before), k_a, k_b)


def affine_decode(
    payload: Tensor, x: Tensor, bits: int, group: int, mask: Tensor | None = None
) -> None:
    """Fill `x` (float32, bfloat16 or float16) from its payload. See `codecs.affine`."""
    _call("fxc_affine_decode", x, payload, x, group, bits, _FLOATS[x.dtype], _address(mask))


def bits_encode(x: Tensor, payload: Tensor, bits: int, low: int) -> None:
    """Write the payload of `x` (bool or integers). See `codecs.bits`."""
    _call("fxc_bits_encode", x, x, payload, low, bits, _log2(x.element_size()))


def bits_decode(payload: Tensor, x: Tensor, bits: int, low: int) -> None:
    """Fill `x` (bool or integers) from its payload. See `codecs.bits`."""
    _call("fxc_bits_decode", x, payload, x, low, bits, _log2(x.element_size()))


def cast_encode(
    x: Tensor, payload: Tensor, format: str, group: int, keys: tuple[int, int] | None
) -> None:
    """Write the payload of `x` (float32, bfloat16 or float16), to nearest without `keys`.

    See `codecs.cast`.
    """
    kinds = (_FORMATS.index(format), keys is not None, _FLOATS[x.dtype])
    _call("fxc_cast_encode", x, x, payload, group, *kinds, *(keys or (0, 0)))


def cast_decode(payload: Tensor, x: Tensor, format: str, group: int) -> None:
    """Fill `x` (float32, bfloat16 or float16) from its payload. See `codecs.cast`."""
    _call("fxc_cast_decode", x, payload, x, group, _FORMATS.index(format), _FLOATS[x.dtype])


def dither_decode(
    payload: Tensor,
    x: Tensor,
    bits: int,
    group: int,
    k_a: int,
    k_b: int,
    mask: Tensor | None = None,
) -> None:
    """Fill `x` (float32, bfloat16 or float16) from its payload. See `codecs.dither`."""
    kinds = (bits, _FLOATS[x.dtype], _address(mask))
    _call("fxc_dither_decode", x, payload, x, group, *kinds, k_a, k_b)


def magnitude_encode(
    x: Tensor, payload: Tensor, levels: int, euclidean: bool, group: int, k_a: int, k_b: int
) -> None:
    """Write the payload of `x` (float32, bfloat16 or float16). See `codecs.magnitude`."""
    kinds = ((2 * levels).bit_length(), levels, euclidean, _FLOATS[x.dtype])
    _call("fxc_magnitude_encode", x, x, payload, group, *kinds, k_a, k_b)


def magnitude_decode(payload: Tensor, x: Tensor, levels: int, group: int) -> None:
    """Fill `x` (float32, bfloat16 or float16) from its payload. See `codecs.magnitude`."""
    kinds = ((2 * levels).bit_length(), levels, _FLOATS[x.dtype])
    _call("fxc_magnitude_decode", x, payload, x, group, *kinds)


def rotate_encode(
    x: Tensor,
    payload: Tensor,
    table: tuple[int, ...],
    bits: int,
    group: int,
    eden: bool,
    centred: bool,
    k_a: int,
    k_b: int,
    before: Prologue | None = None,
) -> None:
    """Write the payload of `x` (float32, bfloat16 or float16). See `codecs.rotate`."""
    kind = _FLOATS[x.dtype]
    kinds = (_address_of(table), bits, group, eden, centred, kind, _prologue(before))
    _call("fxc_rotate_encode", x, x, payload, *kinds, k_a, k_b)


def rotate_decode(
    payload: Tensor,
    x: Tensor,
    table: tuple[int, ...],
    bits: int,
    group: int,
    centred: bool,
    k_a: int,
    k_b: int,
    mask: Tensor | None = None,
) -> None:
    """Fill `x` (float32, bfloat16 or float16) from its payload. See `codecs.rotate`."""
    kind = _FLOATS[x.dtype]
    kinds = (_address_of(table), bits, group, centred, kind, _address(mask))
    _call("fxc_rotate_decode", x, payload, x, *kinds, k_a, k_b)


def subsample_encode(
    x: Tensor, payload: Tensor, table: tuple[int, ...], block: int, k_a: int, k_b: int
) -> None:
    """Write the payload of `x` (float32, bfloat16 or float16). See `codecs.subsample`."""
    at, kind = _address_of(table), _FLOATS[x.dtype]
    _call("fxc_subsample_encode", x, x, payload, at, block, kind, None, k_a, k_b)


def subsample_decode(
    payload: Tensor, x: Tensor, table: tuple[int, ...], block: int, k_a: int, k_b: int
) -> None:
    """Fill `x` (float32, bfloat16 or float16) from its payload. See `codecs.subsample`."""
    at, kind = _address_of(table), _FLOATS[x.dtype]
    _call("fxc_subsample_decode", x, payload, x, at, block, kind, k_a, k_b)


@dataclass(frozen=True)
class Bands:
    """Those of one rate, in a payload of `codecs.transform`.

    Attributes:
        kind: "rotate", "dither" or "subsample". bits: of a code, or the block one is drawn of.
        number: of the rate. count: of bands. at: where in the payload they begin.
        table: levels of rotated values.
    """

    kind: str
    bits: int
    number: int
    count: int
    at: int
    table: tuple[int, ...] = ()


@dataclass(frozen=True)
class Coders:
    """What `transform_encode` and `transform_decode` do with the bands of each rate.

    coded: how many bands that are.
    """

    rows: Any
    coded: int


def coders(bands: Sequence[Bands]) -> Coders:
    """Of bands in the order of their rates; to be kept by the caller, for many calls."""
    kinds = list(_CODERS)
    rows = [
        _Coder(
            *(kinds.index(b.kind), b.bits, b.number, b.count, b.at, _address_of(b.table)),
            *(ctypes.cast(_function(name), _pointer) for name in _CODERS[b.kind]),
        )
        for b in bands
    ]
    return Coders((_Coder * len(rows))(*rows), sum(b.count for b in bands))


def transform_encode(
    x: Tensor,
    payload: Tensor,
    state: Mapping[str, Tensor],
    mean: Tensor,
    ranked: Tensor,
    place: Place,
    coders: Coders,
    key: Tensor,
    stream: int,
) -> None:
    """Write the payload of `x` (float32, bfloat16 or float16), but for version and means.

    ranked: uint8[bands], the rates in use, from the highest.
    """
    tiles = -(-place.positions // _function("fxc_transform_tile")())
    scratch = torch.empty((place.positions + tiles) * place.bands)
    z = scratch.data_ptr()
    _run(
        "fxc_transform_encode",
        x,
        *(x.data_ptr(), payload.data_ptr(), payload.numel(), mean.data_ptr()),
        *(state["analysis"].data_ptr(), state["weight"].data_ptr(), ranked.data_ptr()),
        *(_place(place), coders.rows, len(coders.rows)),
        *(z, z + 4 * place.positions * place.bands, key.data_ptr(), stream, _FLOATS[x.dtype]),
    )


def transform_decode(
    payload: Tensor,
    x: Tensor,
    state: Mapping[str, Tensor],
    mean: Tensor,
    place: Place,
    coders: Coders,
    key: Tensor,
    stream: int,
) -> None:
    """Fill `x` (float32, bfloat16 or float16) from its payload. See `codecs.transform`."""
    z = torch.empty(place.positions * coders.coded)
    _run(
        "fxc_transform_decode",
        x,
        *(payload.data_ptr(), x.data_ptr(), mean.data_ptr(), state["synthesis"].data_ptr()),
        *(_place(place), coders.rows, len(coders.rows)),
        *(z.data_ptr(), key.data_ptr(), stream, _FLOATS[x.dtype]),
    )


@lru_cache(maxsize=4096)
def _place(place: Place) -> _Place:
    pairs = (_i64 * 2)(*place.blocks), (_i64 * 2)(*place.sides), (_i64 * 4)(*place.strides)
    return _Place(*pairs, place.positions, place.channels, place.width)


def _address_of(table: tuple[int, ...]) -> int:
    return ctypes.addressof(_int32s(table))


@cache  # there are a few tables, and kernels keep their addresses
def _int32s(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)


def _prologue(before: Prologue | None) -> _Prologue | None:
    """Where its numbers are; it keeps none of its tensors alive."""
    if isinstance(before, Filled):
        return _Prologue(fill=before.fill.data_ptr(), mask=before.mask.data_ptr())
    if isinstance(before, Standardised):
        mean, rstd = before.mean, before.rstd
        return _Prologue(None, None, mean.data_ptr(), rstd.data_ptr(), mean.numel(), before.inner)
    return None


def _address(mask: Tensor | None) -> int | None:
    return None if mask is None else mask.data_ptr()


def _log2(size: int) -> int:
    return size.bit_length() - 1


def _call(name: str, x: Tensor, source: Tensor, target: Tensor, *arguments: object) -> None:
    _run(name, x, source.data_ptr(), target.data_ptr(), x.numel(), *arguments)


def _function(name: str) -> Any:
    """Of its library, where there is one: codecs ask `available` before."""
    return getattr(_library(_family(name)), name)


def _run(name: str, x: Tensor, *arguments: object) -> None:
    threads = torch.get_num_threads() if x.numel() >= _PARALLEL else 1
    if not _function(name)(*arguments, threads):
        raise AssertionError(f"{name} has no kernel for {arguments}")  # codecs check before
