"""Decodes: one for several readers, where the peak stays what it is.

A rewritten graph decodes a tensor before each cluster of its readers (passes/insert.py): between
them stand calls that need the memory. Where the step is far from its peak they do not, and what was
decoded for one cluster is held for the next. Inductor is kept from joining the two
(fxcompress/fusion.py): it would write the results of both at one time.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
from torch import fx

from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import analyse
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.peak import Bytes, step_of, timeline

_TARGETS = (torch.ops.fxcompress.decode.default, torch.ops.fxcompress.decode_filled.default)


def share_decodes(cut: Cut, *, channels_last: bool) -> None:
    """Let clusters of readers share decodes, those of the largest tensors first, in place.

    Args:
        cut: rewritten graphs.
        channels_last: Inductor will lay feature maps out with channels fastest.
    """
    graph, step = cut.backward.graph, step_of(cut)
    total = alive(cut, channels_last=channels_last)
    peak = total.max(initial=0.0)
    pairs = [pair for same in _alike(graph) for pair in pairwise(same)]

    def held(pair: tuple[fx.Node, fx.Node]) -> list[int]:
        """Where a copy is needed in addition."""
        return list(range(step.last[pair[0]] + 1, step.at[pair[1]]))

    def order(pair: tuple[fx.Node, fx.Node]) -> tuple[int, int]:
        return -prop.tensor_bytes(pair[0]), len(held(pair))

    instead: dict[fx.Node, fx.Node] = {}
    for pair in sorted(pairs, key=order):
        shared = total[held(pair)] + prop.tensor_bytes(pair[0])
        if shared.max(initial=0.0) <= peak:
            total[held(pair)] = shared
            instead[pair[1]] = pair[0]
    for second in sorted(instead):
        first = instead[second]
        instead[second] = instead.get(first, first)
        second.replace_all_uses_with(instead[second])
        graph.erase_node(second)
    graph.lint()
    cut.backward.recompile()


def alive(cut: Cut, *, channels_last: bool) -> Bytes:
    """Bytes at each position of the step of graphs that stay as they are."""
    saved = analyse(cut, 0, channels_last=channels_last)
    memory = timeline(cut, saved, channels_last=channels_last)
    return memory.total([Choice(c, KEEP) for c in saved])


def _alike(graph: fx.Graph) -> list[list[fx.Node]]:
    """Decodes of the same payload, in graph order."""
    found: dict[object, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target in _TARGETS:
            found[str((node.target, node.args))].append(node)
    return list(found.values())
