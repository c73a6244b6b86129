"""Codecs: ways to write a saved tensor as bytes. One family a file; `codec(spec)` finds them.

A family's file holds its definition in plain ATen ops (`*_reference`), its byte count, its error,
and calls its kernels, which give the same bits, where they are available.
"""

from __future__ import annotations

import re
from dataclasses import fields
from functools import cache
from typing import Any

from fxcompress.codecs.adaptive import Adaptive
from fxcompress.codecs.affine import Affine
from fxcompress.codecs.average import Average
from fxcompress.codecs.base import Codec, ErrorModel
from fxcompress.codecs.bits import Bits
from fxcompress.codecs.cast import Cast
from fxcompress.codecs.dither import Dither
from fxcompress.codecs.frequency import Frequency
from fxcompress.codecs.magnitude import Magnitude
from fxcompress.codecs.mixture import Mixture
from fxcompress.codecs.rotate import Rotate
from fxcompress.codecs.sign import Sign
from fxcompress.codecs.subsample import Subsample
from fxcompress.codecs.transform import Transform
from fxcompress.errors import CodecError

__all__ = [
    "Adaptive",
    "Affine",
    "Average",
    "Bits",
    "Cast",
    "Codec",
    "ErrorModel",
    "Frequency",
    "Magnitude",
    "Mixture",
    "Sign",
    "codec",
    "codec_names",
]

_FAMILIES: dict[str, type[Codec]] = {
    family.name: family
    for family in (
        Affine,
        Bits,
        Cast,
        Magnitude,
        Sign,
        Mixture,
        Average,
        Frequency,
        Adaptive,
        Rotate,
        Dither,
        Subsample,
        Transform,
    )
}
_SPEC = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*")


def codec_names() -> tuple[str, ...]:
    """The names of all codec families."""
    return tuple(_FAMILIES)


@cache
def codec(spec: str) -> Codec:
    """The codec that a spec names; parameters left out take their defaults.

    >>> codec("affine(bits=2)").spec
    'affine(bits=2)'

    Raises CodecError, with what to write instead, on an unknown name or parameter and on a value
    of the wrong type or out of range.
    """
    match = _SPEC.fullmatch(spec)
    if match is None or match[1] not in _FAMILIES:
        raise CodecError(
            f"unknown codec {spec!r}: write one of {', '.join(_FAMILIES)}, "
            "with parameters as in 'affine(bits=4,group=256)'"
        )
    family = _FAMILIES[match[1]]
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(family)}
    given: dict[str, Any] = {}
    for item in filter(None, (match[2] or "").replace(" ", "").split(",")):
        name, _, value = item.partition("=")
        if name not in kinds or name in given:
            raise CodecError(f"codec {spec!r}: give each of {', '.join(kinds)} at most once")
        try:
            given[name] = _read(kinds[name], value)
        except ValueError:
            kind = kinds[name].__name__
            raise CodecError(f"codec {spec!r}: {name} must be of type {kind}") from None
    return family(**given)


def _read(kind: type, text: str) -> Any:
    if kind is bool:
        if text not in {"True", "False"}:
            raise ValueError(text)
        return text == "True"
    return kind(text)
