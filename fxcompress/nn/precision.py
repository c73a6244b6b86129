"""Autocast for layers with a gradient of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_as(tensor: Tensor) -> Tensor:
    """The tensor in the type that autocast gives to matrix products, where it is on.

    Inside an autograd function autocast would cast what the forward computes with, but not what it
    saves, so that the backward met two types.
    """
    if not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
