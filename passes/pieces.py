"""Pieces: on which side of a kink an element lies is decided on its exact value.

The backward computes some bent operators again, from a decoded tensor: the ReLU behind a batch norm
from the output of the convolution before it. Noise that is zero on average is not so behind the
bend: near zero, half of it is cut off. On either side the operator is linear, so it is enough that
the side be right: `relu(x)` becomes `where(relu(x) <= 0, 0, x)`. The comparison needs exact values
and is hoisted like any other; most often it is the mask that the operator's own gradient takes and
costs nothing. Four layers of convolution, batch norm and ReLU under `uniform2` had a squared bias
of 13 % of their variance; with this, none that 64 draws could show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import fx

from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import tangent_dependent
from fxcompress.passes.capture import Cut
from fxcompress.passes.hoist import known_twins
from fxcompress.passes.standardise import call

aten = torch.ops.aten

# Noise below half a range leaves elements outside on their side of the middle: 2 bits of what comes
# from a batch norm stay within 3. A narrower range takes a second mask.
WIDE = 4.0
STEEP = 1e6  # a slope that takes all elements to one end of a range or the other
INSIDE, OUTSIDE = True, False
_BELOW, _ABOVE = frozenset({"le", "lt"}), frozenset({"ge", "gt"})
_OR, _AND = frozenset({"bitwise_or", "logical_or"}), frozenset({"bitwise_and", "logical_and"})


@dataclass(frozen=True)
class Bend:
    """`clamp(x, low, high)` or, without a range, `abs(x)`; ``y`` is the result.

    The inside of a range is where the result is ``x``, the inside of `abs` where ``x`` is positive.
    """

    x: fx.Node
    y: fx.Node
    low: float
    high: float
    is_range: bool = True


def exact_pieces(cut: Cut) -> Cut:
    """Split every bent operator of the backward that may read a decoded tensor, in place."""
    graph, tainted, twins = cut.backward.graph, tangent_dependent(cut), known_twins(cut)
    saved = {s.backward: s.forward for s in cut.saved}
    decoded = {b for b, f in saved.items() if _is_float(b) and f.op != "placeholder"}
    masks = [n for n in graph.nodes if n not in tainted and _is_boolean(n)]

    def told(bend: Bend) -> tuple[fx.Node, bool] | None:
        known = replace(bend, x=twins.get(bend.x, bend.x), y=twins.get(bend.y, bend.y))
        sides = ((mask, _meaning(saved.get(mask, mask), known, twins)) for mask in masks)
        return next(((mask, side) for mask, side in sides if side is not None), None)

    for node in list(graph.nodes):
        if node in tainted or not _is_float(node) or decoded.isdisjoint(node.all_input_nodes):
            continue
        decoded.add(node)
        bend = bend_of(node)
        if bend is None or all(nested(reader) for reader in node.users):
            continue  # not bent, or treated together with what it is nested in
        whole, inner = nested(node), bend_of(bend.x)
        if whole is not None and (known := told(whole)):
            _split(graph, whole, *known)
            continue
        for part in (inner, replace(bend, x=whole.x)) if whole and inner else (bend,):
            mask, side = told(part) or told(bend_of(part.y) or part) or (None, OUTSIDE)
            mask = mask or _outside(graph, part)
            masks.append(mask)
            _split(graph, replace(part, x=part.y.args[0]), mask, side)  # type: ignore[arg-type]
    graph.eliminate_dead_code()
    cut.backward.recompile()
    return cut


def bend_of(y: fx.Node) -> Bend | None:
    """What ``y`` bends; None for other operators."""
    bounds = {
        "abs": (0.0, math.inf),
        "relu": (0.0, math.inf),
        "clamp_min": (y.args[-1] if y.args else None, math.inf),
        "clamp_max": (-math.inf, y.args[-1] if y.args else None),
    }
    name = prop.op_name(y)
    if y.op != "call_function" or name not in bounds:
        return None
    low, high = bounds[name]
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return None
    return Bend(y.args[0], y, float(low), float(high), is_range=name != "abs")  # type: ignore[arg-type]


def nested(y: fx.Node) -> Bend | None:
    """A clamp of a clamp from the other side, as one with both ends."""
    outer = bend_of(y)
    inner = outer and bend_of(outer.x)
    if outer is None or inner is None or not (outer.is_range and inner.is_range):
        return None
    low, high = max(outer.low, inner.low), min(outer.high, inner.high)
    both = math.isfinite(low) and math.isfinite(high) and low < high
    return Bend(inner.x, y, low, high) if both else None


def _meaning(mask: fx.Node, bend: Bend, twins: dict[fx.Node, fx.Node]) -> bool | None:
    """INSIDE, OUTSIDE or None: what elements have in common for which ``mask`` is true.

    ``mask`` and ``bend`` are of the forward; where that has no such node, of the backward.
    """
    name = prop.op_name(mask)
    if name in {"logical_not", "bitwise_not"}:
        inner = _meaning(mask.args[0], bend, twins)  # type: ignore[arg-type]
        return None if inner is None else not inner
    if name in _OR | _AND:
        side = OUTSIDE if name in _OR else INSIDE
        lower, upper = replace(bend, high=math.inf), replace(bend, low=-math.inf)
        for a, b in permutations(mask.args):
            if _meaning(a, lower, twins) is side and _meaning(b, upper, twins) is side:  # type: ignore[arg-type]
                return side
        return None
    one_sided = math.isinf(bend.low) != math.isinf(bend.high)
    if name not in _BELOW | _ABOVE or not one_sided:
        return None
    has_low = math.isinf(bend.high)
    edge = bend.low if has_low else bend.high
    is_inside = name in (_ABOVE if has_low else _BELOW)
    compared, bound = twins.get(mask.args[0], mask.args[0]), mask.args[1]  # type: ignore[arg-type]
    # x on the edge may count as either side; y is there for every element outside.
    counts_edge_outside = (name in {"le", "ge"}) != is_inside
    of_result = compared is bend.y and bend.is_range and counts_edge_outside
    return is_inside if bound == edge and (compared is bend.x or of_result) else None


def _outside(graph: fx.Graph, bend: Bend) -> fx.Node:
    """A new mask of the elements outside a range with one end."""
    with graph.inserting_before(bend.y.next):
        if math.isinf(bend.high):
            return call(graph, aten.lt.Scalar, bend.x, bend.low)
        return call(graph, aten.gt.Scalar, bend.x, bend.high)


def _split(graph: fx.Graph, bend: Bend, mask: fx.Node, side: bool) -> None:
    """Let float readers of the result read ``where(mask, …)`` instead."""
    readers = [reader for reader in bend.y.users if not prop.is_integer(reader)]
    last = _move_up(mask, bend.y)
    with graph.inserting_before(last.next):
        other = _end(graph, bend) if bend.is_range else call(graph, aten.neg.default, bend.x)
        pieces = (bend.x, other) if side is INSIDE else (other, bend.x)
        whole = call(graph, aten.where.self, mask, *pieces)
    for reader in readers:
        reader.replace_input_with(bend.y, whole)


def _end(graph: fx.Graph, bend: Bend) -> fx.Node:
    """The end of the range on whose side ``x`` is; NaN for NaN."""
    low, high, x = bend.low, bend.high, bend.x
    if math.isinf(low) or math.isinf(high):
        return _fill(graph, x, low if math.isinf(high) else high)
    middle = (low + high) / 2
    if high - low < WIDE:
        ends = [_fill(graph, x, end) for end in (high, low)]
        return call(graph, aten.where.self, call(graph, aten.gt.Scalar, x, middle), *ends)
    # No comparison: that would be one more mask.
    slope = STEEP * max(1.0, abs(low), abs(high)) / (high - low)
    steep = call(graph, aten.mul.Tensor, call(graph, aten.sub.Tensor, x, middle), slope)
    return _clamp(graph, steep, low, high)


def _fill(graph: fx.Graph, x: fx.Node, value: float) -> fx.Node:
    return _clamp(graph, x, value, value)


def _clamp(graph: fx.Graph, x: fx.Node, low: float, high: float) -> fx.Node:
    return call(graph, aten.clamp_max.default, call(graph, aten.clamp_min.default, x, low), high)


def _move_up(mask: fx.Node, y: fx.Node) -> fx.Node:
    """Have the mask computed right after ``y``; the last node of the two."""
    late, pending = set(), [mask]
    while pending:
        node = pending.pop()
        if node > y:
            late.add(node)
            pending.extend(node.all_input_nodes)
    last = y
    for node in sorted(late):
        last.append(node)
        last = node
    return last


def _is_float(node: fx.Node) -> bool:
    return prop.is_tensor(node) and prop.value(node).dtype in prop.FLOATS


def _is_boolean(node: fx.Node) -> bool:
    return prop.is_tensor(node) and prop.value(node).dtype == torch.bool
