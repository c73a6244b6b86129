"""States: calibrated arrays that a codec's spec names by their content.

A spec is text, so a codec that needs a basis carries the hash of its state. States live in memory
and beside Inductor's cache, where a process that loads a compiled graph finds them again. They are
plain arrays (NumPy's npz, no pickle): loading one runs no code.

A state may be renewed as training goes, under its old name: compiled graphs hold the name. What was
encoded before is decoded by the arrays of then: a payload carries the state's version, a device
keeps the last two, and what is older decodes to NaN, never to wrong numbers. No step waits for the
device, and a captured CUDA graph sees the renewal if the state was made `renewable` before.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxcompress import files, torch_private
from fxcompress.errors import CodecError
from fxcompress.persistent import persistent

State = Mapping[str, Tensor | npt.NDArray[Any]]
Arrays = dict[str, npt.NDArray[Any]]

LARGEST_FILE = 256 << 20  # bytes; a basis of 4096 channels in blocks of 64 takes 1 MB

_NAME = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class _Ring:
    """The last two versions of a state on a device, changed in place.

    Attributes:
        version: uint8[1], of the newest; the slot of a version is its parity.
        slots: each array twice, stacked.
    """

    version: Tensor
    slots: dict[str, Tensor]


_states: dict[str, Arrays] = {}
_on_device: dict[tuple[str, torch.device], dict[str, Tensor]] = {}
_rings: dict[tuple[str, torch.device], _Ring] = {}


def put(state: State) -> str:
    """Keep a state; the name under which :func:`get` finds it.

    CPU tensors, or NumPy arrays, which is what a policy has to give that is asked in mid-compile:
    tensors made there are fake.
    """
    arrays = _as_arrays(state)
    name = _name(arrays)
    if name not in _states:
        _states[name] = arrays
        files.keep(_path(name), dump(name))
    return name


def arrays(name: str) -> Arrays:
    """The state of that name as NumPy arrays, which no tracer sees.

    Raises:
        CodecError: it is neither in memory nor on disk.
    """
    if name not in _states:
        if not _NAME.fullmatch(name):
            raise CodecError(f"{name!r} is no name of a calibrated state: calibrate the model")
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


def is_kept(name: str) -> bool:
    """:func:`arrays` has it in memory or will look into a file."""
    return name in _states or _path(name).is_file()


def get(name: str, device: torch.device) -> dict[str, Tensor]:
    """The newest arrays of that name as tensors on a device. Raises as :func:`arrays`."""
    ring = _rings.get((name, device))
    return _base(name, device) if ring is None else _select(ring, ring.version)


def version(name: str, device: torch.device) -> Tensor | None:
    """uint8[1] on the device: which version :func:`get` gives now; None: the first, 0."""
    ring = _rings.get((name, device))
    return None if ring is None else ring.version


def of_payload(name: str, payload: Tensor) -> dict[str, Tensor]:
    """The arrays that were the newest at the version in the payload's first byte; NaN if they are
    gone."""
    ring = _rings.get((name, payload.device))
    if ring is None:
        return _base(name, payload.device)
    version = payload[:1]
    is_held = (ring.version - version) <= 1  # modulo 256
    found = _select(ring, version)
    return {
        k: torch.where(is_held, v, torch.nan) if v.is_floating_point() else v
        for k, v in found.items()
    }


def renewable(name: str, device: torch.device) -> None:
    """Have :func:`renew` reach graphs captured from now on. Takes the state's memory twice."""
    key = (name, device)
    if key not in _rings:
        base = _base(name, device)
        with persistent(device):
            slots = {k: torch.stack([v, v]) for k, v in base.items()}
            _rings[key] = _Ring(torch.zeros(1, dtype=torch.uint8, device=device), slots)
        del _on_device[key]


def renew(name: str, state: State) -> None:
    """Replace the arrays of a state, in this process; the same keys, shapes and types.

    Raises:
        CodecError: others.
    """
    old, new = arrays(name), _as_arrays(state)
    if {k: (v.shape, v.dtype) for k, v in old.items()} != {
        k: (v.shape, v.dtype) for k, v in new.items()
    }:
        raise CodecError(f"the state {name!r} has arrays of other shapes: calibrate again instead")
    for device in {d for n, d in (*_on_device, *_rings) if n == name}:
        renewable(name, device)
        ring = _rings[name, device]
        slot = (ring.version + 1 & 1).long()
        for key, stack in ring.slots.items():
            fresh = torch.from_numpy(new[key]).to(device)
            stack.index_copy_(0, slot, fresh[None])
        ring.version.add_(1)
    _states[name] = new


def _base(name: str, device: torch.device) -> dict[str, Tensor]:
    key = (name, device)
    if key not in _on_device:
        with persistent(device):
            _on_device[key] = {k: torch.from_numpy(v).to(device) for k, v in arrays(name).items()}
    return _on_device[key]


def _select(ring: _Ring, version: Tensor) -> dict[str, Tensor]:
    slot = (version & 1).long()
    return {k: v.index_select(0, slot)[0] for k, v in ring.slots.items()}


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


def current_name(name: str) -> str:
    """The name that the state's newest arrays have by their content."""
    return _name(arrays(name))


def _as_arrays(state: State) -> Arrays:
    return {
        k: v.detach().cpu().contiguous().numpy().copy() if isinstance(v, Tensor) else v.copy()
        for k, v in state.items()
    }


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
