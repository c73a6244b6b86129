"""What tests of training share: a small model, a step of it, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress import torch_private

PLAIN = "aot_eager_decomp_partition"  # plain Inductor's graphs, run op by op
Gradients = dict[str, Tensor]


@contextmanager
def no_leftovers() -> Iterator[None]:
    """No graphs or seeds from elsewhere: these very sources compile."""
    torch._dynamo.reset()
    fxcompress.manual_seed(None)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()
    fxcompress.manual_seed(None)


class Net(nn.Module):
    """A lossy tensor, one that is rebuilt, a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.head = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.gelu(self.first(x)))))


def batch(rows: int = 48, seed: int = 2) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def backend(policy: str = "uniform8", **settings: Any) -> Any:
    """Quick to compile, and nothing is too small."""
    given = {"inner": "aot_eager", "min_bytes": 0, **settings}
    return fxcompress.backend(policy=policy, **given)


def loss(out: Tensor) -> Tensor:
    """A scalar that weighs outputs differently."""
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)).sum()


def gradients(model: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> Gradients:
    """Of the parameters, for one step of ``call`` (the model or something made of it)."""
    model.zero_grad(set_to_none=True)
    loss(call(*inputs)).backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def error(found: Gradients, exact: Gradients) -> float:
    """Norm of the difference over that of the exact gradient."""
    assert found.keys() == exact.keys()
    difference = sum(float((found[k] - exact[k]).double().square().sum()) for k in exact)
    return (difference / sum(float(exact[k].double().square().sum()) for k in exact)) ** 0.5


def saved_storages(out: Tensor) -> dict[int, int]:
    """Bytes of the distinct storages that the autograd graph of ``out`` holds, by address."""
    found: dict[int, int] = {}
    pending, seen = [out.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in torch_private.saved_by_node(node):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        pending.extend(following for following, _ in node.next_functions)
    return found


def coded(plan: fxcompress.Plan) -> list[str]:
    """Names of the tensors that a lossy codec holds."""
    return [t.name for t in plan.tensors if t.representation.startswith("affine")]
