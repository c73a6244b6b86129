"""Report: plans on disk beside the compiled graphs, found again by the key that each graph carries.

A graph from Inductor's on-disk cache never passes through the partitioner, so the plan cannot be
kept in memory only. It is found again by the Dynamo graph it belongs to (our own backend), or by
the compiled graph itself: every rewritten one calls ``fxcompress::next_key(plan_key, …)``, and the
first such call tells which plan it was built from.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from fxcompress import ops, torch_private
from fxcompress.errors import FxCompressError
from fxcompress.evidence import Calibration
from fxcompress.plan import Plan

_Listener = Callable[[str], None]

_plans: dict[str, Plan] = {}  # read or made in this process: the folder on disk may go away
_executed: dict[str, None] = {}
_listeners: ContextVar[tuple[_Listener, ...]] = ContextVar("listeners", default=())


def store(plan: Plan) -> str:
    """Write ``plan`` beside Inductor's cache (atomically) and return its key."""
    key = plan.key()
    _plans[key] = plan
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, plan.to_json())
    return key


def read(key: str) -> Plan:
    """The plan stored under ``key``.

    Raises:
        FxCompressError: it is gone although a compiled graph still names it.
    """
    if key not in _plans:
        try:
            _plans[key] = Plan.load(_path(key))
        except FileNotFoundError:
            raise FxCompressError(
                f"the plan {key} of a cached graph is missing from {_path(key).parent}; clear "
                "the cache (rm -r that folder's parent) and compile again to have it made anew"
            ) from None
    return _plans[key]


def graph_key(module: torch.fx.GraphModule, inputs: Sequence[object], uuid: str) -> str:
    """Name of a Dynamo graph under some settings, equal in every process."""
    digest = hashlib.sha256(uuid.encode())
    digest.update(module.code.encode())
    for value in inputs:
        if isinstance(value, torch.Tensor):
            layout = (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
            digest.update(repr(layout).encode())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:24]


def remember(graph: str, plans: Sequence[str]) -> None:
    """Note which plans a graph was compiled with, for a process that finds it in the cache."""
    path = _path(f"graph-{graph}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(list(plans)))


def recall(graph: str) -> list[str]:
    """Plans of a graph that an earlier process compiled; none if it did not."""
    try:
        found: list[str] = json.loads(_path(f"graph-{graph}").read_text())
    except (FileNotFoundError, ValueError):
        return []
    return [key for key in found if key in _plans or _path(key).exists()]


def remember_calibration(graph: str, calibration: Calibration) -> None:
    """Keep what the first batch told about a graph, for later compiles of the same graph."""
    path = _path(f"calibration-{graph}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, calibration.to_json())


def recall_calibration(graph: str) -> Calibration | None:
    """What an earlier compile of the graph measured; None if there was none."""
    path = _path(f"calibration-{graph}")
    try:
        return Calibration.load(path) if path.is_file() else None
    except FxCompressError:
        return None  # of another version, or damaged: measure again


def executed() -> list[str]:
    """Keys of all plans whose graphs ran in this process, in order of first use."""
    return list(_executed)


@contextmanager
def listening(listener: _Listener) -> Iterator[None]:
    """Have ``listener`` called with the plan key of each rewritten graph that runs inside."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def _on_step(key: str) -> None:
    if not key:  # a graph run by hand: no plan is stored for it
        return
    _executed[key] = None
    for listener in _listeners.get():
        listener(key)


ops.on_step.append(_on_step)


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another process may be reading."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _path(key: str) -> Path:
    return torch_private.cache_dir() / "fxcompress" / f"{key}.json"
