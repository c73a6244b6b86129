"""Where to allocate what outlives a step: constants and the random state on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def persistent(device: torch.device) -> Iterator[None]:
    """Allocate inside what is kept on `device` for good.

    While a CUDA graph is warmed up or captured, the allocator gives out memory of that graph's
    private pool, which the next replay overwrites. It tells whose an allocation is by the current
    stream: on a stream of its own, memory comes from the ordinary pool, as it is never freed.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
