"""Layout: keep Inductor from saving a second copy of every convolution weight.

With its layout optimization Inductor copies each contiguous 4-D input that leads to a convolution
(weights, and the images) to channels-last when the forward starts, and saves the *copy* for the
backward: on ResNet-18 a second set of the model's weights, 45 MB, alive for the whole step
(`GraphLowering.run_node`, `maybe_apply_channels_last_stride_order`). Inputs that an `as_strided`
reads keep their layout; so the convolution is given an `as_strided` of the weight, which covers the
same memory: the copy is then made for the convolution alone and dies with it, and the weight itself
is what is saved.
"""

from __future__ import annotations

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut

_CONVOLUTION = torch.ops.aten.convolution.default


def copied_inputs(cut: Cut) -> list[fx.Node]:
    """Forward inputs that Inductor would save as a channels-last copy (its layout choice given)."""
    return [
        saved.forward
        for saved in cut.saved
        if saved.forward.op == "placeholder"
        and _is_contiguous_map(saved.forward)
        and any(user.target is _CONVOLUTION for user in saved.forward.users)
    ]


def can_pin(node: fx.Node) -> bool:
    """The input is a weight.

    Images are left to Inductor: with the image contiguous it would also lay the gradient of the
    first convolution's output out anew, a copy larger than the one saved (ResNet-18 at 112²: 26 MB
    for 5).
    """
    return any(u.target is _CONVOLUTION and u.args[1] is node for u in node.users)


def pin_inputs(cut: Cut) -> None:
    """Have the original of each weight among :func:`copied_inputs` saved, in place."""
    for node in filter(can_pin, copied_inputs(cut)):
        readers = sorted(u for u in node.users if u.op != "output")
        value = prop.value(node)
        graph = cut.forward.graph
        with graph.inserting_before(readers[0]):
            alias = graph.call_function(
                torch.ops.aten.as_strided.default,
                (node, list(value.shape), list(value.stride())),
            )
        alias.meta = {**node.meta}
        with torch_private.fake_mode_of(value):
            alias.meta["val"] = torch.as_strided(value, value.shape, value.stride())
        for reader in readers:
            reader.replace_input_with(node, alias)


def _is_contiguous_map(node: fx.Node) -> bool:
    value = prop.value(node)
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 4
        and not prop.has_symbols(node)
        and value.is_contiguous()
        and not value.is_contiguous(memory_format=torch.channels_last)
    )
