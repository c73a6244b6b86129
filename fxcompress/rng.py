"""Counter-based random bits: a hash of (seed, step, stream, element index).

Every lowering (ATen reference, C++, Triton) computes the same hash, so that the same key gives
the same payload bits everywhere. PyTorch's own generators are read (their seed), never advanced:
dropout and data order are those of a run without compression.

    mix    lowbias32: x ^= x>>16; x *= 0x7feb352d; x ^= x>>15; x *= 0x846ca68b; x ^= x>>16
           (Chris Wellons, "Prospecting for Hash Functions", 2018; bias 0.17)
    key    int64[2] = [base, counter], one a step
    stream h = mix(stream + 0x9E3779B9), then mix(h ^ word) over lo(base), hi(base), lo(counter)
           and hi(counter) = k_a; k_b = mix(k_a ^ 0x85EBCA6B)
    hash   mix(mix(i ^ k_a) + k_b) for element i, counted in storage order, all modulo 2^32
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxcompress.errors import FxCompressError
from fxcompress.persistent import persistent

MASK = 0xFFFFFFFF
_MASK64 = (1 << 64) - 1
_Word = TypeVar("_Word", int, Tensor)


def mix(x: _Word) -> _Word:
    """lowbias32 of a 32-bit word: a Python int, or an int64 tensor of values in [0, 2^32)."""
    # An int64 product may wrap (0x846ca68b * 2^32 > 2^63); its low 32 bits are still exact.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def _stream(base: _Word, counter: _Word, stream: int) -> tuple[_Word, _Word]:
    seed = mix((stream + 0x9E3779B9) & MASK)
    h = mix((base & MASK) ^ seed)
    for word in ((base >> 32) & MASK, counter & MASK, (counter >> 32) & MASK):
        h = mix(h ^ word)
    return h, mix(h ^ 0x85EBCA6B)


# What is decoded several times, in the step that encoded it, asks for the same.
_stream_ints = lru_cache(maxsize=1 << 12)(_stream)


def stream_keys(key: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """(k_a, k_b) of a stream as 0-dim int64 tensors on the key's device, without a sync.

    key: int64[2] from `next_key`; stream: the number of the saved tensor in its plan.
    """
    return _stream(key[0], key[1], stream)


def stream_key_ints(key: Tensor, stream: int) -> tuple[int, int]:
    """`stream_keys` as Python ints, for kernels that take scalars. Waits for a CUDA key."""
    base, counter = key.tolist()
    return _stream_ints(base, counter, stream)


def hash_range(start: int, count: int, k_a: Tensor, k_b: Tensor) -> Tensor:
    """The hashes of elements start .. start+count: int64[count] with values in [0, 2^32)."""
    index = torch.arange(start, start + count, dtype=torch.int64, device=k_a.device)
    return mix((mix((index & MASK) ^ k_a) + k_b) & MASK)


# The step state: which seed is in use, and how many steps each device has drawn from it.

_lock = threading.Lock()
_explicit: int | None = None  # set by manual_seed
_source: tuple[int, int] | None = None  # (seed, rank) last seen; another one restarts the counters
_seed = 0  # the seed in use: that of _source, or the one set_state brought back
_restored = False  # by set_state, and no key was drawn since
_counters: dict[str, int] = {"cpu": 0}  # of CPU, and of devices restored but not used yet
_device_states: dict[str, Tensor] = {}  # int64[2] = [base, counter], living on the device


def _finalize64(x: int) -> int:
    """splitmix64's output function (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _rank() -> int:
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _base() -> int:
    """The signed 64-bit base of the seed in use; each rank has its own."""
    base = _finalize64(_finalize64(_seed & _MASK64) ^ _rank())
    return base - (1 << 64) if base >> 63 else base


def _write(state: Tensor, counter: int) -> None:
    # In place, so that a captured CUDA graph sees it; fills take a scalar, so nothing waits.
    state[0].fill_(_base())
    state[1].fill_(counter)


def _restart() -> None:
    _counters.clear()
    _counters["cpu"] = 0
    for state in _device_states.values():
        _write(state, 0)


def _follow_seed() -> None:
    """Restart from counter 0 where the user's seed, or the rank, is not the last one seen.

    A checkpoint has PyTorch's random state as well, and loading that changes the seed, too: to the
    one that our own state, if it was loaded before, has already brought back.
    """
    global _source, _seed
    source = (torch.initial_seed() if _explicit is None else _explicit, _rank())
    if source != _source:
        is_loaded = _restored and source[0] == _seed
        _source, _seed = source, source[0]
        if not is_loaded:
            _restart()


def _device_state(device: torch.device) -> Tensor:
    if device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    name = str(device)
    if name not in _device_states:
        with persistent(device):
            state = torch.zeros(2, dtype=torch.int64, device=device)
            _write(state, _counters.pop(name, 0))
        _device_states[name] = state
    return _device_states[name]


def prepare(device: torch.device) -> None:
    """Create a device's state. A CUDA graph captured by hand, without a warm-up, needs it."""
    with _lock:
        _follow_seed()
        if device.type != "cpu":
            _device_state(device)


def next_key(device: torch.device) -> Tensor:
    """This step's key, int64[2] = [base, counter] on `device`; advances the device's counter.

    On CUDA the state lives on the device: no sync, and a replayed CUDA graph advances it. A
    replay runs no Python, so there only `manual_seed` (not `torch.manual_seed`) restarts it.
    """
    global _restored
    with _lock:
        if device.type == "cpu":
            _follow_seed()
            _restored = False
            counter = _counters["cpu"]
            _counters["cpu"] = counter + 1
            return torch.tensor([_base(), counter], dtype=torch.int64)
        # A restart during capture would be replayed every step.
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _follow_seed()
            _restored = False
        state = _device_state(device)
        key = state.clone()
        state[1].add_(1)
        return key


def manual_seed(seed: int | None) -> None:
    """Use `seed` for all compression noise, from step 0 on every device.

    None goes back to following `torch.manual_seed`, from step 0 too.
    """
    global _explicit, _source, _restored
    with _lock:
        _explicit, _source, _restored = seed, None, False
        _follow_seed()


def use_setting(seed: int, *, begin: bool) -> None:
    """Use `seed`, as `manual_seed` does, but let a stream of this seed that is under way go on.

    begin: a run begins, so from step 0, unless a checkpoint was just loaded; else a graph is
    compiled, perhaps in mid-training, for a new shape.
    """
    if _explicit != seed or (begin and not _restored):
        manual_seed(seed)


def get_state() -> dict[str, Any]:
    """The state as a JSON-able dict for checkpoints. Waits for CUDA devices.

    The rank is not part of it: a state saved on one rank may be loaded on all, and each rank
    still draws noise of its own.
    """
    with _lock:
        _follow_seed()
        used = {name: int(state[1].item()) for name, state in _device_states.items()}
        return {"explicit_seed": _explicit, "seed": _seed, "counters": {**_counters, **used}}


def set_state(state: Mapping[str, Any]) -> None:
    """Continue from a state of `get_state`, until the user seeds again.

    Raises:
        FxCompressError: not such a state.
    """
    global _explicit, _source, _seed, _restored
    explicit, seed, counters = _checked(state)
    with _lock:
        _explicit, _source = explicit, None
        _follow_seed()
        _seed, _restored = seed, True
        _counters.update(counters)
        for name, device_state in _device_states.items():
            _write(device_state, _counters.pop(name, 0))


def _checked(state: Mapping[str, Any]) -> tuple[int | None, int, dict[str, int]]:
    try:
        explicit, seed, counters = (state[k] for k in ("explicit_seed", "seed", "counters"))
        numbers = [seed, *counters.values(), *([] if explicit is None else [explicit])]
        if all(type(n) is int for n in numbers) and all(type(k) is str for k in counters):
            return explicit, seed, dict(counters)
    except (TypeError, KeyError, AttributeError):
        pass
    raise FxCompressError(
        "this is no state of the noise: load what fxcompress.noise.state_dict() gave when the "
        "checkpoint was saved"
    )


class Noise:
    """The noise of this process as an object with a state, as checkpoints want it.

    A run that is resumed with it draws, step by step, the noise that it would have drawn:

    >>> import fxcompress, torch
    >>> checkpoint = {"noise": fxcompress.noise.state_dict(), "torch": torch.get_rng_state()}
    >>> fxcompress.noise.load_state_dict(checkpoint["noise"])

    `accelerator.register_for_checkpointing(fxcompress.noise)` and `torch.distributed.checkpoint`
    take the object itself. Load PyTorch's random state before or after, but seed nothing later.
    """

    def state_dict(self) -> dict[str, Any]:
        """See `get_state`."""
        return get_state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `set_state`."""
        set_state(state_dict)


noise = Noise()
