"""Auxiliary sign activation: a linear layer whose weight gradient reads its input's signs.

With s = +1 where x > 0 and −1 elsewhere (0 included), ε = 0.01 and c = 100:

    forward   y  = (x + ε·s) Wᵀ + b      so that the signs are part of what is learnt from
    backward  ∇x = ∇y W                  exact for the W that the forward used
              ∇W = c·ε·∇yᵀ s             s in the place of x, c a learning rate of its own
              ∇b = Σ ∇y                  exact

Saved is one bit an element: packed in eager mode; compiled, fxcompress's backend packs it, and
shares it with the mask of a ReLU whose output x is. Memory is saved where nothing else needs x: in
an MLP with ReLU, but not behind a GELU, whose input is saved in any case and from which our backend
rebuilds its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.codecs import codec
from fxcompress.nn.precision import autocast_as

EPSILON, GAIN = 0.01, 100.0
_PACKED = "bits(bits=1,low=0)"


def _signs(negative: Tensor, like: Tensor) -> Tensor:
    return 1 - 2 * negative.to(like.dtype)


class _LinearASA(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, gain: float
    ) -> Tensor:
        negative = x <= 0  # written as in the backward of ReLU: one mask for both
        ctx.packs = not torch.compiler.is_compiling()
        kept = codec(_PACKED).encode(negative.contiguous(), None, 0) if ctx.packs else negative
        ctx.save_for_backward(kept, weight)
        ctx.shape, ctx.factor = x.shape, gain * epsilon
        return F.linear(x + epsilon * _signs(negative, x), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        negative, weight = ctx.saved_tensors
        if ctx.packs:
            negative = codec(_PACKED).decode(negative, ctx.shape, torch.bool, None, 0)
        rows = gradient.flatten(0, -2)
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = gradient @ weight
        if ctx.needs_input_grad[1]:
            signs = _signs(negative, gradient).flatten(0, -2)
            for_weight = ctx.factor * (rows.t() @ signs)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias, None, None


def linear_asa(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epsilon: float = EPSILON,
    gain: float = GAIN,
) -> Tensor:
    """`torch.nn.functional.linear` that learns from the signs of ``x``; see the module's formulas.

    Args:
        x: float (…, in_features), two dimensions or more.
        weight, bias: (out_features, in_features), (out_features,).
        epsilon, gain: ε and c.
    """
    bias = None if bias is None else autocast_as(bias)
    out: Tensor = _LinearASA.apply(autocast_as(x), autocast_as(weight), bias, epsilon, gain)
    return out


class LinearASA(nn.Linear):
    """A `torch.nn.Linear` that saves one bit an element; see the module's formulas.

    >>> import torch
    >>> y = LinearASA(64, 8)(torch.randn(4, 64))
    """

    epsilon, gain = EPSILON, GAIN

    def forward(self, input: Tensor) -> Tensor:
        return linear_asa(input, self.weight, self.bias, self.epsilon, self.gain)
