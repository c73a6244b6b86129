"""Realise: a sum that outlives what it was computed from is written to memory, and where it stands.

Inductor computes a pointwise result anew for each of its readers as long as that reads no more
than four tensors, and it fuses a result that it does write with whatever comes later. What it is
computed from must then be there for the last reader. Along a residual stream, whose sums are read
by a normalisation and by the next sum, it so keeps up to four tensors where one would do: three
gradients of 12.8 MB in the first stage of a ResNet-50 (batch 16, 112²), 69.0 MB at the peak of a
step instead of 62.8; in a DenseNet, where each layer reads all before it, the gradients of a whole
block.

From one call to the next (a convolution, a product: what never fuses), results that are read
beyond are chosen such that most dies for what is written: the closure problem of graph theory, by
a minimum cut. They are given to `fxcompress::fence`, which does nothing but is said to write to
them: Inductor has them in memory by then, and fuses nothing across it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import networkx as nx
from torch import fx

from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut, placeholders
from fxcompress.passes.insert import insert_fence
from fxcompress.passes.reuse import is_called_on

SMALLEST = 1 << 16  # bytes; it is not worth a kernel's while to let less die
WORTH = 1.5  # bytes that die for each that is written, which also takes time


def realise_sums(cut: Cut) -> None:
    """Let Inductor write pointwise results whose inputs die by it, in place."""
    inputs = set(placeholders(cut.forward))  # which the caller holds
    received = {s.backward for s in cut.saved if s.forward in inputs}
    for module, free in ((cut.forward, inputs), (cut.backward, received)):
        for group in outliving(module.graph, free):
            with module.graph.inserting_after(group[-1]):
                insert_fence(module.graph, group)
        module.graph.lint()
        module.recompile()


def outliving(graph: fx.Graph, free: set[fx.Node]) -> list[list[fx.Node]]:
    """Pointwise nodes that let more die, before their last reader, than they take themselves, in
    graph order: a list for each stretch between two calls.

    Args:
        free: inputs that are there throughout.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    written: set[fx.Node] = set()  # what is in memory anyway
    sources: dict[fx.Node, set[fx.Node]] = {}  # in memory, by result that is not
    found = []
    for region in regions(graph):
        _trace(region, written, sources)
        end = place[region[-1]]
        front = {n for n in region if n in sources and any(place[r] > end for r in prop.readers(n))}
        dying = {}
        for source in set[fx.Node]().union(*(sources[n] for n in front)) - free:
            needs = _holders(source, front, written, place, end)
            if needs and prop.tensor_bytes(source) >= SMALLEST:
                dying[source] = needs
        if chosen := _closure(dying):
            written |= chosen
            found.append(sorted(chosen))
            _trace(region, written, sources)
    return found


def regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes up to and including each call; our own, which stand by their readers, apart."""
    region = []
    for node in graph.nodes:
        region.append(node)
        if prop.is_extern(node) and getattr(node.target, "namespace", "") != "fxcompress":
            yield region
            region = []
    if region:
        yield region


def _trace(
    region: Sequence[fx.Node], written: set[fx.Node], sources: dict[fx.Node, set[fx.Node]]
) -> None:
    """Find what each result of a region that is not in memory is computed from."""
    for node in region:
        sources.pop(node, None)
        if node in written or not _is_inlined(node):
            written.add(prop.storage_root(node))
            continue
        reads = (prop.storage_root(n) for n in node.all_input_nodes if prop.is_tensor(n))
        sources[node] = set[fx.Node]().union(
            *({r} if r in written else sources.get(r, {r}) for r in reads)
        )


def _holders(
    source: fx.Node,
    front: set[fx.Node],
    written: set[fx.Node],
    place: dict[fx.Node, int],
    end: int,
) -> set[fx.Node]:
    """The results of a region that a tensor is kept for beyond its end; none if also for others."""
    found: set[fx.Node] = set()
    pending, seen = [source], {source}
    while pending:
        for reader in prop.readers(pending.pop()):
            if place[reader] > end:
                return set()
            if reader in seen or reader in written or not _is_inlined(reader):
                continue
            seen.add(reader)
            if reader in front:
                found.add(reader)  # and what it is read by is computed from it
            elif any(place[r] > end for r in prop.readers(reader)):
                return set()  # of a region before
            else:
                pending.append(reader)
    return found


def _closure(dying: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """The results to write such that most bytes die for them; each tensor needs all its holders."""
    if not dying:
        return set()
    network = nx.DiGraph()
    for source, needs in dying.items():
        network.add_edge("all", ("dies", source), capacity=prop.tensor_bytes(source))
        for node in needs:
            network.add_edge(("dies", source), node)  # without a capacity: unlimited
            cost = math.inf if prop.has_symbols(node) else WORTH * prop.tensor_bytes(node)
            network.add_edge(node, "none", capacity=cost)
    _, (chosen, _) = nx.minimum_cut(network, "all", "none")
    return {node for node in chosen if isinstance(node, fx.Node)}


def _is_inlined(node: fx.Node) -> bool:
    """Inductor may compute it in its readers: pointwise, pure, and no call reads it."""
    is_fused = prop.is_tensor(node) and prop.is_pointwise(node) and prop.is_pure(node)
    return is_fused and not is_called_on(node)
