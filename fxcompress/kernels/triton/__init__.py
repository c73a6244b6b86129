"""Triton kernels for GPUs: one family a file. They hold a group in registers, in eight lanes.

Import the families where they are used: CPU builds of PyTorch lack Triton, and importing it takes a
second.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("fxcompress")

LARGEST = 1 << 15  # elements of a group that a program's registers hold


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is called with; the first argument is a tensor."""

    kernel: Any
    programs: int
    warps: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """The arguments by name."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        return dict(zip(names, self.arguments, strict=True))

    @property
    def options(self) -> dict[str, Any]:
        """How it is compiled: arithmetic as it is written, no product fused with a sum."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Recorder:
    """Launches that were not started, and the warp size of the GPU they are for."""

    warp: int
    launches: list[Launch]


_recorder: Recorder | None = None
_under_way: list[Any] = []  # kernels that threads are compiling


def takes(x: Tensor, group: int) -> bool:
    """True where the kernels run: on CUDA and ROCm devices with Triton, for groups that fit."""
    return (x.is_cuda or _recorder is not None) and group <= LARGEST and installed()


class BuildError(Exception):
    """A kernel cannot be compiled or loaded here."""


def run(launches: Sequence[Launch]) -> None:
    """Start them, in order, on the device of their tensors. Waits for nothing.

    Raises:
        BuildError: by whatever the compiler, the assembler or the driver failed.
    """
    if _recorder is not None:
        _recorder.launches.extend(launches)
        return
    _await_builds()
    for launch in launches:
        try:
            with torch.cuda.device_of(launch.arguments[0]):
                launch.kernel[(launch.programs,)](
                    *launch.arguments, **launch.constants, **launch.options
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise BuildError(f"{type(error).__name__}: {error}") from error


def build_ahead(launches: Sequence[Launch]) -> None:
    """Start compiling them, in threads: most of that is done outside Python.

    `run` waits for what is under way. What cannot be built is found out when it is run.
    """
    if not launches:
        return
    import triton

    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
    try:
        with triton.AsyncCompileMode(pool, ignore_errors=True) as mode:  # since Triton 3.4
            for launch in launches:
                launch.kernel.warmup(
                    *launch.arguments,
                    grid=(launch.programs,),
                    **launch.constants,
                    **launch.options,
                )
            _under_way.extend(mode.future_kernels.values())
            mode.raw_futures.clear()  # or it waits for them, now
    except Exception as error:
        log.info("kernels are not built ahead: %s", error)
    pool.shutdown(wait=False)


def _await_builds() -> None:
    while _under_way:
        _under_way.pop().result(ignore_errors=True)


def warp_size() -> int:
    """Threads of a warp on the GPU that launches are made for."""
    if _recorder is not None:
        return _recorder.warp
    return 64 if torch.version.hip else 32


@contextmanager
def recorded(warp: int) -> Iterator[list[Launch]]:
    """Collect launches instead of starting them; codecs then take tensors of any device."""
    global _recorder
    _recorder = Recorder(warp, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = None


@cache
def installed() -> bool:
    return find_spec("triton") is not None
