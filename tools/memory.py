"""Measured activation memory of a training step, and the bytes an autograd graph holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fxcompress import torch_private


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step, over what was allocated before it began."""

    peak_bytes: int
    """Highest sum of live allocations, gradients of parameters left out."""
    gradient_bytes: int
    """Gradients of parameters that the step made."""
    left_bytes: int
    """Alive when the step returned, gradients left out (for instance what the step returned)."""
    live: tuple[tuple[int, int], ...] = ()
    """(ns, bytes alive from then on) after each allocator event, gradients left out."""
    spans: tuple[tuple[int, int], ...] = ()
    """(first ns, last ns) of the step's parts that a `mark` surrounds, in order."""

    def sampled(self, part: int, count: int) -> list[int]:
        """Most bytes alive in each of `count` equal stretches of a part's time."""
        first, last = self.spans[part]
        edges = [first + (last - first) * i // count for i in range(count + 1)]
        found, at, alive = [], 0, 0
        for start, end in pairwise(edges):
            while at < len(self.live) and self.live[at][0] < start:
                alive, at = self.live[at][1], at + 1
            most = alive
            while at < len(self.live) and self.live[at][0] < end:
                alive, at = self.live[at][1], at + 1
                most = max(most, alive)
            found.append(most)
        return found


def mark(part: int) -> AbstractContextManager[Any]:
    """Surrounds a part of a step, as its forward (0) or backward (1), for `StepMemory.spans`."""
    return torch.profiler.record_function(f"fxcompress part {part}")


def measure_step(step: Callable[[], object], parameters: Iterable[Tensor]) -> StepMemory:
    """Peak of activation memory over one call of `step` (a forward and a backward).

    All that the step allocates on the parameters' device counts, saved or transient; parameters,
    inputs and optimizer state do not, for they exist before; gradients are set to None first, and
    what becomes a `.grad` is left out from its allocation on. Allocator events are counted, not
    RSS: pages the process kept, and the scratch memory of libraries that bypass the allocator
    (oneDNN, MKL), do not appear. Run the step before measuring, or compilation is measured too;
    with CUDA graphs a replayed step allocates nothing.
    """
    trained = list(parameters)
    for parameter in trained:
        parameter.grad = None
    device = trained[0].device.type if trained else "cpu"
    # What a compiled backward returns may differ from the parameter in strides and is then copied
    # into `.grad`: both are gradients. Holding on to the first keeps its address from being reused.
    arrived: list[Tensor] = []
    hooks = [p.register_hook(arrived.append) for p in trained if p.requires_grad]
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    found = [e for e in torch_private.allocation_events(profile) if e[3].type == device]
    gradients: dict[int, int] = {}
    for gradient in [*arrived, *(p.grad for p in trained if p.grad is not None)]:
        storage = gradient.untyped_storage()
        gradients[storage.data_ptr()] = storage.nbytes()
    alive = replay([(pointer, size) for _, pointer, size, _ in found], gradients)
    spans = (torch_private.profiled_span(profile, f"fxcompress part {part}") for part in range(2))
    return StepMemory(
        peak_bytes=max(alive, default=0),
        gradient_bytes=sum(p.grad.nbytes for p in trained if p.grad is not None),
        left_bytes=alive[-1] if alive else 0,
        live=tuple((event[0], total) for event, total in zip(found, alive, strict=True)),
        spans=tuple(span for span in spans if span is not None),
    )


def replay(events: Sequence[tuple[int, int]], gradients: dict[int, int]) -> list[int]:
    """The running sum over (pointer, bytes: negative when freed) events.

    `gradients` says how many bytes of the *last* allocation at a pointer are gradients.
    """
    last = {pointer: index for index, (pointer, size) in enumerate(events) if size > 0}
    live: dict[int, int] = {}
    total = 0
    totals = []
    for index, (pointer, size) in enumerate(events):
        if size > 0:
            if last[pointer] == index:
                size -= min(size, gradients.get(pointer, 0))
            live[pointer] = size
            total += size
        else:
            # Our own record of the size: what was allocated before the window is not in it.
            total -= live.pop(pointer, 0)
        totals.append(total)
    return totals


@dataclass(frozen=True)
class SavedMemory:
    """Bytes that an autograd graph keeps between forward and backward."""

    activation_bytes: int
    """Storages made by the forward."""
    copy_bytes: int
    """Copies, value for value, of a parameter, buffer or input: in another memory layout."""


def measure_saved(output: Tensor, exclude: Iterable[Tensor] = ()) -> SavedMemory:
    """What the autograd graph of `output` keeps for its backward. Call it before backward.

    Each storage counts once, however many views of it are saved. The storages of `exclude`
    (parameters, buffers, inputs: alive anyway) and of `output` itself do not. Inductor's
    channels-last layout pass saves a converted copy of each convolution weight and of the image
    batch (plain Inductor, ResNet-18, 64 x 112 x 112: 54 of 328 MB); they are memory, and count in
    the peak, but are no activations and stand apart here.
    """
    held = list(exclude)
    seen = {tensor.untyped_storage().data_ptr() for tensor in (output, *held)}
    activations = copies = 0
    for node in _nodes(output.grad_fn):
        for tensor in torch_private.saved_by_node(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            if any(_equal(tensor, other) for other in held):
                copies += storage.nbytes()
            else:
                activations += storage.nbytes()
    return SavedMemory(activation_bytes=activations, copy_bytes=copies)


def saved_bytes(output: Tensor, exclude: Iterable[Tensor] = ()) -> int:
    """Activation bytes saved by the graph of `output`: see `measure_saved`."""
    return measure_saved(output, exclude).activation_bytes


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _nodes(root: Any) -> Iterable[Any]:
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
            yield node
