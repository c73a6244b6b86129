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
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress import torch_private
from fxcompress.errors import CodecError
from fxcompress.persistent import persistent

State = Mapping[str, Tensor | npt.NDArray[Any]]
Arrays = dict[str, npt.NDArray[Any]]

LARGEST_FILE = 256 << 20  # bytes; a basis of 4096 channels in blocks of 64 takes 1 MB

_states: dict[str, Arrays] = {}
_on_device: dict[tuple[str, torch.device], dict[str, Tensor]] = {}


def put(state: State) -> str:
    """Keep a state; the name under which :func:`get` finds it.

    CPU tensors, or NumPy arrays, which is what a policy has to give that is asked in mid-compile:
    tensors made there are fake.
    """
    arrays = {
        k: v.detach().contiguous().numpy().copy() if isinstance(v, Tensor) else v.copy()
        for k, v in state.items()
    }
    name = _name(arrays)
    if name not in _states:
        _states[name] = arrays
        path = _path(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(dump(name))
            os.replace(file.name, path)
    return name


def arrays(name: str) -> Arrays:
    """The state of that name as NumPy arrays, which no tracer sees.

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
        found = _load(content)
        if _name(found) != name:
            raise CodecError(f"{_path(name)} is damaged: delete it and calibrate again")
        _states[name] = found
    return _states[name]


def get(name: str, device: torch.device) -> dict[str, Tensor]:
    """The state of that name as tensors on a device. Raises as :func:`arrays`."""
    key = (name, device)
    if key not in _on_device:
        with persistent(device):
            _on_device[key] = {k: torch.from_numpy(v).to(device) for k, v in arrays(name).items()}
    return _on_device[key]


def dump(name: str) -> bytes:
    """A state as bytes, for :func:`restore`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays(name))  # type: ignore[arg-type]
    return buffer.getvalue()


def restore(content: bytes) -> str:
    """Keep a state that :func:`dump` wrote; its name.

    Raises:
        CodecError: not such bytes.
    """
    return put({k: torch.from_numpy(v) for k, v in _load(content).items()})


def _load(content: bytes) -> Arrays:
    if len(content) > LARGEST_FILE:
        raise CodecError("a calibrated state is larger than any of ours")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            return {k: found[k] for k in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CodecError(f"not a calibrated state: {error}") from error


def _name(found: Arrays) -> str:
    digest = hashlib.sha256()
    for key in sorted(found):
        array = np.ascontiguousarray(found[key])
        digest.update(f"{key} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _path(name: str) -> Path:
    return torch_private.cache_dir() / "fxcompress" / f"state-{name}.npz"
