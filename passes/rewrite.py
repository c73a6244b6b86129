"""Rewrite: the cut of plain Inductor becomes the cut of the plan.

Forward outputs are ``user outputs | tensors (version-checked, then not) | opaque | symints`` and
backward placeholders ``symints | tensors | opaque | tangents``. A payload takes the place of its
tensor in both lists; hoisted masks and the random key join at the end of the version-checked ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.codecs import codec
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.attention import repeat_attention
from fxcompress.passes.capture import Cut, output_node, pair
from fxcompress.passes.hoist import forward_twins
from fxcompress.passes.insert import (
    insert_blank,
    insert_decodes,
    insert_encode,
    insert_key,
    storage_order,
)
from fxcompress.passes.layout import pin_inputs

KEEP, MASKS, SHAPE = "keep", "masks", "shape"
WIDEST_INDEX = 16  # bits; a wider index is saved as it is


@dataclass(frozen=True)
class Choice:
    """What becomes of one saved tensor.

    Attributes:
        candidate: the tensor.
        representation: a codec's spec; ``keep``; ``masks``: drop the values and save only what
            the exact readers need; ``shape``: save nothing, no reader looks at the values.
        reason: why, in a few words for the report.
    """

    candidate: Candidate
    representation: str
    reason: str = ""

    @property
    def codec_spec(self) -> str | None:
        return None if self.representation in {KEEP, MASKS, SHAPE} else self.representation

    @property
    def drops_values(self) -> bool:
        """The backward no longer has the exact values."""
        if self.codec_spec is None:
            return self.representation != KEEP
        return not codec(self.codec_spec).lossless


def hoisted_nodes(choices: Iterable[Choice]) -> dict[fx.Node, Choice]:
    """Backward nodes to compute in the forward, each with the first choice that asks for it."""
    wanted: dict[fx.Node, Choice] = {}
    for choice in choices:
        if choice.drops_values:
            for node in choice.candidate.exact:
                wanted.setdefault(node, choice)
    return wanted


def integer_spec(bounds: tuple[int, int] | None) -> str | None:
    """Codec with the fewest bits for integers within ``bounds``; None: save them as they are."""
    if bounds is None:
        return None
    low, high = bounds
    bits = max((high - low).bit_length(), 1)
    return f"bits(bits={bits},low={low})" if bits <= WIDEST_INDEX else None


def rewrite(cut: Cut, choices: Sequence[Choice], plan_key: str, *, channels_last: bool) -> Cut:
    """Apply ``choices`` to both graphs of ``cut``, in place, and return the new cut.

    Args:
        cut: graphs to change; :meth:`Cut.copy` first to keep the originals.
        choices: for candidates of this very cut; tensors without one stay as they are.
        plan_key: carried by the compiled graph to name its plan.
        channels_last: Inductor will lay feature maps out with channels fastest.
    """
    if channels_last:
        pin_inputs(cut)
    hoisted = forward_twins(cut, hoisted_nodes(choices))
    repeat_attention(
        cut.backward,
        dict.fromkeys(n for c in choices if c.drops_values for n in c.candidate.attention),
    )
    coded = [(c.candidate.saved.backward, c.candidate.saved.forward, c.codec_spec) for c in choices]
    masks = [(node, twin, integer_spec(prop.integer_range(node))) for node, twin in hoisted.items()]
    last_checked = _last_checked(cut)
    swapped: dict[fx.Node, fx.Node] = {}  # forward node saved before → saved now
    joined: list[fx.Node] = []  # forward nodes saved in addition

    # One random key a device and step. Every encode is given it, drawing or not: the call that
    # makes the key also names the plan to the report, and must not die as unused code.
    keys: dict[torch.device, fx.Node] = {}
    received_keys: dict[torch.device, fx.Node] = {}
    for node, spec in [(source, spec) for _, source, spec in [*coded, *masks] if spec]:
        device = prop.value(node).device
        if device not in keys:
            keys[device] = insert_key(cut.forward, plan_key, node)
        if codec(spec).decode_needs_key and device not in received_keys:
            last_checked = received_keys[device] = _receive(
                cut.backward, keys[device], last_checked
            )
            joined.append(keys[device])

    for node, twin, spec in masks:
        if spec is None:
            last_checked = _receive(cut.backward, twin, last_checked)
            node.replace_all_uses_with(last_checked)
            joined.append(twin)
            continue
        order = storage_order(prop.value(twin), channels_last)
        key = keys[prop.value(twin).device]
        payload = insert_encode(cut.forward, twin, spec, key, 0, order, at_once=True)
        last_checked = _receive(cut.backward, payload, last_checked)
        insert_decodes(cut.backward, node, last_checked, spec, None, 0, order)
        joined.append(payload)
    cut.backward.graph.eliminate_dead_code()  # what only led to hoisted nodes needs no decode
    for stream, (node, source, spec) in enumerate(coded):
        if spec is None:
            continue
        device = prop.value(source).device
        order = storage_order(prop.value(source), channels_last)
        payload = insert_encode(cut.forward, source, spec, keys[device], stream, order)
        unchecked = torch_private.copy_unchecked_mark(source, payload)
        received = _receive(cut.backward, payload, node)
        if node is last_checked and not unchecked:
            last_checked = received
        key = received_keys[device] if codec(spec).decode_needs_key else None
        insert_decodes(cut.backward, node, received, spec, key, stream, order)
        swapped[source] = payload
    for choice in choices:
        if choice.representation == SHAPE:
            insert_blank(cut.backward, choice.candidate.saved.backward)
    return _swap_saved_set(cut, swapped, joined)


def _last_checked(cut: Cut) -> fx.Node:
    """Backward placeholder of the last version-checked tensor: where additional ones join."""
    checked = [s for s in cut.saved if not torch_private.is_unchecked(s.forward)]
    return (checked or cut.saved)[-1].backward


def _receive(backward: fx.GraphModule, payload: fx.Node, after: fx.Node) -> fx.Node:
    """A placeholder of the backward for one more value of the forward."""
    with backward.graph.inserting_after(after):
        node = backward.graph.placeholder(payload.name)
    node.meta = dict(payload.meta)
    return node


def _swap_saved_set(cut: Cut, swapped: dict[fx.Node, fx.Node], joined: list[fx.Node]) -> Cut:
    """Bring outputs of the forward and placeholders of the backward in step."""
    cut.backward.graph.eliminate_dead_code()
    unread = {s.forward for s in cut.saved if s.forward not in swapped and not s.backward.users}
    for saved in cut.saved:
        if saved.forward in swapped or saved.forward in unread:
            cut.backward.graph.erase_node(saved.backward)
    output = output_node(cut.forward)
    values = list(output.args[0])  # type: ignore[arg-type]
    users, saved_now = values[: cut.num_outputs], values[cut.num_outputs :]
    kept = [swapped.get(node, node) for node in saved_now if node not in unread]
    checked = sum(prop.is_tensor(node) and not torch_private.is_unchecked(node) for node in kept)
    kept[checked:checked] = joined
    output.args = ((*users, *kept),)
    torch_private.describe_saved(output, cut.num_outputs)
    cut.forward.graph.eliminate_dead_code()
    for module in (cut.forward, cut.backward):
        module.graph.lint()
        module.recompile()
    return pair(cut.forward, cut.backward, cut.num_outputs, cut.static_inputs)
