"""Roles: what a saved tensor is to the layers that made and read it, told from the graph alone.

The seed systems choose by layer type ("the input of a convolution"); these are the same choices,
asked of the operators that read the tensor in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.standardise import units_of

CONVOLUTION, LINEAR, BATCH_NORM, ATTENTION = "convolution", "linear", "batch_norm", "attention"


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product whose weight gradient reads the tensor.

    Attributes:
        gradient: the backward node that multiplies it.
        kernel: positions of the kernel, 1 for a matrix product.
        groups: of the convolution.
    """

    gradient: fx.Node
    kernel: int
    groups: int


def roles(candidate: Candidate) -> frozenset[str]:
    """Which of the roles above the tensor has; it may have several, or none."""
    found = set()
    for reader in candidate.smooth:
        name = prop.op_name(reader)
        if name == "convolution_backward":
            found.add(CONVOLUTION)
        elif name in {"mm", "bmm", "addmm", "baddbmm"}:
            found.add(LINEAR)
        elif "scaled_dot_product" in name:
            found.add(ATTENTION)
    units = units_of(candidate.saved.forward)
    if units is not None and _is_per_channel(units.rstd):
        found.add(BATCH_NORM)
    return frozenset(found)


def product_of(candidate: Candidate) -> Product | None:
    """The first convolution or matrix product that reads the tensor for a weight gradient."""
    for reader in candidate.smooth:
        name = prop.op_name(reader)
        if name == "convolution_backward":
            gradient, _, weight = reader.args[:3]
            assert isinstance(gradient, fx.Node)
            assert isinstance(weight, fx.Node)
            shape = [torch_private.size_hint(s) for s in prop.value(weight).shape]
            kernel = 1
            for side in shape[2:]:
                kernel *= side
            return Product(gradient, kernel, int(reader.args[9]))  # type: ignore[call-overload,arg-type]
        if name in {"mm", "bmm"}:
            ours = _lineage(candidate)
            other = [n for n in reader.all_input_nodes if n not in ours]
            if len(other) == 1:
                return Product(other[0], 1, 1)
    return None


def _lineage(candidate: Candidate) -> set[fx.Node]:
    """The tensor and what is computed from it before a gradient joins."""
    found, pending = set[fx.Node](), [candidate.saved.backward]
    while pending:
        node = pending.pop()
        found.add(node)
        pending += [u for u in node.users if u not in found and u not in candidate.smooth]
    return found


def _is_per_channel(statistic: fx.Node) -> bool:
    shape = [torch_private.size_hint(s) for s in prop.value(statistic).shape]
    return len(shape) > 1 and all(s == 1 for i, s in enumerate(shape) if i != 1)
