"""Report: plans on disk beside the compiled graphs, found again by the key that each graph carries.

A graph from Inductor's on-disk cache never passes through the partitioner, so the plan cannot be
kept in memory only. It is found again by the Dynamo graph it belongs to (our own backend), or by
the compiled graph itself: every rewritten one calls ``fxcompress::next_key(plan_key, …)``, and the
first such call tells which plan it was built from.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from fxcompress import files, ops, schema, torch_private
from fxcompress.errors import FxCompressError
from fxcompress.evidence import Calibration
from fxcompress.plan import Plan

LARGEST_LIST = 1 << 20  # bytes; a graph has one or two plans

_HOOKS = (
    "hooks on saved tensors are in force (saved_tensors_hooks, save_on_cpu, or checkpointing "
    "around a compiled model): they are given what fxcompress packed, and must give it back bit "
    "for bit; what they hold is in no budget. Run the compiled model outside of them, or compile "
    "it with backend='inductor'"
)

_Listener = Callable[[str], None]

_plans: dict[str, Plan] = {}  # read or made in this process: the folder on disk may go away
_executed: dict[str, None] = {}
_listeners: ContextVar[tuple[_Listener, ...]] = ContextVar("listeners", default=())


def store(plan: Plan) -> str:
    """Keep ``plan``, also beside Inductor's cache if that can be written to; its key."""
    key = plan.key()
    _plans[key] = plan
    files.keep(_path(key), plan.to_json())
    return key


def read(key: str) -> Plan:
    """The plan stored under ``key``.

    Raises:
        FxCompressError: it is gone, or damaged, although a compiled graph still names it.
    """
    if key not in _plans:
        remedy = "clear the cache (rm -r that folder's parent) and compile again to have it made"
        folder = _path(key).parent
        try:
            found = Plan.load(_path(key))
        except OSError:
            raise FxCompressError(
                f"the plan {key} of a cached graph is missing from {folder}; {remedy} anew"
            ) from None
        except FxCompressError as error:
            raise FxCompressError(
                f"the plan {key} of a cached graph in {folder} is damaged ({error}); {remedy} anew"
            ) from None
        if found.key() != key:
            raise FxCompressError(
                f"the plan {key} of a cached graph in {folder} was changed; {remedy} anew"
            )
        _plans[key] = found
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
    files.keep(_path(f"graph-{graph}"), json.dumps(list(plans)))


def recall(graph: str) -> list[str]:
    """Plans of a graph that an earlier process compiled; none if it did not."""
    try:
        data = files.read_json(_path(f"graph-{graph}"), LARGEST_LIST)
        found: tuple[str, ...] = schema.value(tuple[str, ...], data)
    except (OSError, ValueError):
        return []
    return [key for key in found if _is_readable(key)]


def _is_readable(key: str) -> bool:
    try:
        read(key)
    except FxCompressError:
        return False
    return True


def remember_calibration(graph: str, calibration: Calibration) -> None:
    """Keep what the first batch told about a graph, for later compiles of the same graph."""
    files.keep(_path(f"calibration-{graph}"), calibration.to_json(whole=False))


def recall_calibration(graph: str) -> Calibration | None:
    """What an earlier compile of the graph measured; None if there was none."""
    path = _path(f"calibration-{graph}")
    try:
        found = Calibration.load(path) if path.is_file() else None
    except (FxCompressError, OSError):
        return None  # of another version, or damaged: measure again
    return found if found is None or found.is_at_hand else None


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
    if torch_private.hooks_on_saved_tensors():
        warnings.warn(_HOOKS, stacklevel=2)
    _executed[key] = None
    for listener in _listeners.get():
        listener(key)


ops.on_step.append(_on_step)


def _path(key: str) -> Path:
    return torch_private.cache_dir() / "fxcompress" / f"{key}.json"
