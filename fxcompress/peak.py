"""Peak: a model of the memory timeline of one training step, linear in the choices.

Time runs over the nodes of the forward, then of the backward, in graph order. A node owns a buffer
if Inductor must write it to memory: calls that do not fuse (matrix products, convolutions, our
codecs), reductions, outputs, and pointwise results that such a call reads or that are read on both
sides of one. Everything else lives in registers of a fused loop, and whatever it reads stays alive
until the loop runs. Parameters, their gradients and the step's inputs are not counted, but inputs
that get a gradient are: activations of the graph before. What the forward returns is alive to the
end, for its caller may hold it, or until its gradient is there if the caller is known not to.

Each saved tensor contributes by its representation: kept, its bytes from birth to its last reader;
coded, its bytes until the last forward reader, the payload from there to the last decode, and a
decoded copy around each cluster of readers; in host memory, likewise without a payload; rebuilt,
its bytes until the last forward reader and again from the first backward reader on, what its steps
write on the way, and its roots until then.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import fx

from fxcompress.choose import (
    hoisted_bytes,
    payload_bytes,
    statistics_bytes,
    workspace_bytes,
)
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.capture import Cut, output_args, placeholders
from fxcompress.passes.insert import clusters
from fxcompress.passes.layout import can_pin, copied_inputs
from fxcompress.passes.products import held_for_sums
from fxcompress.passes.recipes import Recipe
from fxcompress.passes.rectified import mask_of
from fxcompress.passes.reuse import outlives_a_reduction, reuse
from fxcompress.passes.rewrite import (
    KEEP,
    OFFLOAD,
    RECOMPUTE,
    Choice,
    coded_roots,
    hoisted_nodes,
)
from fxcompress.passes.standardise import units_of
from fxcompress.scratch import convolution_bytes

Bytes = npt.NDArray[np.float64]

_REDUCTIONS = frozenset(
    """
    sum mean var_mean var amax amin argmax argmin prod any all cumsum _softmax _log_softmax
    native_batch_norm native_layer_norm native_group_norm max min linalg_vector_norm
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)


@dataclass(frozen=True)
class Timeline:
    """Bytes alive at each position of the step; see the module docstring.

    Attributes:
        base: buffers that no choice changes.
        plain_extra: what plain Inductor holds besides (see passes/layout.py, products.py).
        kept: by candidate, bytes if it is kept.
        dropped: by candidate, bytes of the original if the backward does without it.
        prepared: by candidate, bytes of a copy in the units of its channels, or with its zeros
            filled, that is encoded in its place unless one pass does both.
        decoded: by candidate, bytes of decoded copies if it is coded.
        fetched: by candidate, bytes of copies that come from host memory if it waits there.
        held: by candidate, 1 while its payload is alive.
        coding: by candidate, 1 where it is encoded or decoded.
        rebuilt: by candidate that has a recipe, bytes of the rebuilt tensor and what it takes.
        rebuilding: by candidate that has a recipe, its share of 1 where the steps run.
        masks: by hoisted node, bytes of its payload and unpacked copies.
        mask_payload: by hoisted node, bytes of its payload.
        names: node at each position.
        forward_nodes: how many of them belong to the forward.
    """

    base: Bytes
    plain_extra: Bytes
    kept: dict[str, Bytes]
    dropped: dict[str, Bytes]
    prepared: dict[str, Bytes]
    decoded: dict[str, Bytes]
    fetched: dict[str, Bytes]
    held: dict[str, Bytes]
    coding: dict[str, Bytes]
    rebuilt: dict[str, Bytes]
    rebuilding: dict[str, Bytes]
    masks: dict[fx.Node, Bytes]
    mask_payload: dict[fx.Node, int]
    names: tuple[str, ...]
    forward_nodes: int

    def of(self, choice: Choice) -> Bytes:
        """What one choice adds at each position, hoisted masks apart."""
        name, spec = choice.candidate.name, choice.codec_spec
        if choice.representation == KEEP:
            return self.kept[name]
        if choice.representation == RECOMPUTE:
            return self.dropped[name] + self.rebuilt[name]
        if choice.representation == OFFLOAD:
            return self.dropped[name] + self.fetched[name]
        if spec is None:
            return self.dropped[name]
        found = self.dropped[name] + self.decoded[name]
        if not choice.is_fused:
            found += self.prepared[name]
        found += self.held[name] * payload_bytes(choice.candidate, spec)
        if workspace := workspace_bytes(choice.candidate, spec):
            found += self.coding[name] * workspace
        return found

    def of_root(self, rebuilt: Choice, root: Choice) -> Bytes:
        """What a coded root adds where a tensor is rebuilt of it: decoded once more, unless it is
        decoded there for a reader of its own."""
        assert root.codec_spec is not None
        size = root.candidate.own_bytes + workspace_bytes(root.candidate, root.codec_spec)
        is_there = self.decoded[root.candidate.name] >= root.candidate.own_bytes
        return self.rebuilding[rebuilt.candidate.name] * np.where(is_there, 0.0, size)

    def total(self, choices: Sequence[Choice]) -> Bytes:
        """Bytes alive at each position under ``choices``."""
        total = self.base.copy()
        for choice in choices:
            total += self.of(choice)
        for rebuilt, root in coded_roots(choices):
            total += self.of_root(rebuilt, root)
        for node in hoisted_nodes(choices):
            total += self.masks[node]
        return total

    def peak(self, choices: Sequence[Choice]) -> int:
        return int(self.total(choices).max(initial=0.0))

    def plain_peak(self, kept: Sequence[Choice]) -> int:
        """Peak of plain Inductor; ``kept`` keeps every candidate."""
        return int((self.total(kept) + self.plain_extra).max(initial=0.0))


@dataclass(frozen=True)
class Step:
    """Positions of all nodes, which own memory, and the last position that reads each."""

    at: dict[fx.Node, int]
    owners: frozenset[fx.Node]
    last: dict[fx.Node, int]
    end_forward: int
    end: int

    def span(self, first: int, last: int, size: float) -> Bytes:
        result = np.zeros(self.end + 1)
        result[first : last + 1] = size
        return result

    def birth(self, node: fx.Node) -> int:
        """Position of the kernel that writes the node's memory."""
        producer = node.args[0] if node.target is operator.getitem else node
        assert isinstance(producer, fx.Node)
        return self.at[producer]


def timeline(
    cut: Cut,
    candidates: Sequence[Candidate],
    *,
    channels_last: bool,
    repeats: int = 1,
    lets_go: bool = False,
) -> Timeline:
    """The memory timeline of ``cut``, with what each candidate adds kept apart.

    Args:
        channels_last: Inductor will lay feature maps out with channels fastest.
        repeats: how often the forward runs before the backwards do, as the block of a model that is
            compiled block by block. What the other runs save is there throughout.
        lets_go: when the backward begins nobody holds what the forward returned (returned.py).
    """
    others = repeats - 1
    step = step_of(cut)
    returned = {prop.storage_root(n) for n in cut.outputs if isinstance(n, fx.Node)}
    coded_roots = {prop.storage_root(c.saved.forward) for c in candidates} - returned
    received = {s.backward for s in cut.saved}
    gradients = _parameter_gradients(cut)
    inputs = set(placeholders(cut.forward))

    base = np.zeros(step.end + 1)
    for node in step.owners:
        if node in coded_roots or node in received or node in gradients or node in inputs:
            continue
        last = step.last[node]
        if node in returned:
            # The loss, a number, is what the backward is called on.
            last = step.end_forward if lets_go and prop.value(node).dim() else step.end
        first = step.end_forward + 1 if node.op == "placeholder" else step.birth(node)
        base[first : last + 1] += prop.tensor_bytes(node)

    for node, saved_as in _incoming(cut).items():
        last = max([step.last[node], *(step.last[n] for n in saved_as)])
        base += step.span(0, last, prop.tensor_bytes(node)) + others * prop.tensor_bytes(
            node
        ) * bool(saved_as)
    plain_extra = _held_for_sums(step, cut)
    copies = _layout_copies(step) if channels_last else np.zeros(step.end + 1)
    for node, position in step.at.items():
        measured = convolution_bytes(node, channels_last=channels_last)
        copies[position] = max(copies[position], measured)
    base += copies
    if channels_last:
        for node in copied_inputs(cut):
            received_copy = next(s.backward for s in cut.saved if s.forward is node)
            copy = step.span(
                0, step.last[received_copy], prop.tensor_bytes(node)
            ) + others * prop.tensor_bytes(node)
            if can_pin(node):
                plain_extra += copy
            else:
                base += copy

    kept, dropped, prepared, decoded, fetched = {}, {}, {}, {}, {}
    held, coding = {}, {}
    rebuilt, rebuilding = _rebuilt(step, cut, candidates, others, channels_last=channels_last)
    masks: dict[fx.Node, Bytes] = {}
    repeated: set[tuple[fx.Node, fx.Node]] = set()
    for candidate in candidates:
        name, saved = candidate.name, candidate.saved
        root = prop.storage_root(saved.forward)
        born = step.birth(root)
        used = max(step.last[root], born)
        needed = max(step.last[saved.backward], used)
        size = 0 if root in returned else candidate.own_bytes
        kept[name] = step.span(born, needed, size) + others * size
        if root in returned and lets_go:
            kept[name] = step.span(step.end_forward + 1, needed, candidate.own_bytes)
        dropped[name] = step.span(born, used, size)
        readers = candidate.live_readers
        decoded[name] = _copies(step, cut, readers, candidate.own_bytes)
        fetched[name] = _copies(step, cut, _all_readers(candidate), candidate.own_bytes)
        prepared[name] = step.span(used, used, size if _is_prepared(candidate) else 0)
        # Its forward runs again, into a buffer of q's size, instead of its decoded results; once
        # for q, k and v of one buffer, which are coded together.
        for node in () if _is_of_attention(candidate) else candidate.attention:
            if (root, node) not in repeated:
                repeated.add((root, node))
                decoded[name] += step.span(step.at[node], step.at[node], candidate.own_bytes)
        held[name] = step.span(used, _last_decode(step, cut, readers, used), 1) + others
        coding[name] = step.span(used, used, 1)
        for cluster in clusters(readers):
            coding[name][step.at[cluster[0]]] = 1
        for node in candidate.exact:
            if node not in masks:
                exact_readers = list(node.users)
                last = _last_decode(step, cut, exact_readers, used)
                masks[node] = step.span(step.at[saved.forward], last, hoisted_bytes(node))
                masks[node] += _copies(step, cut, exact_readers, prop.tensor_bytes(node))
                masks[node] += others * hoisted_bytes(node)
    names = (n.name for module in (cut.forward, cut.backward) for n in module.graph.nodes)
    payloads = {node: hoisted_bytes(node) for node in masks}
    return Timeline(
        base,
        plain_extra,
        kept,
        dropped,
        prepared,
        decoded,
        fetched,
        held,
        coding,
        rebuilt,
        rebuilding,
        masks,
        payloads,
        tuple(names),
        step.end_forward + 1,
    )


def _incoming(cut: Cut) -> dict[fx.Node, list[fx.Node]]:
    """Activations of the graph before, each with the backward's placeholders for it."""
    gradients = output_args(cut.backward)
    return {
        node: [s.backward for s in cut.saved if prop.storage_root(s.forward) is node]
        for i, node in enumerate(placeholders(cut.forward))
        if i not in cut.static_inputs
        and i < len(gradients)
        and gradients[i] is not None
        and prop.is_tensor(node)
    }


def _rebuilt(
    step: Step, cut: Cut, candidates: Sequence[Candidate], others: int, *, channels_last: bool
) -> tuple[dict[str, Bytes], dict[str, Bytes]]:
    """(what a candidate with a recipe adds if it is rebuilt, its share of 1 where that happens).

    Two that need the same root for longer than others do are each counted for it.
    """
    backward = {s.forward: s.backward for s in cut.saved}
    sizes = {c.saved.forward: c.own_bytes for c in candidates}
    first: dict[fx.Node, int] = {}  # by buffer: where its views are rebuilt
    for candidate in candidates:
        root = prop.storage_root(candidate.saved.forward)
        readers = [step.at[u] for u in candidate.saved.backward.users]
        first[root] = min([first.get(root, step.end), *readers])
    nodes, is_call = list(step.at), prop.is_extern
    found, where = {}, {}
    for candidate in candidates:
        recipe = candidate.recipe
        if recipe is None:
            continue
        reader = first[prop.storage_root(candidate.saved.forward)]
        # Before a call: what the steps take is dead when it runs. A loop may be one with them.
        start = reader - (is_call(nodes[reader]) and not is_call(nodes[reader - 1]))
        end = max(step.last[candidate.saved.backward], reader)
        total = step.span(start, end, candidate.own_bytes)
        total[start] += recipe.share * workspace_of(recipe, channels_last=channels_last)
        for root in recipe.roots:
            needed = max(step.last[backward[root]], step.end_forward)
            if root in sizes and needed < start:
                total[needed + 1 : start + 1] += recipe.share * sizes[root]
        statistics = recipe.share * statistics_bytes(candidate)
        total += step.span(step.birth(candidate.saved.forward), start, statistics)
        found[candidate.name] = total + others * statistics
        where[candidate.name] = step.span(start, start, recipe.share)
    return found, where


def workspace_of(recipe: Recipe, *, channels_last: bool) -> int:
    """Bytes that the steps of a recipe write on their way to the tensor, at most at one time.

    Args:
        channels_last: a convolution has its weight reordered.
    """
    place = {node: i for i, node in enumerate(recipe.steps)}
    last: dict[fx.Node, int] = {}
    written: set[fx.Node] = set()
    for node in reversed(recipe.steps):
        last[node] = place[node]
        for user in node.users:
            if user not in place:
                continue
            is_call = _writes_memory(user) and user.target is not operator.getitem
            last[node] = max(last[node], place[user] if is_call else last[user])
            passes_on = prop.is_view(user) or user.target is operator.getitem
            if prop.is_extern(user) or (passes_on and user in written):
                written.add(node)
        if _writes_memory(node):
            written.add(node)
    alive = np.zeros(len(recipe.steps))
    for node in written:
        is_part = prop.is_view(node) or node.target is operator.getitem
        if not is_part and node is not prop.storage_root(recipe.steps[-1]):
            alive[place[node] : last[node] + 1] += prop.tensor_bytes(node)
    for node in recipe.steps:
        copied = 0
        if channels_last and prop.op_name(node) == "convolution":
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            copied = prop.tensor_bytes(weight)
        alive[place[node]] += max(copied, convolution_bytes(node, channels_last=channels_last))
    return int(alive.max(initial=0.0))


def _copies(step: Step, cut: Cut, readers: Sequence[fx.Node], size: float) -> Bytes:
    """Bytes of decoded copies: one alive around each cluster of direct readers."""
    total = np.zeros(step.end + 1)
    for cluster in clusters(readers):
        last = max(
            step.at[r] if r in step.owners or _writes_memory(r) else step.last[r] for r in cluster
        )
        total = np.maximum(total, step.span(step.at[cluster[0]], last, size))
    return total


def _held_for_sums(step: Step, cut: Cut) -> Bytes:
    """What plain Inductor keeps for products that it puts off; see passes/products.py."""
    total = np.zeros(step.end + 1)
    for _, put_off_to, operands in held_for_sums(cut):
        for node in operands:
            total += step.span(step.last[node] + 1, step.at[put_off_to], prop.tensor_bytes(node))
    return total


def _layout_copies(step: Step) -> Bytes:
    """Copies that calls work on where the graph's layout is channels-last, while they run.

    Read off the allocator's events of ResNets on CPU: a convolution has its weight reordered, its
    backward three times (two of them for the weight gradient), or twice where the kernel is one
    pixel, whose layouts are the same; a scatter has its source copied.
    """
    total = np.zeros(step.end + 1)
    copied = {"convolution": (1, 1), "convolution_backward": (2, 3), "scatter_add": (3, 1)}
    for node, position in step.at.items():
        argument, copies = copied.get(prop.op_name(node), (0, 0))
        if copies:
            operand = node.args[argument]
            assert isinstance(operand, fx.Node)
            is_pixel = copies == 3 and all(size == 1 for size in prop.value(operand).shape[2:])
            total[position] += (copies - is_pixel) * prop.tensor_bytes(operand)
    return total


def _is_prepared(candidate: Candidate) -> bool:
    return units_of(candidate.saved.forward) is not None or mask_of(candidate) is not None


def _is_of_attention(candidate: Candidate) -> bool:
    """It is a result of a fused attention."""
    root = prop.storage_root(candidate.saved.forward)
    source = root.args[0] if root.target is operator.getitem else None
    return isinstance(source, fx.Node) and "scaled_dot_product" in prop.op_name(source)


def _all_readers(candidate: Candidate) -> list[fx.Node]:
    return [u for u in candidate.saved.backward.users if u.op != "output"]


def step_of(cut: Cut) -> Step:
    """Where in the step of ``cut`` its nodes stand, and are read."""
    forward, backward = list(cut.forward.graph.nodes), list(cut.backward.graph.nodes)
    at = {node: i for i, node in enumerate([*forward, *backward])}
    owners: set[fx.Node] = set()
    last: dict[fx.Node, int] = {}
    # What the forward returns is held by the user or saved: both are accounted for elsewhere.
    _follow_reads(forward, at, owners, last, returned_stays=False)
    _follow_reads(backward, at, owners, last, returned_stays=True)
    return Step(at, frozenset(owners), last, len(forward) - 1, len(at) - 1)


def _follow_reads(
    graph: list[fx.Node],
    at: dict[fx.Node, int],
    owners: set[fx.Node],
    last: dict[fx.Node, int],
    *,
    returned_stays: bool,
) -> None:
    """Fill ``owners`` and ``last`` for one graph, readers before what they read."""
    region, regions = 0, {}
    for node in graph:
        region += prop.is_extern(node)
        regions[at[node]] = region
    reused = reuse(graph[0].graph).written
    for node in reversed(graph):
        positions = [] if prop.is_view(node) else [at[node]]
        written = False
        for user in node.users:
            if user.op == "output":
                written = True
                if returned_stays:
                    positions.append(at[user])
            elif prop.is_extern(user):
                written = True
                positions.append(at[user])
            elif _writes_memory(user) and user.target is not operator.getitem:
                written = written or "pool" in prop.op_name(user)  # reads each element many times
                positions.append(at[user])
            elif prop.is_view(user) or user.target is operator.getitem:
                written = written or user in owners
                positions.append(last[user])
            elif user in owners:
                # A fused loop may write over what it is the last to read.
                positions.append(
                    at[user]
                    - (
                        prop.is_pointwise(user)
                        and prop.tensor_bytes(user) == prop.tensor_bytes(node)
                    )
                )
            else:
                positions.append(last[user])
        last[node] = max(positions, default=-1)
        owns = node.op == "placeholder" or (
            prop.is_tensor(node)
            and (
                _writes_memory(node)
                or written
                or regions[at[node]] != regions.get(last[node], regions[at[node]])
                or (node in reused and outlives_a_reduction(node))
            )
        )
        if owns:
            owners.add(node)
    for node in graph:  # a view lives in its root's memory
        if prop.is_view(node) or (node.target is operator.getitem and prop.is_view(node.args[0])):  # type: ignore[arg-type]
            root = prop.storage_root(node)
            last[root] = max(last[root], last[node])
            if node in owners:
                owners.discard(node)
                owners.add(root)


def _writes_memory(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    several = isinstance(prop.value(source), (tuple, list)) and not prop.is_view(source)
    return several or prop.is_extern(source) or prop.op_name(source) in _REDUCTIONS


def _last_decode(step: Step, cut: Cut, readers: Sequence[fx.Node], default: int) -> int:
    """Position of the last decode: where the payload dies."""
    found = clusters(readers)
    return step.at[found[-1][0]] if found else default


def _parameter_gradients(cut: Cut) -> set[fx.Node]:
    """Backward outputs that are gradients of parameters: not activation memory."""
    return {
        prop.storage_root(node)
        for i, node in enumerate(output_args(cut.backward))
        if i in cut.static_inputs and isinstance(node, fx.Node)
    }
