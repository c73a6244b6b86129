"""Analyse: who reads each saved tensor in the backward, and what may happen to it.

Nodes of the backward graph that do not depend on a tangent are *forward-only*: the partitioner
recomputes them, and the forward could compute them too, on exact data. Starting from a saved
tensor and walking along its readers, every path ends in one of

- an **exact** node: forward-only and boolean or integer (a comparison, an index). To be hoisted.
- a **smooth** reader: an op that mixes the value with a tangent. It may see a decoded tensor.
- a **shape** reader: looks at sizes only.
- a reason to leave the tensor alone (a step function, an op we do not know, …).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxcompress import torch_private
from fxcompress.passes import properties as prop
from fxcompress.passes.axes import channel_dim, feature_maps, storage_order
from fxcompress.passes.capture import Cut, Saved, placeholders
from fxcompress.passes.recipes import Recipe, find_recipes

EXPONENTIAL_FLOOR = 8  # bits; DESIGN fact 12: exp() of a decoded minus an exact value has no bound
STATISTIC_RATIO = 4  # a reader this much larger than the tensor broadcasts it: a statistic


@dataclass(frozen=True)
class Candidate:
    """One saved tensor and what the backward does with it.

    Attributes:
        saved: both ends.
        storage_bytes: bytes it keeps alive that no other entry counts.
        own_bytes: bytes of its own elements.
        smooth: readers that may see a decoded value.
        exact: boolean and integer nodes to hoist if the value is not kept.
        attention: fused attention backwards that read it, as an operand or a result of the forward.
        recompute: ops that would rebuild it from other saved tensors and inputs.
        floor_bits: fewest bits its readers bear.
        keep: why it must stay as it is; empty if it may be coded.
        integers: range (low, high) of an integer tensor, None for floats or unknown ranges.
        order: its dimensions from slowest to fastest in memory.
        channels: the position of its channels (or features) in that order.
        recipe: how it could be rebuilt, at a price (passes/recipes.py).
    """

    saved: Saved
    storage_bytes: int
    own_bytes: int
    smooth: tuple[fx.Node, ...]
    exact: tuple[fx.Node, ...]
    attention: tuple[fx.Node, ...]
    recompute: tuple[fx.Node, ...]
    floor_bits: int
    keep: str
    integers: tuple[int, int] | None
    order: tuple[int, ...]
    channels: int
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        return self.saved.name

    @property
    def fake(self) -> torch.Tensor:
        value = prop.value(self.saved.forward)
        assert isinstance(value, torch.Tensor)
        return value

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its sizes in storage order, as numbers."""
        return tuple(torch_private.size_hint(self.fake.shape[d]) for d in self.order)

    @property
    def live_readers(self) -> list[fx.Node]:
        """Direct backward readers that are left once the exact nodes have been hoisted."""
        first = self.saved.backward.users
        smooth = set(self.smooth)
        reached: list[fx.Node] = []  # through values, not through integers made from them
        pending, seen = list(first), set(first)
        while pending:
            node = pending.pop()
            reached.append(node)
            if node in smooth or prop.is_integer(node):
                continue
            new = [u for u in node.users if u not in seen]
            seen.update(new)
            pending.extend(new)
        leading = set(smooth)
        for node in sorted(reached, reverse=True):  # readers first
            if not prop.is_integer(node) and not leading.isdisjoint(node.users):
                leading.add(node)
        return [u for u in first if u in leading]


@dataclass
class _Readers:
    """What a walk along the readers of one tensor finds."""

    smooth: dict[fx.Node, None] = field(default_factory=dict)
    exact: dict[fx.Node, None] = field(default_factory=dict)
    attention: dict[fx.Node, None] = field(default_factory=dict)
    floor_bits: int = 1
    keep: str = ""


def tangent_dependent(cut: Cut) -> set[fx.Node]:
    """Backward nodes that a gradient flows through."""
    saved = {s.backward for s in cut.saved}
    tainted: set[fx.Node] = set()
    for node in cut.backward.graph.nodes:
        is_input = node.op == "placeholder" and node not in saved
        is_gradient = is_input and not torch_private.is_sym_node(node)
        if is_gradient or any(n in tainted for n in node.all_input_nodes):
            tainted.add(node)
    return tainted


def analyse(cut: Cut, min_bytes: int, *, channels_last: bool = False) -> tuple[Candidate, ...]:
    """Every saved tensor of the cut that is not a plain input, in order.

    Parameters, buffers and inputs that are saved as they are cost nothing extra, so they are not
    listed at all; tensors that are listed but must not be touched carry the reason in ``keep``.

    Args:
        cut: the graphs.
        min_bytes: tensors smaller than this are left alone.
        channels_last: Inductor lays feature maps of these graphs out with channels fastest.
    """
    maps = feature_maps(cut.forward.graph)
    tainted = tangent_dependent(cut)
    held = _held_by_user(cut)
    counted: set[fx.Node] = set()
    found = []
    rebuildable = []
    for saved in cut.saved:
        root = prop.storage_root(saved.forward)
        if root.op in {"placeholder", "get_attr"}:
            continue
        readers = _read(saved.backward, tainted)
        untouchable = (
            _excluded(saved, root, held)
            or _too_small(saved, min_bytes)
            or _is_statistic(saved, tainted)
        )
        keep = untouchable or readers.keep
        if not untouchable and prop.value(saved.forward).dtype in prop.FLOATS:
            rebuildable.append(saved)
        order = storage_order(prop.value(saved.forward), channels_last)
        storage = 0 if root in counted or root in held else _bytes(root)
        counted.add(root)
        found.append(
            Candidate(
                saved=saved,
                storage_bytes=storage,
                own_bytes=_bytes(saved.forward),
                smooth=tuple(readers.smooth),
                exact=tuple(readers.exact),
                attention=tuple(readers.attention),
                recompute=_recompute_chain(saved, cut),
                floor_bits=readers.floor_bits,
                keep=keep,
                integers=prop.integer_range(saved.forward),
                order=order,
                channels=order.index(channel_dim(saved.forward, maps)) if order else 0,
            )
        )
    recipes = find_recipes(cut, rebuildable)
    return tuple(replace(c, recipe=recipes.get(c.saved.forward)) for c in found)


def _read(start: fx.Node, tainted: set[fx.Node]) -> _Readers:
    """Walk from a saved tensor along its readers; see the module docstring."""
    found = _Readers()
    # State of a path: has it been linear all the way, did another tensor join it, and can its
    # elements be zero where an element of the tensor is.
    pending: list[tuple[fx.Node, bool, bool, bool]] = [(start, True, False, True)]
    seen: set[tuple[fx.Node, bool, bool, bool]] = set()
    lineage = {start}
    while pending:
        state = pending.pop()
        if state in seen:
            continue
        seen.add(state)
        node, linear, joined, vanishes = state
        for reader in node.users:
            if reader.op == "output":
                found.keep = found.keep or "returned by the backward as it is"
            elif prop.reads_shape_only(reader, node):
                continue
            elif vanishes and prop.has_pole(reader, node):
                found.keep = found.keep or f"{prop.op_name(reader)} has a pole"
            elif reader in tainted:
                _read_with_gradient(node, reader, found)
            elif prop.is_integer(reader):
                for boundary in _boundary(reader, tainted):
                    found.exact[boundary] = None
            else:
                keep = _cannot_follow(reader)
                if keep:
                    found.keep = found.keep or keep
                    continue
                if prop.is_exponential(reader) and linear and joined:
                    found.floor_bits = EXPONENTIAL_FLOOR
                lineage.add(reader)
                pending.append(
                    (
                        reader,
                        linear and _is_linear_in_one(reader, lineage),
                        joined or _joins_another(reader, lineage),
                        vanishes and prop.can_vanish(reader),
                    )
                )
    return found


def _read_with_gradient(node: fx.Node, reader: fx.Node, found: _Readers) -> None:
    if prop.branches_on(reader, node):
        found.keep = found.keep or f"{prop.op_name(reader)} branches on its value"
    elif prop.masks_scores(reader, node):
        found.keep = found.keep or "a mask of attention scores"
    elif prop.is_step(reader):
        found.keep = found.keep or f"{prop.op_name(reader)} has jumps"
    elif not prop.is_known(reader):
        found.keep = found.keep or f"{prop.op_name(reader)} is not an op we know"
    else:
        if attention_is_repeatable(reader):
            found.attention[reader] = None
        elif prop.normalises_scores(reader, node):
            found.keep = found.keep or "the exponential of its noise has no bound"
        elif _is_query_or_key(reader, node):
            found.floor_bits = EXPONENTIAL_FLOOR
        found.smooth[reader] = None


def _cannot_follow(reader: fx.Node) -> str:
    if torch_private.must_recompute(reader):
        return "root of a region checkpointed by the user"
    if prop.is_step(reader):
        return f"{prop.op_name(reader)} has jumps"
    if not prop.is_pure(reader):
        return f"{prop.op_name(reader)} cannot be repeated"
    if not prop.is_known(reader):
        return f"{prop.op_name(reader)} is not an op we know"
    return ""


def _boundary(node: fx.Node, tainted: set[fx.Node]) -> list[fx.Node]:
    """Boolean or integer nodes that stand for all which is computed from ``node``: to be saved.

    The last ones, as long as that takes no more bits: of `a & b` one mask, not two, but of
    `where(a, 1, -1)` the mask, not the integers.
    """
    pending, result, seen = [node], [], {node}
    while pending:
        current = pending.pop()
        onward = [u for u in current.users if u not in tainted and prop.is_integer(u)]
        goes_on = len(onward) == len(current.users) and _bits(onward) <= _bits([current])
        if not goes_on:
            result.append(current)
            continue
        pending.extend(u for u in onward if u not in seen)
        seen.update(onward)
    return result


def _bits(nodes: Iterable[fx.Node]) -> int:
    return sum(_numel(n) * prop.integer_bits(n) for n in nodes)


def _is_linear_in_one(node: fx.Node, lineage: set[fx.Node]) -> bool:
    inputs = [n for n in node.all_input_nodes if n in lineage]
    return prop.is_linear(node) and (len(inputs) == 1 or prop.op_name(node) in {"add", "sub"})


def _joins_another(node: fx.Node, lineage: set[fx.Node]) -> bool:
    return any(prop.is_tensor(n) and n not in lineage for n in node.all_input_nodes)


def _is_query_or_key(node: fx.Node, argument: fx.Node) -> bool:
    return is_attention_backward(node) and argument in node.args[1:3]


def is_attention_backward(node: fx.Node) -> bool:
    name = prop.op_name(node)
    return "scaled_dot_product" in name and name.endswith("backward")


def attention_is_repeatable(node: fx.Node) -> bool:
    """A fused attention's backward whose forward can be run again before it: no dropout inside, and
    a form we know."""
    return torch_private.attention_forward(node) is not None


def _held_by_user(cut: Cut) -> set[fx.Node]:
    """Storages the user's code holds after the forward: its outputs and mutated inputs."""
    return {prop.storage_root(node) for node in cut.outputs if isinstance(node, fx.Node)}


def _excluded(saved: Saved, root: fx.Node, held: set[fx.Node]) -> str:
    value = prop.value(saved.forward)
    if root in held:
        return "also an output of the forward"
    if torch_private.is_subclass(value):
        return f"{type(value).__name__} is a tensor subclass"
    if torch_private.must_save(saved.forward):
        return "marked to be saved by the user's checkpoint policy"
    if torch_private.is_collective(saved.forward) or torch_private.is_collective(root):
        return "result of a collective"
    if value.layout is not torch.strided:
        return f"layout {value.layout} has no dense storage"
    if value.dtype in prop.FLOATS and prop.is_masked_out(saved.forward):
        return "holds values that mask others out"
    if value.dtype not in prop.FLOATS and value.dtype not in prop.INTEGERS:
        return f"dtype {str(value.dtype).removeprefix('torch.')} has no codec"
    return ""


def _too_small(saved: Saved, min_bytes: int) -> str:
    size = _bytes(saved.forward)
    return f"smaller than {min_bytes} bytes" if size < min_bytes else ""


def _is_statistic(saved: Saved, tainted: set[fx.Node]) -> str:
    """Means, scales and the like: few numbers that many others lean on stay exact.

    Followed through views and what is computed from it alone at its own size: batch norm reads its
    scale as ``unsqueeze(rstd * weight)``.
    """
    if prop.is_integer(saved.backward):
        return ""  # exact in any case; a pooling index is read by a larger tensor too
    size = _numel(saved.backward)
    pending, seen = [saved.backward], {saved.backward}
    while pending:
        node = pending.pop()
        for reader in node.users:
            if not prop.is_tensor(reader) or prop.is_extern(reader) or reader in seen:
                continue
            others = [n for n in reader.all_input_nodes if n is not node]
            if (
                not prop.is_view(reader)
                and any(prop.is_tensor(n) for n in others)
                and _numel(reader) >= STATISTIC_RATIO * size
            ):
                return "a statistic broadcast over a larger tensor"
            if reader not in tainted and _numel(reader) == size:
                seen.add(reader)
                pending.append(reader)
    return ""


def _recompute_chain(saved: Saved, cut: Cut) -> tuple[fx.Node, ...]:
    """Pointwise ops that rebuild the tensor from other saved tensors or inputs; () if none do."""
    available = {s.forward for s in cut.saved if s is not saved} | set(placeholders(cut.forward))
    chain: dict[fx.Node, None] = {}
    pending = [saved.forward]
    while pending:
        node = pending.pop()
        if node in chain or (node in available and node is not saved.forward):
            continue
        if node.op != "call_function" or not prop.is_pure(node) or prop.is_extern(node):
            return ()
        if node.target is torch.ops.aten.native_batch_norm.default or len(chain) > 64:
            return ()
        chain[node] = None
        pending.extend(node.all_input_nodes)
    return tuple(reversed(chain))


def _numel(node: fx.Node) -> int:
    value = prop.value(node)
    return torch_private.size_hint(value.numel()) if isinstance(value, torch.Tensor) else 0


def _bytes(node: fx.Node) -> int:
    """Bytes of the node's memory: of the storage it owns, dense."""
    value = prop.value(node)
    if isinstance(value, (tuple, list)):  # a multi-output op that is split into views
        return sum(
            torch_private.size_hint(v.numel()) * v.element_size()
            for v in value
            if isinstance(v, torch.Tensor)
        )
    return _numel(node) * value.element_size() if isinstance(value, torch.Tensor) else 0


def saved_bytes(candidates: Iterable[Candidate]) -> int:
    """Bytes plain Inductor saves, each storage once."""
    return sum(c.storage_bytes for c in candidates)
