"""Every module of PyTorch's own test suite that trains, with every input that it is tested on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from subject import Subject, Trained
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db

MOST = 16  # inputs of one module, the first ones: of LinearCrossEntropyLoss there are hundreds


class Sandwich(nn.Module):
    """A module between two matrix products.

    What it saves is then neither an input nor an output of the graph, which we would not touch. The
    first products multiply by one, so that the module sees values that it was made for.
    """

    def __init__(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        self.before = nn.ParameterList(
            torch.eye(x.shape[-1]) if x.dim() else torch.ones(())
            for x in (*args, *kwargs.values())
            if _is_mixed(x)
        )
        with torch.no_grad():
            outputs = _leaves(copy.deepcopy(inner)(*copy.deepcopy(args), **kwargs))
            if any(isinstance(p, nn.UninitializedParameter) for p in inner.parameters()):
                inner(*copy.deepcopy(args), **kwargs)
        self.after = nn.ParameterList(
            torch.randn(y.shape[-1], y.shape[-1]) if y.dim() else torch.ones(())
            for y in outputs
            if _is_mixed(y)
        )

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        before, after = iter(self.before), iter(self.after)
        args = tuple(_mix(x, before) for x in args)
        kwargs = {k: _mix(x, before) for k, x in kwargs.items()}
        outputs = _leaves(self.inner(*args, **kwargs))
        return [_mix(y, after) for y in outputs]


def _is_mixed(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


def _mix(x: Any, weights: Iterator[nn.Parameter]) -> Any:
    if not _is_mixed(x):
        return x
    return x @ next(weights) if x.dim() else x * next(weights)


def _leaves(output: Any) -> list[Tensor]:
    leaves: list[Any] = torch.utils._pytree.tree_leaves(output)
    return [y for y in leaves if isinstance(y, Tensor)]


def subjects() -> list[Subject]:
    found = []
    for info in module_db:
        count = min(len(_inputs(info)), MOST)
        for i in range(count):
            found.append(Subject(f"module:{info.name}[{i}]", _maker(info, i), group=8, draws=16))
    return found


def _inputs(info: ModuleInfo) -> list[ModuleInput]:
    torch.manual_seed(0)
    made = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    return [m for m in made if m.forward_input is not None]


def _maker(info: ModuleInfo, index: int) -> Any:
    def make() -> Trained:
        given = _inputs(info)[index]
        built, forward = given.constructor_input, given.forward_input
        # Random samples of fractional pooling are made in double for PyTorch's own tests.
        kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in built.kwargs.items()}
        inner = info.module_cls(*built.args, **kwargs).train()
        args, kwargs = tuple(forward.args), dict(forward.kwargs)
        return Trained(Sandwich(inner, args, kwargs).train(), args, kwargs)

    return make
