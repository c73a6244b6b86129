"""Report: plans on disk beside the compiled graphs, found again by the key that each graph carries.

A graph from Inductor's on-disk cache never passes through the partitioner, so the plan cannot be
kept in memory only. Every rewritten graph calls ``fxcompress::next_key(plan_key, …)``; the first
such call of a compiled graph tells which plan it was built from.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import contextmanager
from contextvars import ContextVar
from collections.abc import Iterator

from fxcompress import ops, torch_private
from fxcompress.errors import FxCompressError
from fxcompress.plan import Plan

log = logging.getLogger("fxcompress")

_seen: dict[str, None] = {}
_listeners: ContextVar[tuple[dict[str, None], ...]] = ContextVar("listeners", default=())


def store(plan: Plan) -> str:
    """Write ``plan`` beside Inductor's cache (atomically) and return its key."""
    key = plan.key()
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(plan.to_json())
    os.replace(file.name, path)
    return key


def read(key: str) -> Plan:
    """The plan stored under ``key``.

    Raises:
        FxCompressError: it is gone although a compiled graph still names it.
    """
    try:
        return Plan.load(_path(key))
    except FileNotFoundError:
        raise FxCompressError(
            f"the plan {key} of a cached graph is missing from {_path(key).parent}; clear the "
            "cache (rm -r that folder's parent) and compile again to have it made anew"
        ) from None


def executed() -> list[str]:
    """Keys of all plans whose graphs ran in this process, in order of first use."""
    return list(_seen)


@contextmanager
def listening(found: dict[str, None]) -> Iterator[None]:
    """Collect into ``found`` the plan keys of graphs that run inside."""
    token = _listeners.set((*_listeners.get(), found))
    try:
        yield
    finally:
        _listeners.reset(token)


def _on_step(key: str) -> None:
    for found in _listeners.get():
        found[key] = None
    if key not in _seen:
        _seen[key] = None


ops.on_step.append(_on_step)


def _path(key: str) -> "os.PathLike[str]":
    return torch_private.cache_dir() / "fxcompress" / f"{key}.json"
