"""Named policies: which representation each saved tensor gets. Each seed system keeps its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from fxcompress.codecs import codec, codec_names
from fxcompress.errors import CodecError, SettingsError
from fxcompress.policies import (
    actnn,
    average,
    division,
    fp8,
    gact,
    offload,
    thesis,
    transform,
    uniform,
)
from fxcompress.policies.base import Policy, Situation

__all__ = ["Policy", "Situation", "check_policy", "policies", "policy"]

_AUTO = Policy(
    "auto", "a representation for each tensor, the least noise under the budget", solves=True
)

_FIXED = {
    p.name: p
    for p in (
        *uniform.POLICIES,
        *transform.POLICIES,
        *actnn.POLICIES,
        *fp8.POLICIES,
        *offload.POLICIES,
        _AUTO,
    )
}
# Policies with parameters: name(…) as in Python, all optional.
_MAKERS: dict[str, Callable[..., Policy]] = {
    **gact.MAKERS,
    **{f"aq-{bits}": partial(average.aq, bits) for bits in (2.0, 1.5, 1.25, 1.0)},
    "alam": average.alam,
    "division": division.division,
    "thesis-det": thesis.det,
    "thesis-affine": thesis.affine,
    "thesis-stoch": thesis.stoch,
    "transform": transform.transform,
}
_SPEC = re.compile(r"\s*([\w.-]+?)\s*(?:\((.*)\))?\s*")


def policies() -> list[str]:
    """Names accepted by ``fxcompress.backend(policy=…)``."""
    return [*_FIXED, *_MAKERS]


def check_policy(name: str) -> None:
    """Raise SettingsError unless ``name`` is a policy."""
    policy(name)


@cache
def policy(name: str) -> Policy:
    """The policy called ``name``, with its parameters: ``thesis-det(2)``, ``division(b=4,q=2)``.

    The spec of a codec is a policy, too: ``rotate(bits=2,scale=lsq)`` codes every float saved
    tensor so.

    Raises:
        SettingsError: unknown name or parameter; the message lists the known ones.
    """
    match = _SPEC.fullmatch(name)
    base = match[1] if match else name
    if match and base in _MAKERS:
        return _make(name, _MAKERS[base], match[2] or "")
    if base in _FIXED and match is not None and match[2]:
        quirks = "; what sets the original apart is not reproduced" * ("faithful" in match[2])
        raise SettingsError(f"policy {name!r}: {base} takes no parameters{quirks}")
    if base in _FIXED:
        return _FIXED[base]
    if base in codec_names():
        try:
            return uniform.every(codec(name).spec)
        except CodecError as error:
            raise SettingsError(f"policy {name!r}: {error}") from None
    hint = " (widths are 1 to 8 bits)" if re.fullmatch(r"uniform\d+", base) else ""
    if "@" in name:  # as tables and benchmarks write it
        hint = ": a bound is a setting of its own, ratio_saved=12 for @12, budget_mb=100 for @100MB"
    raise SettingsError(f"unknown policy {name!r}{hint}; choose one of: {', '.join(policies())}")


def _make(name: str, maker: Callable[..., Policy], text: str) -> Policy:
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if equals:
            named[key] = _value(value)
        else:
            positional.append(_value(key))
    try:
        inspect.signature(maker).bind(*positional, **named)
        return maker(*positional, **named)
    except TypeError as error:
        parameters = ", ".join(str(p) for p in inspect.signature(maker).parameters.values())
        raise SettingsError(
            f"policy {name!r}: {error}; its parameters are ({parameters})"
        ) from None
    except CodecError as error:
        raise SettingsError(f"policy {name!r}: {error}") from None


def _value(text: str) -> Any:
    """A number, a truth value, or the text itself."""
    if text in {"True", "False"}:
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
