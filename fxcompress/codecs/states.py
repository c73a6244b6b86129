"""States: calibrated arrays that a codec's spec names by their content.

A spec is text, so a codec that needs a basis carries the hash of its state. States live in memory
and beside Inductor's cache, where a process that loads a compiled graph finds them again. They are
plain arrays (NumPy's npz, no pickle): loading one runs no code.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress import torch_private
from fxcompress.errors import CodecError

State = Mapping[str, Tensor]

LARGEST_FILE = 256 << 20  # bytes; a basis of 4096 channels in blocks of 64 takes 1 MB

_states: dict[str, dict[str, Tensor]] = {}
_on_device: dict[tuple[str, torch.device], dict[str, Tensor]] = {}


def put(state: State) -> str:
    """Keep a state of CPU tensors; the name under which :func:`get` finds it."""
    name = _name(state)
    if name not in _states:
        _states[name] = {k: v.contiguous().clone() for k, v in state.items()}
        path = _path(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(dump(state))
            os.replace(file.name, path)
    return name


def get(name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The state of that name, on a device.

    Raises:
        CodecError: it is neither in memory nor on disk.
    """
    if name not in _states:
        try:
            content = _path(name).read_bytes()
        except OSError:
            raise CodecError(
                f"the calibrated state {name!r} is missing from {_path(name).parent}: calibrate "
                "the model again, or load the calibration that was saved with it"
            ) from None
        found = load(content)
        if _name(found) != name:
            raise CodecError(f"{_path(name)} is damaged: delete it and calibrate again")
        _states[name] = found
    device = torch.device(device)
    if device.type == "cpu":
        return _states[name]
    key = (name, device)
    if key not in _on_device:
        _on_device[key] = {k: v.to(device) for k, v in _states[name].items()}
    return _on_device[key]


def dump(state: State) -> bytes:
    """A state as bytes."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {k: state[k].detach().cpu().numpy() for k in sorted(state)}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def load(content: bytes) -> dict[str, Tensor]:
    """The inverse of :func:`dump`.

    Raises:
        CodecError: not such bytes.
    """
    if len(content) > LARGEST_FILE:
        raise CodecError("a calibrated state is larger than any of ours")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {k: torch.from_numpy(arrays[k]) for k in arrays.files}
    except (ValueError, OSError, EOFError) as error:
        raise CodecError(f"not a calibrated state: {error}") from error


def _name(state: State) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        array = state[key].detach().cpu().contiguous().numpy()
        digest.update(f"{key} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _path(name: str) -> Path:
    return torch_private.cache_dir() / "fxcompress" / f"state-{name}.npz"
