"""Every use of PyTorch's private API, one function each: what, since when, what if it moves."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from fxcompress.errors import FxCompressError
from fxcompress.fusion import Buffer, Loops

log = logging.getLogger("fxcompress")

SUPPORTED = ((2, 11), (2, 16))  # torch, from and below
UNTESTED = "FXCOMPRESS_UNTESTED_TORCH"


def check_version(version: str) -> None:
    """Refuse a PyTorch whose private parts may have moved, before they are met in mid-compile.

    Raises:
        FxCompressError: outside `SUPPORTED`, unless the variable `UNTESTED` is set.
    """
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    low, high = SUPPORTED
    if low <= numbers < high:
        return
    message = (
        f"fxcompress works with torch {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}, this is "
        f"{version}: pip install 'torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}'"
    )
    if not os.environ.get(UNTESTED):
        raise FxCompressError(f"{message} (or set {UNTESTED}=1 to go on all the same)")
    log.warning("%s; going on, as %s asks", message, UNTESTED)


check_version(torch.__version__)


# --- measuring (used by fxcompress.tools) -------------------------------------------------------


def allocation_events(
    profile: torch.profiler.profile,
) -> list[tuple[int, int, int, torch.device]]:
    """(ns, pointer, bytes: negative when freed, device) of each allocator event, in time order.

    Uses `kineto_results.experimental_event_tree()` and `_EventType.Allocation` (2.11 to 2.15), as
    `torch/profiler/_memory_profiler.py` does: read there for the new names when they move.
    """
    from torch._C._profiler import _EventType

    events = []
    for node in _profiled(profile):
        if node.tag == _EventType.Allocation:
            fields = node.typed[1]
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size, fields.device))
    return sorted(events, key=lambda event: event[0])


def profiled_span(profile: torch.profiler.profile, name: str) -> tuple[int, int] | None:
    """Start and end, ns, of the first `torch.profiler.record_function(name)`; None without one."""
    spans = [(n.start_time_ns, n.end_time_ns) for n in _profiled(profile) if n.name == name]
    return min(spans, default=None)


def _profiled(profile: torch.profiler.profile) -> Iterator[Any]:
    results = getattr(profile.profiler, "kineto_results", None)
    if results is None:
        raise RuntimeError("the profiler recorded nothing: use it as a context manager first")
    stack = list(results.experimental_event_tree())
    while stack:
        node = stack.pop()
        stack.extend(node.children)
        yield node


def saved_by_node(node: Any) -> list[torch.Tensor]:
    """Tensors one autograd node holds for its backward.

    Python nodes, compiled graphs included, have the public `saved_tensors`; AOTAutograd puts those
    it needs no version check for in `_tensors_no_vc_check` (since 2.10; 2.11 to 2.15: an attribute
    of the node; see `save_from_forward` in aot_autograd's runtime_wrappers.py when it moves). C++
    nodes show theirs as `_saved_NAME` (public notes on autograd mechanics, since 1.9).
    """
    if hasattr(node, "saved_tensors"):
        found: list[Any] = [*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ())]
    else:
        found = []
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                found.extend(value if isinstance(value, tuple | list) else [value])
    return [value for value in found if isinstance(value, torch.Tensor)]


def hooks_on_saved_tensors() -> bool:
    """Hooks for saved tensors (`torch.autograd.graph.saved_tensors_hooks`, and what is made of it:
    `save_on_cpu`, non-reentrant checkpointing) are in force here.

    `torch._C._autograd._top_saved_tensors_default_hooks(ignore_is_tracing)` (2.5 to 2.15).
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def fresh_compile_caches() -> AbstractContextManager[None]:
    """Empty on-disk and in-memory caches of compiled graphs, for timing a cold compile.

    Uses `torch._inductor.utils.fresh_cache` (2.7 to 2.15; named `fresh_inductor_cache` before).
    """
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


# --- graphs -------------------------------------------------------------------------------------


def is_sym_node(node: Any) -> bool:
    """The node's value is a symbolic number (torch.fx.experimental.proxy_tensor, 2.1 to 2.15)."""
    from torch.fx.experimental.proxy_tensor import is_sym_node as check

    return check(node)


def must_recompute(node: torch.fx.Node) -> bool:
    """Tagged by activation checkpointing (`node.meta["recompute"]`, a CheckpointPolicy, 2.4+)."""
    from torch.utils.checkpoint import CheckpointPolicy

    return node.meta.get("recompute") in (
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.PREFER_RECOMPUTE,
    )


def must_save(node: torch.fx.Node) -> bool:
    """Tagged to be saved by a selective checkpoint policy."""
    from torch.utils.checkpoint import CheckpointPolicy

    return node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE


def is_collective(node: torch.fx.Node) -> bool:
    """Communication op, its wait included (namespace of functional collectives, 2.1+)."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace in {
        "_c10d_functional",
        "c10d_functional",
        "fsdp",
    }


def is_subclass(value: object) -> bool:
    """A tensor subclass other than the tracer's own fake tensor."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, torch.Tensor) and type(value) not in (
        torch.Tensor,
        torch.nn.Parameter,
        FakeTensor,
    )


def is_fake(value: torch.Tensor) -> bool:
    """A tracer's stand-in without data (`FakeTensor`, 1.13 to 2.15)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def is_static_input(value: torch.Tensor) -> bool:
    """A parameter or buffer of the compiled module, as Dynamo marks them.

    `_dynamo_static_input_type` (2.4 to 2.15). Where it is missing, buffers count as data.
    """
    return getattr(value, "_dynamo_static_input_type", None) is not None


@contextmanager
def new_fake_mode() -> Iterator[Any]:
    """A fake mode of its own, whatever is being traced (`unset_fake_temporarily`, 2.1 to 2.15)."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    with unset_fake_temporarily(), FakeTensorMode() as mode:
        yield mode


@contextmanager
def fake_errors_unlogged() -> Iterator[None]:
    """Shapes may be tried that do not fit, without a traceback in the user's log.

    The logger `torch._subclasses.fake_tensor` (2.0 to 2.15) logs each before it raises.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def outside_compile() -> Iterator[None]:
    """No tracing context, no fake mode, no metrics: as if no compile were under way.

    `torch._guards.tracing(None)` and `unset_fake_temporarily` (2.1 to 2.15); Dynamo's metrics of
    the compile under way, which refuse a second compile's (`_metrics_context_tls` in 2.14,
    `_METRICS_CONTEXT` before).
    """
    from torch._dynamo import utils
    from torch._dynamo.metrics_context import MetricsContext
    from torch._guards import tracing
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    outer = utils.get_metrics_context()
    local = getattr(utils, "_metrics_context_tls", None)
    holder, name = (local, "metrics_context") if local else (utils, "_METRICS_CONTEXT")
    setattr(holder, name, MetricsContext(on_exit=lambda *_: None))
    try:
        with tracing(None), unset_fake_temporarily():
            yield
    finally:
        setattr(holder, name, outer)


@contextmanager
def sizes_forgotten() -> Iterator[None]:
    """Sizes that Dynamo sees meanwhile do not make it compile for any size afterwards.

    `torch._dynamo.pgo.get_code_state` (2.6 to 2.15) holds the sizes seen at each place in the
    source, whichever module was compiled there.
    """
    from torch._dynamo import pgo

    state = pgo.get_code_state()
    before = copy.deepcopy(dict(state))
    try:
        yield
    finally:
        state.clear()
        state.update(before)


def is_profiling() -> bool:
    """`torch.autograd._profiler_enabled` (1.8 to 2.15)."""
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def is_watched() -> bool:
    """A profiler or a dispatch mode sees operators that are called.

    `torch._C._len_torch_dispatch_stack` (2.0 to 2.15).
    """
    return is_profiling() or torch._C._len_torch_dispatch_stack() > 0


def allocations(call: Callable[[], Any]) -> tuple[list[int], Any]:
    """(bytes of what a call allocates on the CPU, negative where freed, in order; its result).

    The profiler before Kineto (`torch.autograd.profiler_legacy`, its records from
    `torch.autograd._disable_profiler_legacy`, 1.8 to 2.15): it writes nothing to the terminal, and
    has what operators allocate inside. Should it go: 0 is a safe answer to whoever asks.
    """
    from torch.autograd import profiler_legacy

    profile = profiler_legacy.profile(profile_memory=True)
    profile.__enter__()
    try:
        result = call()
    finally:
        records = torch.autograd._disable_profiler_legacy()  # type: ignore[attr-defined]
    found = [r for thread in records for r in thread if str(r.kind()) == "memory_alloc"]
    return [r.cpu_memory_usage() for r in found], result


def size_hint(size: Any) -> int:
    """A number for a possibly symbolic size: its value on the inputs traced.

    `SymNode.hint` (2.1 to 2.15). Sizes without a hint (data-dependent) count as 1.
    """
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint) if hint is not None else 1


def attention_forward(node: torch.fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Forward (op, arguments after q, k, v, keywords) of a fused attention backward; None if it
    cannot be repeated.

    Argument orders from `derivatives.yaml`, unchanged 2.5 to 2.15. Dropout inside the attention
    draws its own random numbers, so such a forward cannot be repeated.
    """
    aten = torch.ops.aten
    args, kwargs = node.args, dict(node.kwargs)
    scale = {"scale": kwargs["scale"]} if "scale" in kwargs else {}
    if node.target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        dropout, causal = args[6], args[7]
        if dropout != 0.0:
            return None
        mask = {"attn_mask": kwargs["attn_mask"]} if kwargs.get("attn_mask") is not None else {}
        op = aten._scaled_dot_product_flash_attention_for_cpu.default
        return op, (dropout, causal), {**mask, **scale}
    if node.target is aten._scaled_dot_product_flash_attention_backward.default:
        dropout, causal = args[10], args[11]
        if dropout != 0.0:
            return None
        op = aten._scaled_dot_product_flash_attention.default
        return op, (dropout, causal), scale
    with_bias = {  # where the backward has bias, dropout and causal
        aten._scaled_dot_product_efficient_attention_backward.default: (
            aten._scaled_dot_product_efficient_attention.default,
            (4, 9, 11),
        ),
        aten._scaled_dot_product_cudnn_attention_backward.default: (
            aten._scaled_dot_product_cudnn_attention.default,
            (8, 13, 14),
        ),
    }
    if node.target in with_bias:
        op, places = with_bias[node.target]
        bias, dropout, causal = (args[place] for place in places)
        if dropout != 0.0:
            return None
        return op, (bias, True, dropout, causal), scale
    return None


def is_attention_without_dropout(node: torch.fx.Node) -> bool:
    """A fused attention's forward that draws no random numbers, although its tags say it may.

    `dropout_p` of `_scaled_dot_product_*_attention*` (2.2 to 2.15).
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.removeprefix("aten::_scaled_dot_product_")
    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    if name not in kinds:
        return False
    arguments = target._schema.arguments
    place = next(i for i, a in enumerate(arguments) if a.name == "dropout_p")
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dropout_p", 0.0)
    return bool(given == 0.0)


def attention_statistics(node: torch.fx.Node) -> tuple[int, int]:
    """Positions of (output, log-sum-exp) among the arguments of a fused attention backward."""
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    return (5, 6) if node.target is efficient else (4, 5)


def seeded_random_ops(
    random: Callable[..., Any], randint: Callable[..., Any]
) -> dict[Any, Callable[..., Any]]:
    """Inductor's ops that draw from a seed, each with the function to run in its place.

    `torch.ops.prims.inductor_random(size, seed, mode)` and `inductor_randint(low, high, size,
    seed)` (2.0 to 2.15).
    """
    from torch._inductor import inductor_prims  # noqa: F401  (registers them)

    prims = torch.ops.prims
    return {prims.inductor_random.default: random, prims.inductor_randint.default: randint}


def multiply_add_ops() -> list[Any]:
    """Inductor's ``a * b + c`` of one rounding, which has no derivative: in softmax's backward.

    `torch.ops.prims.fma(a, b, c)` (2.0 to 2.15).
    """
    from torch._inductor import inductor_prims  # noqa: F401  (registers it)

    return [torch.ops.prims.fma.default] if hasattr(torch.ops.prims, "fma") else []


def traced(function: Callable[..., Any], given: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """A function of fake tensors as a graph, in the operators that Inductor takes after the cut.

    `make_fx` (2.0 to 2.15) with Inductor's `select_decomp_table` (2.4 to 2.15).
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, decomposition_table=select_decomp_table())(*given)
    graph.graph.eliminate_dead_code()
    return graph


def fake_mode_of(value: torch.Tensor) -> AbstractContextManager[Any]:
    """The fake mode a traced value belongs to, so that new values share its symbols.

    `FakeTensor.fake_mode` (2.0 to 2.15). A real tensor gives a context that does nothing.
    """
    mode = getattr(value, "fake_mode", None)
    return nullcontext() if mode is None else mode


def size_arguments(graph: torch.fx.Graph, value: torch.Tensor) -> list[Any]:
    """Sizes of ``value`` as arguments for a node: ints, or nodes that compute symbolic sizes.

    The symbols come from the graph's symbolic placeholders; expressions over them are spelled out
    by `sympy_interp` with `PythonReferenceAnalysis`, as `insert_deferred_runtime_asserts` does
    (2.4 to 2.15).
    """
    if all(isinstance(size, int) for size in value.shape):
        return list(value.shape)
    from torch.fx.experimental.sym_node import SymNode  # noqa: F401  (loads the symbol machinery)
    from torch.fx.proxy import GraphAppendingTracer, Proxy
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    tracer = GraphAppendingTracer(graph)
    symbols = {
        node.meta["val"].node.expr: Proxy(node, tracer=tracer)
        for node in graph.find_nodes(op="placeholder")
        if is_sym_node(node) and node.meta["val"].node.expr.is_symbol
    }
    sizes: list[Any] = []
    for size in value.shape:
        if isinstance(size, int):
            sizes.append(size)
            continue
        proxy = sympy_interp(PythonReferenceAnalysis, symbols, size.node.expr)
        if isinstance(proxy, Proxy):
            proxy.node.meta.setdefault("val", size)
            sizes.append(proxy.node)
        else:
            sizes.append(int(proxy))
    return sizes


def prefers_channels_last(module: torch.fx.GraphModule) -> bool:
    """Inductor will lay convolution outputs of this graph out with channels fastest.

    `GraphLowering.decide_layout_opt` (2.0 to 2.15; keyword `is_inference`). If it moves, False is
    safe: encodes then copy where Inductor chose otherwise.
    """
    from torch._inductor.graph import GraphLowering

    try:
        return bool(GraphLowering.decide_layout_opt(module, is_inference=False))
    except Exception as error:
        log.warning("cannot ask Inductor for its layout choice: %s", error)
        return False


def annotated(key: str, value: object) -> AbstractContextManager[None]:
    """While tracing: nodes made inside, and those of their gradients, carry the annotation.

    `torch.fx.traceback.annotate` (2.10 to 2.15), which Dynamo knows and which ends in
    `node.meta["custom"]`.
    """
    from torch.fx.traceback import annotate

    return annotate({key: value})


def annotation(node: torch.fx.Node, key: str) -> object:
    """What :func:`annotated` put on a node; None if it did not."""
    return (node.meta.get("custom") or {}).get(key)


def is_unchecked(node: torch.fx.Node) -> bool:
    """Saved without a version check (`ctx.x = x`): such tensors come last among saved ones.

    `node.meta["saved_tensor_with_no_vc_check"]`, read by AOTAutograd (2.10 to 2.15).
    """
    return bool(node.meta.get("saved_tensor_with_no_vc_check", False))


def copy_unchecked_mark(source: torch.fx.Node, target: torch.fx.Node) -> bool:
    """Put ``target`` in the same half of the saved tensors as ``source``; the mark."""
    if is_unchecked(source):
        target.meta["saved_tensor_with_no_vc_check"] = True
    return is_unchecked(source)


def describe_saved(output: torch.fx.Node, num_outputs: int) -> None:
    """Bring the output node's descriptions in step with its arguments.

    `meta["desc"]` (descriptors.py, 2.8 to 2.15) and `meta["output_stack_traces"]` (2.12+): lists
    parallel to the outputs.
    """
    from torch._functorch._aot_autograd import descriptors

    values = list(output.args[0])  # type: ignore[arg-type]
    checked = descriptors.SavedForBackwardsAOTOutput
    unchecked = getattr(descriptors, "SavedForBackwardsNoVcCheckAOTOutput", checked)
    if "desc" in output.meta:
        output.meta["desc"] = [
            *list(output.meta["desc"])[:num_outputs],
            *(
                (unchecked if is_unchecked(node) else checked)(i)
                for i, node in enumerate(values[num_outputs:])
            ),
        ]
    if "output_stack_traces" in output.meta:
        output.meta["output_stack_traces"] = [
            node.meta.get("stack_trace") if isinstance(node, torch.fx.Node) else None
            for node in values
        ]


# --- compiling ----------------------------------------------------------------------------------


def partitioner_base() -> type:
    """`CustomPartitionerFn` (2.9 to 2.15): what `custom_partitioner_fn` accepts."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    return CustomPartitionerFn


def min_cut(
    joint: torch.fx.GraphModule, inputs: Sequence[object], **kwargs: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """PyTorch's own partitioner, which plain Inductor uses (`torch._functorch.partitioners`)."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(joint, inputs, **kwargs)


def compile_with_inductor(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    partitioner: object | None,
    patches: dict[str, Any],
) -> Callable[..., Any]:
    """Inductor, with our partitioner in place of its own.

    `compile_fx(config_patches={"custom_partitioner_fn": …})` (2.9 to 2.15). The patch covers the
    lazy compile of the backward too, and is part of the on-disk cache key through `uuid()`.
    """
    from torch._inductor.compile_fx import compile_fx

    if partitioner is not None:
        patches = {**patches, "custom_partitioner_fn": partitioner}
    compiled: Any = compile_fx(module, inputs, config_patches=patches or None)
    return compiled  # type: ignore[no-any-return]


def change_output_code(partitioner: type, change: Callable[[str], str]) -> None:
    """From now on, have the code that Inductor writes for graphs with such a partitioner changed.

    `GraphLowering._compile_to_module_lines` (2.6 to 2.15) writes the code to a file, loads it, and
    lets caches keep that file. By the config and not a context: backwards are compiled late.
    Should it move: nothing but compile time depends on it.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    lowering: Any = GraphLowering
    kept = getattr(lowering, "_compile_to_module_lines", None)
    if kept is None:
        log.info("Inductor writes its code elsewhere: its C++ kernels are compiled one by one")
        return

    def changed(self: Any, code: Any) -> Any:
        if isinstance(config.custom_partitioner_fn, partitioner):
            code.value = change(code.value)
        return kept(self, code)

    lowering._compile_to_module_lines = changed


def keep_apart(partitioner: type, takes_memory: Callable[[Loops, Loops], bool]) -> None:
    """From now on, loops of graphs with such a partitioner are not joined across a call if
    ``takes_memory(earlier, later)``.

    `InductorChoices.can_fuse_horizontal` (2.6 to 2.15), the hook for heuristics like this. Not by
    `config.inductor_choices_class`: it is asked once a thread. Should it move: nothing but memory
    depends on it.
    """
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices

    choices: Any = InductorChoices
    kept = getattr(choices, "can_fuse_horizontal", None)
    if kept is None:
        log.info("Inductor asks elsewhere which loops to join: the peak may be above the plan")
        return

    def changed(scheduler: Any, node1: Any, node2: Any, shared: int) -> bool:
        if not kept(scheduler, node1, node2, shared):
            return False
        if not isinstance(config.custom_partitioner_fn, partitioner):
            return True
        earlier, later = sorted((_loops(scheduler, n) for n in (node1, node2)), key=_first)
        between = range(earlier.first + 1, later.first)
        is_parted = any(n.min_order in between and _is_call(n) for n in scheduler.nodes)
        return not (is_parted and takes_memory(earlier, later))

    choices.can_fuse_horizontal = staticmethod(changed)


def _first(loops: Loops) -> int:
    return loops.first


def _is_call(node: Any) -> bool:
    """A kernel of a library, and not one of ours, which stand by their readers.

    `BaseSchedulerNode.is_extern` and `ir.ExternKernel.op_overload` (2.5 to 2.15)."""
    if not node.is_extern():
        return False
    return getattr(getattr(node.node, "op_overload", None), "namespace", "") != "fxcompress"


def _loops(scheduler: Any, node: Any) -> Loops:
    """What a node of `torch._inductor.scheduler` reads and writes (2.5 to 2.15)."""

    def buffer(dep: Any) -> Buffer:
        given = scheduler.name_to_donated_buffer  # inputs that only the graph holds
        found = scheduler.name_to_buf.get(dep.name) or given.get(dep.name)
        if found is None:
            return Buffer(dep.numbytes_hint(), None, frozenset())
        born = -1 if found.defining_op is None else found.defining_op.min_order
        users = (u for u in found.users if not u.is_weak)
        # An output of the graph has a user without a place: it is never read for the last time.
        readers = frozenset(getattr(u.node, "min_order", -1) for u in users)
        return Buffer(dep.numbytes_hint(), born, readers)

    places = frozenset(n.min_order for n in node.get_nodes())
    own = {dep.name: dep for dep in node.read_writes.writes}
    written = {name: buffer(dep) for name, dep in own.items()}
    writes = {name: b.size for name, b in written.items() if b.readers - places}
    reads = {d.name: buffer(d) for d in node.read_writes.reads if d.name not in own}
    return Loops(places, writes, reads)


def async_compile() -> Any:
    """The class whose methods the code of a graph calls for its kernels (2.0 to 2.15)."""
    from torch._inductor.async_compile import AsyncCompile

    return AsyncCompile


def compile_threads() -> int:
    """`torch._inductor.async_compile.get_compile_threads` (2.5 to 2.15)."""
    from torch._inductor.async_compile import get_compile_threads

    return int(get_compile_threads())


def start_cpp(source: str, statement: str, submit: Callable[..., Any] | None) -> Callable[[], Any]:
    """Compile C++ as Inductor does its kernels; a function that waits and returns what calls it.

    Args:
        statement: what a call does, with its two Python arguments in `args`: a tuple, or an array.
        submit: starts a task beside others; None: it is done when it is waited for.

    `CppPythonBindingsCodeCache.load_pybinding_async` (2.4 to 2.15), which formats its class's
    `call_entry_function`. From 2.15 on `args` is an array.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    escaped = statement.replace("{", "{{").replace("}", "}}")
    own: Any = type("Together", (Cache,), {"call_entry_function": escaped})
    arguments = ["int64_t", "int64_t"]
    result: Callable[[], Any] = own.load_pybinding_async(arguments, source, submit_fn=submit)
    return result


def autograd_cache_off() -> AbstractContextManager[None]:
    """Inside, AOTAutograd takes no graph from its on-disk cache: the partitioner is called.

    `torch._functorch.config.enable_autograd_cache` (2.4 to 2.15). A `uuid()` of None does not see
    to it (2.14): it is a key like any other.
    """
    from torch._functorch import config

    patched: AbstractContextManager[None] = config.patch(enable_autograd_cache=False)
    return patched


def graph_module(root: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A module of the graph; within a compile one whose code is written when it is first called,
    as that of PyTorch's own graphs. Ours are interpreted, or given to Inductor.

    `torch.fx._lazy_graph_module._make_graph_module` (2.3 to 2.15); else `torch.fx.GraphModule`.
    """
    from torch.fx._lazy_graph_module import _make_graph_module

    return _make_graph_module(root, graph)


def copy_dynamo_graph(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of the graph, its constants shared, that AOTAutograd still takes for one of Dynamo's.

    Where the inputs come from is held outside of the graph: `_param_name_to_source` and
    `_dynamo_source` (2.7 to 2.15). Without it no input counts as a parameter. (A deep copy follows
    Dynamo's own objects, at times deeper than Python's stack.)
    """
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = torch.fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    if hasattr(module, "_param_name_to_source"):
        copied._param_name_to_source = module._param_name_to_source
    for node, twin in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        twin.meta = dict(node.meta)
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    return copied


def compile_with_aot_eager(
    module: torch.fx.GraphModule, inputs: Sequence[Any], partitioner: Callable[..., Any] | None
) -> Callable[..., Any]:
    """AOTAutograd with Inductor's decompositions, joint passes and our partitioner: the same graphs
    as under Inductor, run op by op.

    As `aot_eager_decomp_partition` in torch/_dynamo/backends/debugging.py (2.0 to 2.15), with
    `joint_graph_passes` (2.1 to 2.15), which want Inductor's `V.fake_mode`. Random numbers stay
    PyTorch's own (`fallback_random`): Inductor's, run op by op, ignore their seed, and a mask that
    the backward draws again would be another one.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._inductor import lowering  # noqa: F401  (pooling decompositions need it loaded)
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    def partition(
        joint: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> Any:
        fake_mode = torch._guards.detect_fake_mode(list(joint_inputs))
        with V.set_fake_mode(fake_mode), inductor_patched({"fallback_random": True}):
            joint = joint_graph_passes(joint)
        return (partitioner or min_cut)(joint, joint_inputs, **kwargs)

    return aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        decompositions=select_decomp_table,
        partition_fn=partition,
        keep_inference_input_mutations=True,  # as Inductor: else calibrations are of other graphs
    )(module, inputs)


def compile_interpreted(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    partitioner: object,
    make: Callable[[torch.fx.GraphModule, bool], Callable[[Sequence[Any]], Any]],
    *,
    fallback_random: bool = False,
) -> Callable[..., Any]:
    """As `compile_with_inductor` up to code generation; ``make(graph, is_backward)`` gives what
    runs each graph: a function from the list of its inputs to the list of its outputs.

    fallback_random: PyTorch's own random numbers, as in the graphs of `compile_with_aot_eager`;
    the decompositions are then those without that setting, as there.

    `compile_fx(inner_compile=…)` (2.0 to 2.15) with an `OutputCode` (2.6 to 2.15) of our own.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.output_code import OutputCode

    class Interpreted(OutputCode):  # type: ignore[misc]
        def __init__(self, call: Callable[[Sequence[Any]], Any]) -> None:
            self.call = call
            self._boxed_call = True  # on the instance: wrappers copy its __dict__

        def __call__(self, arguments: Any) -> Any:
            given = list(arguments)
            arguments.clear()  # the boxed convention: what the callee has, it may free
            return self.call(given)

        def post_compile(self, *args: Any) -> None:
            pass

    def inner(graph: torch.fx.GraphModule, _: Sequence[Any], **kwargs: Any) -> Interpreted:
        return Interpreted(make(graph, bool(kwargs.get("is_backward"))))

    patches = {
        "custom_partitioner_fn": partitioner,
        "fallback_random": fallback_random,
        "fx_graph_cache": False,
        "fx_graph_remote_cache": False,
    }
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(
            module,
            list(inputs),
            inner_compile=inner,
            config_patches=patches,
            decompositions=select_decomp_table(),
        )
    return compiled  # type: ignore[no-any-return]


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor settings behind ``torch.compile(mode=…)`` (`list_mode_options`, public, 2.0+)."""
    return dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}


def captures_cuda_graphs() -> bool:
    """The graph that is being compiled will be captured as a CUDA graph, as under
    ``mode="reduce-overhead"`` (`torch._inductor.config.triton.cudagraphs`, 2.0 to 2.15)."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def inductor_patched(patches: dict[str, Any]) -> AbstractContextManager[None]:
    """Inductor's global settings changed while inside (`torch._inductor.config.patch`, 2.0+)."""
    from torch._inductor import config

    return config.patch(patches)  # type: ignore[return-value]


def inductor_of_its_own() -> Callable[..., Any]:
    """A backend: plain Inductor, that shares nothing with another one's compiles.

    Of ``backend="inductor"``, Dynamo takes what it compiled for one model for another of the same
    class: there would be no second compile to time.
    """

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_with_inductor(module, inputs, None, {})

    return backend


def inductor_with_memory_budget(share: float) -> Callable[..., Any]:
    """A backend: plain Inductor, whose own partitioner keeps this share of the activations.

    `torch._functorch.config.activation_memory_budget` (2.4 to 2.15), for comparing with. It is read
    when the joint graph is cut, which is while the backend runs.
    """
    import torch._functorch.config as config

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with config.patch(activation_memory_budget=share):
            return compile_with_inductor(module, inputs, None, {})

    return backend


def cache_dir() -> Path:
    """Inductor's on-disk cache (`cache_dir`, 2.2 to 2.15)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as directory

    return Path(directory())


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to PyTorch's structured trace, which tlparse shows, where one is written.

    `torch._logging._internal.trace_structured` (2.3 to 2.15).
    """
    from torch._logging._internal import trace_structured

    about = {"name": name, "encoding": "string"}
    trace_structured("artifact", metadata_fn=lambda: about, payload_fn=text)


def compile_id() -> tuple[object, object] | None:
    """(which piece of user code is being compiled, which of its compiles this is); None outside.

    `CompileContext.current_compile_id()`, its `frame_id` and `frame_compile_id` (2.1 to 2.15).
    """
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return None if current is None else (current.frame_id, current.frame_compile_id)


def ends_in_break(module: torch.fx.GraphModule) -> bool:
    """The Dynamo graph ends where the user's function goes on: another one may follow.

    `compile_subgraph_reason.graph_break` (2.1 to 2.15).
    """
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def job_store() -> Any:
    """The key–value store that the processes of a distributed job share; None if there is one only.

    `torch.distributed.distributed_c10d._get_default_store` (1.13 to 2.15).
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def compile_under_way() -> Any:
    """What tells the compile under way from others, for :func:`resumed`; None outside one.

    `CompileContext.try_get` and `compile_context` (2.1 to 2.15).
    """
    from torch._guards import CompileContext

    return CompileContext.try_get()


def resumed(compile_context: Any) -> AbstractContextManager[Any]:
    """Inside, `compile_id` is what it was in the compile that :func:`compile_under_way` gave."""
    from torch._guards import compile_context as entered

    return entered(compile_context)


def backend_of(compiled: Any) -> Any:
    """The backend a compiled module or function was made with, None if it is not compiled.

    Dynamo keeps it as `get_compiler_config`/`_torchdynamo_orig_backend` on its callback (2.1 to
    2.15; older: `_torchdynamo_orig_callable`); the callback hangs off `dynamo_ctx`.
    """
    seen: set[int] = set()
    pending = [compiled]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if getattr(current, "is_fxcompress_backend", False):
            return current
        for name in (
            "dynamo_ctx",
            "callback",
            "compiler_fn",
            "_compiled_call_impl",
            "_torchdynamo_orig_backend",
            "_torchdynamo_orig_callable",
            "inner_convert",
            "_torchdynamo_context",
        ):
            pending.append(getattr(current, "__dict__", {}).get(name))
        pending.append(getattr(current, "__self__", None))
        for cell in getattr(current, "__closure__", None) or ():
            with suppress(ValueError):  # a cell not filled yet
                if callable(cell.cell_contents):
                    pending.append(cell.cell_contents)
    return None


# --- kernels ------------------------------------------------------------------------------------


def load_cpp(source: str) -> ctypes.CDLL | None:
    """Compile C++ with Inductor's compiler and flags and load it; None, with a log line, if it
    cannot be.

    `torch._inductor.codecache.CppCodeCache.load` (2.0 to 2.15) finds the compiler, adds
    `-O3 -march=native -fopenmp`, and keeps the library in Inductor's on-disk cache. Should it move:
    any way to build a shared library will do, `torch.utils.cpp_extension.load` for one.
    """
    from torch._inductor.codecache import CppCodeCache

    # These come last and win. Exact arithmetic, whatever the user's Inductor config says: kernels
    # promise the reference's bits. Inductor's -fno-tree-loop-vectorize makes GCC ignore `omp simd`
    # as well: with it affine encode ran at 1.0 instead of 9.0 GB/s a core (Zen 4, GCC 12).
    flags = (
        "-fno-unsafe-math-optimizations",
        "-fno-finite-math-only",
        "-ffp-contract=off",
        "-ftree-loop-vectorize",
    )
    try:
        return CppCodeCache.load(source, extra_flags=flags)
    except Exception as error:  # no compiler, no disk space, a noexec cache folder...
        log.warning("CPU kernels are off, the slower reference is used: %s", error)
        return None


def laid_out_as(
    graph: torch.fx.Graph, node: torch.fx.Node, strides: Sequence[Any]
) -> torch.fx.Node:
    """``node``, which Inductor writes in the order of these strides if it writes it at all.

    `prims.inductor_force_stride_order` (2.2 to 2.15), whose lowering decides an open layout. Should
    it move: without it a channels-last mask is written with its channels slowest, and copied.
    """
    from torch._inductor import inductor_prims

    forced = graph.call_function(inductor_prims.force_stride_order, (node, list(strides)))
    forced.meta["val"] = node.meta["val"]
    return forced


def mutated_inputs(module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """Placeholders that the functionalized graph writes to at its end (`aten.copy_`)."""
    return {
        node.args[0]
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        if isinstance(node.args[0], torch.fx.Node)
    }
