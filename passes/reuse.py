"""Reuse: which pointwise results Inductor writes to memory because they are read more than once.

Inductor computes a pointwise result anew in each of its readers, unless that would read many
tensors each time or, on a CPU, take an exponential or the like (`realize_reads_threshold` and
`should_realize_on_reuse` in torch/_inductor). Where all readers are in one loop, what it wrote
never leaves the loop; where a reduction stands between them, it is a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from fxcompress.passes import properties as prop

MANY = 4  # tensors, `realize_reads_threshold`
_HEAVY = frozenset({"exp", "log", "log10", "log1p", "log2", "sigmoid", "tanh"})


@dataclass(frozen=True)
class Reuse:
    """What Inductor computes where, in one graph.

    Attributes:
        reads: the tensors in memory from which each pointwise result is computed.
        written: pointwise results that are in memory for their second reader.
    """

    reads: dict[fx.Node, frozenset[fx.Node]]
    written: frozenset[fx.Node]


def reuse(graph: fx.Graph) -> Reuse:
    """Which results of a graph are written to be read again, and what each is computed from."""
    reads: dict[fx.Node, frozenset[fx.Node]] = {}
    heavy: set[fx.Node] = set()
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if not (prop.is_tensor(node) and prop.is_pointwise(node)):
            continue
        roots = [prop.storage_root(n) for n in node.all_input_nodes if prop.is_tensor(n)]
        inlined = [r for r in roots if r in reads and r not in written and not is_called_on(r)]
        found = {r for r in roots if r not in inlined}
        reads[node] = frozenset(found.union(*(reads[r] for r in inlined)))
        on_cpu = prop.value(node).device.type == "cpu"
        if on_cpu and (prop.op_name(node) in _HEAVY or not heavy.isdisjoint(inlined)):
            heavy.add(node)
        if len(node.users) > 1 and (len(reads[node]) > MANY or node in heavy):
            written.add(node)
    return Reuse(reads, frozenset(written))


def outlives_a_reduction(node: fx.Node) -> bool:
    """It is read again by a loop that waits for a reduction of it, as in the backward of a BN.

    A reduction along rows leaves no buffer: both loops are made one, row by row.
    """
    loop = reached({node}, prop.is_pointwise) | {node}
    reductions = {u for n in loop for u in n.users if _reduces_columns(u)}
    after = reached(reductions, lambda n: prop.is_pointwise(n) or prop.is_view(n))
    return any(not loop.isdisjoint(n.all_input_nodes) for n in after)


def reached(starts: set[fx.Node], passes: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """What is computed from the starts by nothing but such nodes."""
    found: set[fx.Node] = set()
    pending = list(starts)
    while pending:
        for user in pending.pop().users:
            if user not in found and prop.is_tensor(user) and passes(user):
                found.add(user)
                pending.append(user)
    return found


def _reduces_columns(node: fx.Node) -> bool:
    if prop.op_name(node) not in {"sum", "mean"} or len(node.args) < 2:
        return False
    source, dims = node.args[:2]
    assert isinstance(source, fx.Node)
    first = (0, -prop.value(source).dim())
    return isinstance(dims, Sequence) and any(d in first for d in dims)


def is_called_on(node: fx.Node) -> bool:
    """A call that does not fuse reads it, or it is returned: it is in memory."""
    return any(r.op == "output" or prop.is_extern(r) for r in prop.readers(node))
