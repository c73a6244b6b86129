"""Settle: what a call reads is written where it is computed, not where Inductor comes to the call.

Inductor writes a pointwise result when it lowers the call that reads it. By then it has passed the
decode of what else the call reads, and it writes both in one kernel: what the result was computed
from waits until then. The last gradient of a batch norm behind a SiLU is computed from four tensors
of its size, and the convolution before it also reads what is decoded, or rebuilt, in between: at
the peak of an EfficientNet's step 16.7 MB where 14.9 were planned.

Such a result is given to `fxcompress::fence`, as in passes/realise.py, where the peak would rise.
"""

from __future__ import annotations

from torch import fx

from fxcompress.passes import properties as prop
from fxcompress.passes.capture import Cut
from fxcompress.passes.decodes import alive
from fxcompress.passes.insert import insert_fence
from fxcompress.passes.realise import regions
from fxcompress.passes.reuse import reuse
from fxcompress.peak import Step, step_of


def settle(cut: Cut, *, channels_last: bool) -> None:
    """Let Inductor write operands before it comes to their call where the peak would rise, in
    place.

    Args:
        channels_last: Inductor will lay feature maps out with channels fastest.
    """
    graph, step = cut.backward.graph, step_of(cut)
    total = alive(cut, channels_last=channels_last)
    peak = total.max(initial=0.0)
    reads = reuse(graph).reads
    for node, call in _waiting(graph):
        dying = [s for s in reads[node] if _dies(s, node, step)]
        waits = sum(map(prop.tensor_bytes, dying)) - prop.tensor_bytes(node)
        meanwhile = total[step.at[node] + 1 : step.at[call] + 1]
        if waits > 0 and meanwhile.max() + waits > peak:
            with graph.inserting_after(node):
                insert_fence(graph, [node])
    graph.lint()
    cut.backward.recompile()


def _waiting(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Pointwise results, each with the call that it waits for beyond other tensors for that call,
    in graph order."""
    found = []
    for region in regions(graph):
        *before, call = region
        if not prop.is_extern(call):
            continue  # the nodes behind the last call
        operands = {prop.storage_root(n) for n in call.all_input_nodes if prop.is_tensor(n)}
        operands.intersection_update(before)  # what is older is in memory
        for node in sorted(n for n in operands if prop.is_pointwise(n)):
            if any(node < other for other in operands if other is not node):
                found.append((node, call))
    return found


def _dies(source: fx.Node, reader: fx.Node, step: Step) -> bool:
    """It is not needed beyond its reader."""
    return source.op == "call_function" and step.last[source] <= step.at[reader]
