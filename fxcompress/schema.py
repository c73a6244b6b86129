"""Schema: data from a JSON file as a dataclass, every field checked against its type hint.

Files come from elsewhere: what is not of the declared shape is refused, with the place where it is
wrong, before anything works with it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_Kind = TypeVar("_Kind")


def build(kind: type[_Kind], data: Any, where: str = "") -> _Kind:
    """``data``, as :func:`json.loads` gives it, as an instance of the dataclass ``kind``.

    Lists become tuples. Fields with a default may be missing, unknown ones may not be there.

    >>> from fxcompress.plan import Moment
    >>> build(Moment, {"node": "add", "phase": "forward", "plain_bytes": 8, "planned_bytes": "4"})
    Traceback (most recent call last):
    ...
    ValueError: planned_bytes: '4' is no int

    Raises:
        ValueError: it is of another shape; the message names the field.
    """
    if not isinstance(data, dict):
        raise _mismatch(where, data, kind.__name__)
    assert is_dataclass(kind)
    known = {f.name: f for f in fields(kind)}
    for name in data:
        if name not in known:
            raise ValueError(f"{_join(where, str(name))}: unknown")
    for name, field in known.items():
        is_optional = field.default is not MISSING or field.default_factory is not MISSING
        if name not in data and not is_optional:
            raise ValueError(f"{_join(where, name)}: missing")
    hints = _hints(kind)
    return kind(**{k: value(hints[k], v, _join(where, k)) for k, v in data.items()})


def value(hint: Any, data: Any, where: str = "") -> Any:
    """``data`` as a value of the type ``hint``: a number, text, tuple, mapping, dataclass, union.

    Raises:
        ValueError: see :func:`build`.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return _one_of(parts, data, where)
    if origin is tuple:
        return _items(parts, data, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise _mismatch(where, data, "object")
        return {
            _key(parts[0], k, where): value(parts[1], v, f"{where}[{k!r}]") for k, v in data.items()
        }
    if is_dataclass(hint):
        return build(hint, data, where)  # type: ignore[arg-type]
    if hint is float and type(data) is int and abs(data) < 1 << 1000:
        return data  # as it is: written again, it is the same text
    if hint is type(None) and data is None:
        return None
    if hint not in {int, float, str, bool} or type(data) is not hint:
        raise _mismatch(where, data, getattr(hint, "__name__", str(hint)))
    return data


def _one_of(parts: tuple[Any, ...], data: Any, where: str) -> Any:
    errors = []
    for part in parts:
        try:
            return value(part, data, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _items(parts: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _mismatch(where, data, "list")
    if len(parts) == 2 and parts[1] is Ellipsis:
        parts = (parts[0],) * len(data)
    if len(parts) != len(data):
        raise ValueError(f"{where}: {len(data)} items, not {len(parts)}")
    pairs = zip(parts, data, strict=True)
    return tuple(value(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(pairs))


def _key(hint: Any, key: str, where: str) -> Any:
    """JSON has texts for keys only."""
    if hint is not float:
        return key
    try:
        return float(key)
    except ValueError:
        raise _mismatch(where, key, "number") from None


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _mismatch(where: str, data: Any, wanted: str) -> ValueError:
    shown = repr(data)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return ValueError(f"{where}: {shown} is no {wanted}".removeprefix(": "))
