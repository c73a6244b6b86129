"""Evaluate: run a forward or backward graph op by op on real tensors.

What the compiled graph would compute, with three differences. Values of any node can be watched.
Dropout is drawn from a generator seeded by the graph's own seed: run op by op, Inductor's random
ops ignore their seed, and the backward would rebuild another mask than the forward used. And with
``differentiable=True`` ops whose derivative autograd does not know are replaced by their formula.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import torch_private

aten = torch.ops.aten


class Evaluation(fx.Interpreter):
    """One run of a graph.

    Attributes:
        watched: values of the watched nodes, by node name, after :meth:`run`.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        watch: Collection[str] = (),
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.watch = frozenset(watch)
        self.differentiable = differentiable
        self.watched: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.watch:
            self.watched[n.name] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        instead = _INSTEAD.get(target)
        if instead is not None:
            return instead(*args, **kwargs)
        if self.differentiable:
            stand_in = _STAND_INS.get(target)
            if stand_in is not None:
                return stand_in(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def evaluate(
    module: fx.GraphModule, inputs: Sequence[Any], watch: Collection[str] = ()
) -> tuple[list[Any], dict[str, Any]]:
    """(outputs, watched values by node name) of a graph."""
    run = Evaluation(module, watch)
    with torch.no_grad():
        outputs = run.run(*inputs)
    return list(outputs), run.watched


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator(seed.device).manual_seed(int(seed))


def _random(size: Sequence[int], seed: Tensor, mode: str, **_: Any) -> Tensor:
    draw = torch.rand if mode == "rand" else torch.randn
    return draw(list(size), generator=_generator(seed), device=seed.device)


def _randint(low: int, high: int, size: Sequence[int], seed: Tensor, **_: Any) -> Tensor:
    return torch.randint(low, high, list(size), generator=_generator(seed), device=seed.device)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    **torch_private.seeded_random_ops(_random, _randint),
    aten.view.default: torch.reshape,  # strides may differ from those traced, as for Inductor
}


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of softmax(q·kᵀ·scale + mask)·v by its formula.

    The probabilities and the output are computed from q, k and v as they are given, as in the
    rewritten graph (passes/attention.py), not from the saved statistics.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.mT).float() * factor
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    probabilities = scores.softmax(-1)
    grad_f, value_f = grad.float(), value.float()
    grad_value = probabilities.mT @ grad_f
    grad_probabilities = grad_f @ value_f.mT
    row = (grad_probabilities * probabilities).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - row) * factor
    grad_query, grad_key = grad_scores @ key.float(), grad_scores.mT @ query.float()
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _flash_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(grad, query, key, value, causal=causal, mask=attn_mask, scale=scale)


def _flash_gpu(*args: Any, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(*args[:4], causal=args[11], mask=None, scale=scale)


def _efficient_gpu(*args: Any, scale: float | None = None) -> tuple[Tensor | None, ...]:
    found = _attention_backward(*args[:4], causal=args[11], mask=args[4], scale=scale)
    return (*found, None)


def _cudnn_gpu(*args: Any, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(*args[:4], causal=args[14], mask=args[8], scale=scale)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * b + c


_STAND_INS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(torch_private.multiply_add_ops(), _multiply_add),
    torch.ops.prims.convert_element_type.default: lambda a, dtype: a.to(dtype),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_cpu,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_gpu,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_gpu,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_gpu,
}
