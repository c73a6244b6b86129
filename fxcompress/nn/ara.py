"""Auxiliary residual activation: a convolution whose weight gradient reads an earlier tensor.

With input x, auxiliary A, weight W, bias b and incoming gradient ∇y:

    forward   y  = conv(x, W) + b        nothing of A in it
    backward  ∇x = dgrad(W, ∇y)          exact
              ∇W = wgrad(A, ∇y)          A in the place of x
              ∇b = Σ ∇y                  exact

so x need not be saved. A is the input of the first block of a *segment* of residual blocks, and
saved once for all of them. It is a fair stand-in because it is part of x: a residual block's output
is its input plus something, x_k = A + F_1(x_0) + … (under ReLUs). `learning_indicator` says how
fair. Memory is saved only where nothing else needs x: ReLU must keep a mask, as it does under
fxcompress's backend (1 bit) and under plain Inductor (8 bits), not in eager mode.

The original relays A from node to node in the backward, as if it were a gradient. Here each
convolution saves A itself: the same tensor, so that autograd holds it once and a compiler sees one
saved tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.errors import FxCompressError
from fxcompress.nn.precision import autocast_as


class _Conv2dARA(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, ara: Tensor, weight: Tensor, bias: Tensor | None,
        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(ara, weight)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.bias_sizes = None if bias is None else bias.shape
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        ara, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        needs = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[2],
            ctx.bias_sizes is not None and ctx.needs_input_grad[3],
        )
        # Of its second argument, dgrad reads the shape only.
        for_x, for_weight, for_bias = torch.ops.aten.convolution_backward(
            gradient, ara, weight, ctx.bias_sizes, stride, padding, dilation,
            False, [0, 0], groups, needs,
        )  # fmt: skip
        return for_x, None, for_weight, for_bias, None, None, None, None


def conv2d_ara(
    x: Tensor,
    ara: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` whose weight gradient reads ``ara`` instead of ``x``.

    Args:
        x: float (batch, channels, height, width).
        ara: of the same shape; no gradient flows to it.
        weight, bias, stride, padding, dilation, groups: as of ``conv2d``; pairs of ints.

    Raises:
        FxCompressError: the shapes differ.
    """
    if x.shape != ara.shape:
        raise FxCompressError(
            f"an auxiliary of shape {tuple(ara.shape)} cannot stand in for an input of shape "
            f"{tuple(x.shape)}: begin a new segment (DistributeARA) where the shape changes"
        )
    out: Tensor = _Conv2dARA.apply(
        autocast_as(x), autocast_as(ara.detach()), autocast_as(weight),
        None if bias is None else autocast_as(bias),
        stride, padding, dilation, groups,
    )  # fmt: skip
    return out


class Conv2dARA(nn.Conv2d):
    """A `torch.nn.Conv2d` called with its input and an auxiliary; see the module's formulas.

    >>> import torch
    >>> conv, x = Conv2dARA(8, 8, 3, padding=1), torch.randn(2, 8, 4, 4)
    >>> x, ara = DistributeARA()(x, None)
    >>> y, ara = conv(x, ara)

    Raises:
        FxCompressError: a padding that is not zeros, or not given in numbers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise FxCompressError(
                f"Conv2dARA pads with zeros by a number of pixels, not padding={self.padding!r}, "
                f"padding_mode={self.padding_mode!r}; use nn.Conv2d here"
            )

    def forward(self, x: Tensor, ara: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(conv(x), ara), both for the next layer."""
        assert not isinstance(self.padding, str)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_ara(x, ara, self.weight, self.bias, *geometry), ara


class DistributeARA(nn.Module):
    """Ends a segment: ``(x, ara) → (x, x detached)``.

    The old auxiliary has served its convolutions; x is the auxiliary of those that follow.
    """

    def forward(self, x: Tensor, ara: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.detach()
