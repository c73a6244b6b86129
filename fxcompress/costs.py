"""Costs: the time of a step, and what each representation adds to it.

Codecs are timed once on each machine and device, in nanoseconds an element and in seconds a call,
encode and decode together; the table is kept beside Inductor's cache, so that a later process plans
alike. The step is estimated from its matrix products and its saved bytes, at rates measured with
the table: what matters to a plan is the proportion of the two. On a CPU all is measured on one
thread in its own time: by the clock, on a busy machine, two threads that wait for each other took
200 times as long. On a GPU, by its own clock.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import flop_counter

from fxcompress import __version__, files, ops, schema, torch_private
from fxcompress.agree import agreed
from fxcompress.codecs import codec, states
from fxcompress.codecs.transform import Transform
from fxcompress.kernels import ahead
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate, saved_bytes
from fxcompress.passes.capture import Cut
from fxcompress.passes.recipes import Recipe
from fxcompress.passes.rewrite import OFFLOAD, RECOMPUTE, Choice
from fxcompress.program import TIME_PRICE

log = logging.getLogger("fxcompress")

FORMAT = 8
LARGEST_FILE = 1 << 20
# Each saved byte is written, read again in the backward, and has a gradient that is written and
# read, and as much again is moved on the way: an estimate for what no matrix product counts.
MOVES = 6
_ELEMENTS = 1 << 19
_GPU_ELEMENTS = 1 << 26  # more than caches hold
# Memory is what all wait for there, and each has kernels to compile: a few stand for their kin.
_ON_GPU = (
    *("affine(bits=8)", "affine(bits=4)", "affine(bits=1)", "dither(bits=4)"),
    *("rotate(bits=5)", "rotate(bits=2)", "subsample(rate=0.25)"),
)
_GPU_SIDE = 4096
_BUSY = 24  # products of that size: some 4 ms of the fastest GPU
_FEW = 64  # rows of a tensor that takes less time than the calls
_COPIED = 1 << 23  # so much that the allocator asks the system for it
_REPEATS = 5
_SIDE = 384  # of the matrices that are multiplied to see how fast
_WIDTH = 64


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    Attributes:
        coders: nanoseconds an element, encode and decode, by codec spec.
        basis: of changing basis there and back, in blocks of 64 channels.
        call, basis_call: seconds that both calls take besides their elements; those of a codec with
            a basis take the second as well.
        flops, bytes: a second, of a matrix product and of a copy into fresh memory.
        host_bytes: a second, to host memory and back; 0 where that is the device's own.
    """

    coders: Mapping[str, float]
    basis: float
    call: float
    basis_call: float
    flops: float
    bytes: float
    host_bytes: float

    @property
    def is_sound(self) -> bool:
        """Finite, and nothing that is divided by is 0."""
        others = (self.basis, self.call, self.basis_call, self.host_bytes)
        numbers = (*self.coders.values(), *others, self.flops, self.bytes)
        return all(map(math.isfinite, numbers)) and min(self.flops, self.bytes) > 0


@dataclass(frozen=True)
class Clock:
    """The times of one graph's plain step and of codecs on its device.

    Attributes:
        step: of the plain step, seconds.
        price: noise that a step of twice the time is worth (`Settings.time_price`).
    """

    step: float
    rates: Rates
    price: float = TIME_PRICE

    def slowdown(self, choice: Choice) -> float:
        """Time that a choice adds, over that of the plain step."""
        return added_seconds(choice, self.rates) / self.step


def clock_of(cut: Cut, candidates: Sequence[Candidate], price: float = TIME_PRICE) -> Clock | None:
    """The clock of a graph, by the device of its saved tensors; None where there are none."""
    if not candidates:
        return None
    found = rates(candidates[0].fake.device.type)
    return Clock(step_seconds(cut, candidates, found), found, price)


def step_seconds(cut: Cut, candidates: Sequence[Candidate], found: Rates) -> float:
    """Estimated time of plain forward and backward."""
    flops = sum(_flops(n) for m in (cut.forward, cut.backward) for n in m.graph.nodes)
    return flops / found.flops + MOVES * saved_bytes(candidates) / found.bytes


def added_seconds(choice: Choice, found: Rates) -> float:
    """Time that encoding and decoding, rebuilding, or the way to host memory and back add to a
    step; masks, packed by all, do not count. Readers share a decode (passes/decodes.py)."""
    candidate = choice.candidate
    if choice.representation == RECOMPUTE:
        assert candidate.recipe is not None
        return _rebuilding_seconds(candidate.recipe, found)
    if choice.representation == OFFLOAD:
        return candidate.own_bytes / found.host_bytes if found.host_bytes else math.inf
    if choice.codec_spec is None:
        return 0.0
    elements = candidate.own_bytes / candidate.fake.element_size()
    into_fresh_memory = candidate.own_bytes / found.bytes
    is_transform = isinstance(codec(choice.codec_spec), Transform)
    calls = found.call + (found.basis_call if is_transform else 0.0)
    return calls + elements * _nanoseconds(choice.codec_spec, found) * 1e-9 + into_fresh_memory


def _rebuilding_seconds(recipe: Recipe, found: Rates) -> float:
    """A share of the products among the steps, and of what they write into fresh memory."""
    moved = 0
    for node in recipe.steps:
        if prop.is_tensor(node) and (prop.is_extern(node) or node is recipe.steps[-1]):
            value = prop.value(node)
            moved += torch_private.size_hint(value.numel()) * value.element_size()
    seconds = sum(map(_flops, recipe.steps)) / found.flops + moved / found.bytes
    return recipe.share * seconds


def is_faster_inlined(spec: str) -> bool:
    """A codec's decode, fused by Inductor with its reader, was measured to be faster on this CPU.

    False where it was not measured: see :func:`keep_lowerings`.
    """
    kernel, inlined = _lowerings().get(spec, (0.0, 0.0))
    return inlined < kernel


def keep_lowerings(measured: Mapping[str, tuple[float, float]]) -> None:
    """Keep, for later plans, (kernel, inlined) nanoseconds an element of decodes by spec."""
    files.keep(_lowerings_path(), json.dumps({**_lowerings(), **measured}))
    _lowerings.cache_clear()


@cache
def _lowerings() -> dict[str, tuple[float, float]]:
    try:
        found = files.read_json(_lowerings_path(), LARGEST_FILE)
        return schema.value(dict[str, tuple[float, float]], found)  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {}


def _lowerings_path() -> Path:
    return torch_private.cache_dir() / "fxcompress" / f"lowerings-{__version__}-{FORMAT}.json"


def own_seconds(call: Callable[..., Any], *given: Any) -> float:
    """The fastest of a few calls on one thread of the CPU, in its own time."""
    with torch.no_grad(), _one_thread():
        return _seconds(lambda: call(*given), torch.device("cpu"))


def rates(device: str) -> Rates:
    """The table of a device type, measured if this machine has none yet (about a second).

    In a distributed job all ranks use one table, so that they plan alike.
    """
    return _shared(device) if torch_private.job_store() is not None else _own(device)


@cache
def _shared(device: str) -> Rates:
    return Rates(**json.loads(agreed(f"rates-{device}", json.dumps(asdict(_own(device))))))


@cache
def _own(device: str) -> Rates:
    """This machine's table."""
    name = f"rates-{__version__}-{FORMAT}-{device}.json"
    path = torch_private.cache_dir() / "fxcompress" / name
    try:
        found = schema.build(Rates, files.read_json(path, LARGEST_FILE))
        if found.is_sound:
            return found
    except (OSError, ValueError):
        pass
    with torch_private.outside_compile(), torch.no_grad(), torch.random.fork_rng(), _one_thread():
        found = _measure(torch.device(device))
    files.keep(path, json.dumps(asdict(found)))
    return found


def _measure(device: torch.device) -> Rates:
    from fxcompress.fit import at_rate, fit
    from fxcompress.ladder import specs  # which reads our clock

    on_gpu = device.type != "cpu"
    elements, side = (_GPU_ELEMENTS, _GPU_SIDE) if on_gpu else (_ELEMENTS, _SIDE)
    dtype = torch.bfloat16 if on_gpu else torch.float32  # as training has it there
    x = torch.randn(elements // _WIDTH, _WIDTH, device=device, dtype=dtype)
    key = torch.tensor([1, 2], device=device)
    square = torch.randn(side, side, device=device, dtype=dtype)
    seconds: Callable[[Callable[[], Any]], float]
    seconds = partial(gpu_seconds, busy=square) if on_gpu else partial(_seconds, device=device)

    def both_ways(spec: str, x: Tensor = x) -> Tensor:
        found = codec(spec)
        return found.decode(found.encode(x, key, 1), x.shape, x.dtype, key, 1)

    def nanoseconds(spec: str) -> float:
        return round(seconds(lambda: both_ways(spec)) / x.numel() * 1e9, 5)

    timed = _ON_GPU if on_gpu else specs()
    sample = x[: _ELEMENTS // _WIDTH].float()
    fitted = at_rate(fit(sample, [torch.randn_like(sample)], -1), 2.0)
    few = x[:_FEW].contiguous()
    if on_gpu:
        given = [(spec, y) for spec in (*timed, fitted.spec) for y in (x, few)]
        ahead.build([partial(both_ways, spec, y.to("meta")) for spec, y in given])
    coders = {spec: nanoseconds(spec) for spec in timed}
    basis = max(nanoseconds(fitted.spec) - _of_bands(fitted, coders), 0.0)

    def both_calls(spec: str, each: float) -> float:
        """Seconds of the operators on so few elements, of which each takes `each` nanoseconds."""
        taken = seconds(lambda: _by_operators(few, spec, key))
        return round(max(taken - few.numel() * each * 1e-9, 0.0), 7)

    call = both_calls("affine(bits=4)", coders["affine(bits=4)"])
    with_basis = both_calls(fitted.spec, basis + _of_bands(fitted, coders))
    multiply = seconds(lambda: square @ square)
    large = torch.empty(_COPIED, device=device)

    def there_and_back() -> Tensor:
        return ops.to_device(ops.to_host(large, [0]), device, [-1], [0])

    return Rates(
        coders,
        basis,
        call,
        max(with_basis - call, 0.0),
        round(2 * side**3 / multiply, -8),
        round(x.nbytes / seconds(x.clone) if on_gpu else large.nbytes / seconds(large.clone), -8),
        round(large.nbytes / _seconds(there_and_back, device), -8) if on_gpu else 0.0,
    )


def _by_operators(x: Tensor, spec: str, key: Tensor) -> Tensor:
    """A matrix encoded and decoded as a graph does it."""
    call, order = torch.ops.fxcompress, [0, 1]
    payload = call.encode(x, key, spec, 1, order)
    found: Tensor = call.decode(payload, key, spec, 1, x.shape, order, x.dtype)
    return found


def gpu_seconds(call: Callable[[], Any], busy: Tensor) -> float:
    """What a call takes a GPU, by its own clock: the least of a few.

    busy: a large square matrix on it. Its products come first, so that the calls wait in the queue
    and follow each other at once; else the time would be that of starting them.
    """
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(_REPEATS)]
    for _ in range(_BUSY):
        busy @ busy
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(busy.device)
    return min(start.elapsed_time(end) for start, end in events) / 1e3


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The fastest of a few calls: what disturbs them only makes them slower."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        start = clock()
        call()
        _wait(device)
        times.append(clock() - start)
    return min(times[1:])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nanoseconds(spec: str, found: Rates) -> float:
    """Of one element."""
    given = codec(spec)
    if isinstance(given, Transform):
        return found.basis + _of_bands(given, found.coders)
    return _of_coder(spec, found.coders)


def _of_coder(spec: str, coders: Mapping[str, float]) -> float:
    """The time that was taken of it, or the longest of its kin."""
    if spec in coders:
        return coders[spec]
    kin = [v for k, v in coders.items() if k.startswith(codec(spec).name)]
    return max(kin, default=coders["affine(bits=1)"])


def _of_bands(given: Transform, coders: Mapping[str, float]) -> float:
    """What the coders inside take, an element of the whole tensor."""
    times = (
        bands * _of_coder(inside.spec.replace(",mean=none", ""), coders)
        for _, inside, bands in given.classes()
    )
    return sum(times) / len(states.arrays(given.rates)["rates"])


def _flops(node: fx.Node) -> float:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0.0
    formula = flop_counter.flop_registry.get(target.overloadpacket)
    if formula is None:
        return 0.0
    args, kwargs = torch.utils._pytree.tree_map_only(
        fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs)
    )
    try:
        return float(
            torch_private.size_hint(formula(*args, **kwargs, out_val=node.meta.get("val")))
        )
    except Exception as error:  # a formula for another form of the operator: an estimate goes on
        log.debug("no count of operations for %s: %s", node.name, error)
        return 0.0
