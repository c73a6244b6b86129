"""Reuse: which pointwise results Inductor writes to memory because they are read more than once.

Inductor computes a pointwise result anew in each of its readers, unless that would read many
tensors each time or, on a CPU, take an exponential (`realize_reads_threshold` and
`should_realize_on_reuse` in torch/_inductor). Where all readers are in one loop, what it wrote
never leaves the loop; where a reduction stands between them, it is a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcompress.passes import properties as prop

MANY = 4  # tensors, `realize_reads_threshold`
_HEAVY = frozenset({"exp", "sigmoid"})


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


def is_called_on(node: fx.Node) -> bool:
    """A call that does not fuse reads it, or it is returned: it is in memory."""
    return any(r.op == "output" or prop.is_extern(r) for r in prop.readers(node))
