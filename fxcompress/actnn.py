"""For those who come from ActNN: its two calls, thin over the backend.

    actnn.set_optimization_level("L3")   →   fxcompress.set_optimization_level("L3")
    model = actnn.QModule(model)         →   model = fxcompress.QModule(model)

docs/migrating-from-actnn.md says what differs.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from fxcompress.backend import backend
from fxcompress.errors import SettingsError

LEVELS = {
    "L0": "lossless",
    "L1": "actnn-l1",
    "L2": "actnn-l2",
    "L3": "actnn-l3",
    "L3.1": "actnn-l3",  # L3 with smaller workspaces: Inductor and the allocator see to those
    "L4": "actnn-l4",
    "L5": "actnn-l5",
}

_Module = TypeVar("_Module", bound=nn.Module)
_level = "L3"  # as in ActNN


def set_optimization_level(level: str) -> None:
    """Which ActNN level :func:`QModule` follows from now on; ``L3`` until this is called.

    Raises:
        SettingsError: not one of ``L0``, ``L1``, ``L2``, ``L3``, ``L3.1``, ``L4``, ``L5``.
    """
    global _level
    if level not in LEVELS:
        instead = "; for exact payloads on the host, use PyTorch's own offloading"
        raise SettingsError(
            f"optimization level {level!r} is not one of {', '.join(LEVELS)}"
            f"{instead if level == 'swap' else ''}"
        )
    _level = level


def QModule(model: _Module, **settings: Any) -> _Module:
    """Compile ``model`` in place with the policy of the optimization level, and return it.

    It stays the module it was: same class, same names in the state dict, weights kept.

    Args:
        settings: for :func:`fxcompress.backend`, as ``budget_mb=4000``; a ``policy`` given here
            holds instead of the level's.

    Raises:
        SettingsError: a bad setting, or level L4 or L5 for a model on the CPU.
    """
    name = settings.setdefault("policy", LEVELS[_level])
    on_host = name in {"actnn-l4", "actnn-l5"}
    if on_host and any(p.device.type == "cpu" for p in model.parameters()):
        raise SettingsError(
            f"level {_level} keeps payloads in host memory, and the model is on the CPU: move it "
            'to its device first, or use set_optimization_level("L3"), which has the same bits'
        )
    model.compile(backend=backend(**settings))
    return model
