"""Inductor's CUDA code for training graphs, without a GPU: all patches of private names it takes.

The graphs are captured and rewritten on CPU (autograd's engine asks a real driver about any CUDA
device), then moved: their devices become cuda:0, their tensors fake CUDA ones. Attention is traced
as plain matrix products, since CPU and GPU have fused operators of different names.
Tried with torch 2.14; the names have been there since 2.9 or before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxcompress import torch_private
from fxcompress.ledger import Ledger
from fxcompress.pipeline import Partitioner
from fxcompress.settings import make
from fxcompress.tools.models import Task

DEVICE = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    warp_size=32,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


@dataclass(frozen=True)
class Generated:
    """A rewritten graph and the source that Inductor made of it."""

    graph: fx.GraphModule
    code: str


def generate(task: Task, policy: str) -> list[Generated]:
    """The forward and the backward of a training step, which itself computes zeros."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: bool) -> Any:
        graphs.append(graph)
        return lambda given: [_zeros(value) for value in graph.graph.output_node().args[0]]

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        partitioner = Partitioner(make(policy=policy), Ledger())
        return torch_private.compile_interpreted(module, inputs, partitioner, keep)

    torch._dynamo.reset()
    with sdpa_kernel(SDPBackend.MATH):
        task.forward(torch.compile(task.model, backend=backend)).backward()
    return [Generated(graph, code(graph)) for graph in graphs]


def _zeros(node: Any) -> Any:
    if not isinstance(node, fx.Node):
        return node
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()


def code(graph: fx.GraphModule) -> str:
    """The wrapper of a graph, with its Triton kernels, for an H100."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    mode = FakeTensorMode()
    with fake_h100() as written:
        moved, inputs = _on_cuda(graph, mode)
        with V.set_fake_mode(mode), config.patch(fx_graph_cache=False, compile_threads=1):
            compile_fx_inner(moved, inputs, cudagraphs=False, graph_id=0)
    (source,) = written
    return source


@contextmanager
def fake_h100() -> Iterator[list[str]]:
    """Inductor sees an H100 and writes its code into the list instead of loading it."""
    from torch._dynamo import device_interface
    from torch._inductor import scheduler
    from torch._inductor.graph import GraphLowering
    from torch.utils import _triton

    written: list[str] = []

    def keep(lowering: Any) -> Any:
        written.append(lowering.codegen()[0].value)
        return SimpleNamespace(__file__=__file__, key="", call=written.append)

    cuda = device_interface.CudaInterface
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda device=None: H100),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        # Copies of the above, made when the interface was defined.
        (cuda, "current_device", staticmethod(lambda: 0)),
        (cuda, "get_device_properties", staticmethod(lambda device=None: H100)),
        (device_interface, "caching_worker_device_properties", {"cuda": [H100]}),
        (device_interface, "caching_worker_current_devices", {"cuda": 0}),
        (scheduler, "has_triton", lambda: True),  # asks whether a device is there
        (_triton, "triton_hash_with_backend", lambda: ""),  # asks the driver for its target
        (GraphLowering, "compile_to_module", keep),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(patch.object(owner, name, value))
        yield written


def _on_cuda(graph: fx.GraphModule, mode: FakeTensorMode) -> tuple[fx.GraphModule, list[Any]]:
    from torch._inductor.compile_fx import view_to_reshape
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    moved, inputs = copy.deepcopy(graph), []
    for node in moved.graph.nodes:
        node.args = tuple(DEVICE if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {
            k: DEVICE if isinstance(v, torch.device) else v for k, v in node.kwargs.items()
        }
        if node.op == "placeholder":
            given = node.meta["val"]
            size, stride = given.shape, given.stride()
            with mode:
                inputs.append(torch.empty_strided(size, stride, dtype=given.dtype, device=DEVICE))
    view_to_reshape(moved)  # as Inductor does: convolutions on CUDA give other strides
    moved.recompile()
    FakeTensorProp(moved, mode).propagate_dont_convert_inputs(*inputs)
    return moved, inputs
