"""Rewrite: the cut of plain Inductor becomes the cut of the plan.

Forward outputs are ``user outputs | tensors (version-checked, then not) | opaque | symints`` and
backward placeholders ``symints | tensors | opaque | tangents``. A payload takes the place of its
tensor in both lists; hoisted masks and the random key join at the end of the version-checked ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.codecs import codec
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.attention import repeat_attention
from fxcompress.passes.axes import storage_order
from fxcompress.passes.capture import Cut, output_args, pair, receive, save
from fxcompress.passes.hoist import forward_twins
from fxcompress.passes.insert import (
    advance_views,
    insert_blank,
    insert_decodes,
    insert_encode,
    insert_encode_filled,
    insert_fetches,
    insert_key,
    insert_to_host,
)
from fxcompress.passes.layout import pin_inputs
from fxcompress.passes.rebuild import rebuild
from fxcompress.passes.rectified import insert_fill, insert_filled, insert_masked, mask_of
from fxcompress.passes.standardise import Units, insert_standardised, units_of

KEEP, MASKS, SHAPE, RECOMPUTE, OFFLOAD = "keep", "masks", "shape", "recompute", "offload"
UNCODED = frozenset({KEEP, MASKS, SHAPE, RECOMPUTE, OFFLOAD})
WIDEST_INDEX = 8  # bits, the most that the codec packs; a wider index is saved as it is


@dataclass(frozen=True)
class Choice:
    """What becomes of one saved tensor.

    Attributes:
        candidate: the tensor.
        representation: a codec's spec; ``keep``; ``masks``: drop the values and save only what
            the exact readers need; ``shape``: save nothing, no reader looks at the values;
            ``recompute``: rebuild it by the candidate's recipe, whose roots the backward has;
            ``offload``: it waits in host memory as it is.
        reason: why, in a few words for the report.
        host: the codec's payload waits in host memory.
        exact_masks: comparisons are made on exact values, in the forward; not on decoded ones.
        lowering: by what the codec's payload is decoded (fxcompress/lowering.py); empty: our
            operator.
    """

    candidate: Candidate
    representation: str
    reason: str = ""
    host: bool = False
    exact_masks: bool = True
    lowering: str = ""

    @property
    def codec_spec(self) -> str | None:
        return None if self.representation in UNCODED else self.representation

    @property
    def drops_values(self) -> bool:
        """The backward no longer has the exact values; what is rebuilt is as exact as its roots."""
        if self.codec_spec is None:
            return self.representation not in {KEEP, RECOMPUTE, OFFLOAD}
        return not codec(self.codec_spec).lossless

    @property
    def is_exact(self) -> bool:
        """The backward gets the tensor as it was from the forward: others can be rebuilt of it.

        What waits in host memory does not count: it would be fetched for that, or stay on the
        device all the while, and the memory model knows of neither.
        """
        return not self.drops_values and self.representation not in {RECOMPUTE, OFFLOAD}

    @property
    def is_fused(self) -> bool:
        """What the graph does to the tensor just before it is encoded, and just after it is
        decoded, is done in the same pass (codecs/fused.py)."""
        spec = self.codec_spec
        return spec is not None and codec(spec).fuses and self.lowering != "inductor"

    @property
    def knows_zeros(self) -> bool:
        """The zeros of a ReLU's output are kept apart, in its mask."""
        coded = self.codec_spec is not None and self.drops_values and self.exact_masks
        return coded and mask_of(self.candidate) is not None


def coded_roots(choices: Iterable[Choice]) -> list[tuple[Choice, Choice]]:
    """(what is rebuilt, a root of it that is coded) for all such pairs."""
    by_node = {c.candidate.saved.forward: c for c in choices}
    return [
        (choice, by_node[node])
        for choice in by_node.values()
        if choice.representation == RECOMPUTE and choice.candidate.recipe is not None
        for node in choice.candidate.recipe.roots
        if node in by_node and by_node[node].drops_values
    ]


def noisy(choices: Sequence[Choice]) -> list[Choice]:
    """Choices under which the backward does not see the tensor's exact values."""
    rebuilt = {choice for choice, _ in coded_roots(choices)}
    return [c for c in choices if c.drops_values or c in rebuilt]


def hoisted_nodes(choices: Sequence[Choice]) -> dict[fx.Node, Choice]:
    """Backward nodes to compute in the forward, each with the first choice that asks for it."""
    wanted: dict[fx.Node, Choice] = {}
    for choice in noisy(choices):
        for node in choice.candidate.exact:
            # A decoded comparison may be wrong, a decoded index may lie outside its tensor.
            if choice.exact_masks or prop.value(node).dtype != torch.bool:
                wanted.setdefault(node, choice)
    return wanted


def integer_spec(bounds: tuple[int, int] | None) -> str | None:
    """Codec with the fewest bits for integers within ``bounds``; None: save them as they are."""
    if bounds is None:
        return None
    low, high = bounds
    bits = max((high - low).bit_length(), 1)
    return codec(f"bits(bits={bits},low={low})").spec if bits <= WIDEST_INDEX else None


def rewrite(
    cut: Cut,
    choices: Sequence[Choice],
    plan_key: str,
    *,
    channels_last: bool,
    inlines_mask: Callable[[str, fx.Node], bool] = lambda spec, node: False,
) -> Cut:
    """Apply ``choices`` to both graphs of ``cut``, in place, and return the new cut.

    Args:
        cut: graphs to change; :meth:`Cut.copy` first to keep the originals.
        choices: for candidates of this very cut; tensors without one stay as they are.
        plan_key: carried by the compiled graph to name its plan; empty where no plan is stored.
        channels_last: Inductor will lay feature maps out with channels fastest.
        inlines_mask: whether a packed mask, by codec and node of the backward, is to be unpacked
            in the graph, for Inductor to fuse with its readers.
    """
    advance_views(cut.forward, [s.forward for s in cut.saved])
    if channels_last:
        pin_inputs(cut)
    hoisted = forward_twins(cut, hoisted_nodes(choices))
    repeat_attention(
        cut.backward,
        dict.fromkeys(n for c in noisy(choices) for n in c.candidate.attention),
    )
    exchange = _Exchange(cut, plan_key, channels_last)
    rebuilt = [c.candidate for c in choices if c.representation == RECOMPUTE]
    rebuild(cut, rebuilt, exchange.join, hoisted)
    rectified = [c for c in choices if c.knows_zeros]
    in_one_pass = {mask_of(c.candidate): c for c in rectified if _is_filled(c)}
    masks = {
        c: hoisted[insert_masked(cut.backward, c.candidate)] for c in rectified if not _is_filled(c)
    }
    streams = {choice: stream for stream, choice in enumerate(choices)}
    filled: dict[Choice, _Filled] = {}
    for node, twin in hoisted.items():
        spec = integer_spec(prop.integer_range(node))
        inline = spec is not None and inlines_mask(spec, node)
        if node in in_one_pass:
            choice = in_one_pass[node]
            filled[choice] = exchange.add_filled(choice, streams[choice], node, twin, inline)
        else:
            exchange.add_hoisted(node, twin, spec, inline)
    cut.backward.graph.eliminate_dead_code()  # what only led to hoisted nodes needs no decode
    for choice, stream in streams.items():
        if choice.codec_spec is not None:
            exchange.swap(choice, stream, masks.get(choice), filled.get(choice))
        elif choice.representation == OFFLOAD:
            exchange.offload(choice.candidate)
        elif choice.representation == SHAPE:
            insert_blank(cut.backward, choice.candidate.saved.backward)
    return exchange.settle()


def _is_filled(choice: Choice) -> bool:
    """Its zeros are filled, and their mask is coded, in the pass that encodes it. Not where that
    pass brings it to the units of its channels."""
    return choice.is_fused and units_of(choice.candidate.saved.forward) is None


@dataclass(frozen=True)
class _Filled:
    """A ReLU's output coded with its mask in one pass: its payload in the forward, and that of the
    mask in the backward."""

    payload: fx.Node
    mask: fx.Node


class _Exchange:
    """What passes from the forward to the backward, while it is being changed."""

    def __init__(self, cut: Cut, plan_key: str, channels_last: bool) -> None:
        self.cut, self.plan_key, self.channels_last = cut, plan_key, channels_last
        self.keys: dict[torch.device, fx.Node] = {}
        self.swapped: dict[fx.Node, fx.Node] = {}  # forward node saved before → saved now
        self.joined: list[fx.Node] = []  # forward nodes saved in addition
        self.received = {s.forward: s.backward for s in cut.saved}
        checked = [s for s in cut.saved if not torch_private.is_unchecked(s.forward)]
        self.last_checked = (checked or cut.saved)[-1].backward

    def add_hoisted(self, node: fx.Node, twin: fx.Node, spec: str | None, inline: bool) -> None:
        """Save ``twin`` and let the readers of the backward's ``node`` read it instead."""
        if spec is None:
            node.replace_all_uses_with(self.join(twin))
            return
        order = storage_order(prop.value(twin), self.channels_last)
        key = self._key(twin)
        payload = insert_encode(self.cut.forward, twin, spec, key, 0, order, at_once=True)
        received = self.join(payload)
        insert_decodes(self.cut.backward, node, received, spec, None, 0, order, inline=inline)

    def add_filled(
        self, choice: Choice, stream: int, node: fx.Node, twin: fx.Node, inline: bool
    ) -> _Filled:
        """Code a ReLU's output and its mask in one pass, and let the readers of the backward's
        mask ``node`` read it; ``twin``: that mask in the forward."""
        forward, order, spec = self.cut.forward, choice.candidate.order, choice.codec_spec
        source = choice.candidate.saved.forward
        assert spec is not None
        fill, key = insert_fill(forward, source, twin), self._key(source)
        payload, mask = insert_encode_filled(forward, source, fill, spec, key, stream, order)
        received = self.join(mask)
        packed = integer_spec((0, 1))
        assert packed is not None
        insert_decodes(self.cut.backward, node, received, packed, None, 0, order, inline=inline)
        return _Filled(payload, received)

    def swap(
        self, choice: Choice, stream: int, mask: fx.Node | None, filled: _Filled | None
    ) -> None:
        """Save a payload in place of the tensor.

        Args:
            mask: where it is known to be zero, in the forward.
            filled: its payload and mask, where these were coded already.
        """
        saved, order, spec = choice.candidate.saved, choice.candidate.order, choice.codec_spec
        forward, backward = self.cut.forward, self.cut.backward
        source, node, key = saved.forward, saved.backward, self._key(saved.forward)
        assert spec is not None
        units = None if codec(spec).lossless else units_of(source)
        dtype = prop.value(source).dtype
        if filled is not None:
            payload = filled.payload
        elif units is not None and choice.is_fused:
            dtype = torch.promote_types(dtype, prop.value(units.mean).dtype)
            payload = insert_encode(forward, source, spec, key, stream, order, units=units)
        else:
            coded = source
            if units is not None:
                coded = insert_standardised(forward, source, units)
            elif mask is not None:
                coded = insert_filled(forward, source, mask)
            dtype = prop.value(coded).dtype
            payload = insert_encode(forward, coded, spec, key, stream, order)
        if choice.host:
            payload = insert_to_host(forward, payload)
        received = self._replace(source, node, payload)
        received_key = self.join(key) if codec(spec).decode_needs_key else None
        received_units = units and Units(self.join(units.mean), self.join(units.rstd))
        insert_decodes(
            backward, node, received, spec, received_key, stream, order,
            coded=dtype, units=received_units, mask=filled.mask if filled else None,
            host=choice.host, inline=choice.lowering == "inductor",
        )  # fmt: skip

    def offload(self, candidate: Candidate) -> None:
        """Save a copy in host memory in place of the tensor."""
        source, node = candidate.saved.forward, candidate.saved.backward
        moved = insert_to_host(self.cut.forward, source, candidate.order)
        received = self._replace(source, node, moved)
        insert_fetches(self.cut.backward, node, received, candidate.order)

    def _replace(self, source: fx.Node, node: fx.Node, now: fx.Node) -> fx.Node:
        """Save ``now`` in place of ``source``; its placeholder, before that of ``source``."""
        unchecked = torch_private.copy_unchecked_mark(source, now)
        received = receive(self.cut.backward, now, node)
        if node is self.last_checked and not unchecked:
            self.last_checked = received
        self.swapped[source] = now
        return received

    def _key(self, node: fx.Node) -> fx.Node:
        """The step's random key on the node's device.

        Every encode is given it, drawing or not: the call that makes the key also names the plan to
        the report, and must not die as unused code.
        """
        device = prop.value(node).device
        if device not in self.keys:
            self.keys[device] = insert_key(self.cut.forward, self.plan_key, node)
        return self.keys[device]

    def join(self, node: fx.Node) -> fx.Node:
        """Backward placeholder of one more forward node; the same one when asked again."""
        if node not in self.received or node in self.swapped:
            self.last_checked = receive(self.cut.backward, node, self.last_checked)
            self.received[node] = self.last_checked
            self.joined.append(node)
        return self.received[node]

    def settle(self) -> Cut:
        """Bring outputs of the forward and placeholders of the backward in step."""
        cut = self.cut
        cut.backward.graph.eliminate_dead_code()
        gone = {
            s.forward: s.backward
            for s in cut.saved
            if s.forward in self.swapped or not s.backward.users
        }
        for node in gone.values():
            cut.backward.graph.erase_node(node)
        before = [n for n in output_args(cut.forward)[cut.num_outputs :] if n is not None]
        now = [self.swapped.get(n, n) for n in before if n in self.swapped or n not in gone]
        save(cut, now, self.joined)
        cut.forward.graph.eliminate_dead_code()
        for module in (cut.forward, cut.backward):
            module.graph.lint()
            module.recompile()
        return pair(cut.forward, cut.backward, cut.num_outputs, cut.static_inputs)
