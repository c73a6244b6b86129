"""Graph: the joint graph of a step folded by module, for Graphviz and for networkx.

A row of the module tree is two nodes, the module's forward and its backward; the tensors it saves
are the edges between them, those of one representation together. (A plan names the operators that
read a tensor, not their modules: most are in the module's own backward, where all are drawn.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise

import graphviz
import networkx as nx

from fxcompress.plan import Plan, TensorPlan
from fxcompress.tools.output import megabytes, percent
from fxcompress.tools.viz_tree import (
    KINDS,
    UNCODED,
    Module,
    module_tree,
    readable_depth,
    rows,
    tensor_kind,
)

_NAMED = 20  # tensors that a tooltip names


def graph(plan: Plan, depth: int | None = None) -> nx.MultiDiGraph:
    """The joint graph of a step, folded.

    Nodes ``("forward", path)`` and ``("backward", path)`` in order of execution, with `label`; an
    edge from a module's forward to its backward for each representation that its saved tensors
    have, with `kind`, `tensors`, `bytes_before`, `bytes_after`, `share` of the noise and `label`;
    edges of kind None order the modules.
    """
    root = module_tree(plan)
    shown = list(rows(root, readable_depth(root) if depth is None else depth))
    found = nx.MultiDiGraph()
    for module, _ in shown:
        found.add_node(("forward", module.path), label=_title(module))
    for module, _ in reversed(shown):
        found.add_node(("backward", module.path), label=_title(module))
    for (a, _), (b, _) in pairwise(shown):
        found.add_edge(("forward", a.path), ("forward", b.path), kind=None)
        found.add_edge(("backward", b.path), ("backward", a.path), kind=None)
    for module, held in shown:
        for edge in _edges([plan.tensors[i] for i in held], plan.predicted_variance):
            found.add_edge(("forward", module.path), ("backward", module.path), **edge)
    return found


def _title(module: Module) -> str:
    path = module.path or "(top level)"
    return f"{path} ×{len(module.members)}" if module.members else path


def _edges(tensors: Iterable[TensorPlan], whole: float) -> Iterator[dict[str, object]]:
    """One edge for each representation class; kept tensors by their reason."""

    def fate(tensor: TensorPlan) -> tuple[str, str]:
        kind = tensor_kind(tensor)
        return kind, tensor.reason if kind in {"keep", "shape"} else ""

    order = list(KINDS)
    ranked = sorted(tensors, key=lambda t: (order.index(tensor_kind(t)), fate(t)))
    for (kind, reason), group in groupby(ranked, key=fate):
        alike = list(group)
        before = sum(t.storage_bytes for t in alike)
        after = sum(t.bytes_after for t in alike)
        weighed = [t.predicted_variance for t in alike if t.predicted_variance is not None]
        share = sum(weighed) / whole if weighed and whole else (0.0 if weighed else None)
        name = kind + (f" ×{len(alike)}" if len(alike) > 1 else "")
        size = f"{megabytes(before)} → {megabytes(after)} MB"
        noise = f", {percent(share)} of the noise" if share != 0 else ""
        yield {
            "kind": kind,
            "tensors": [t.name for t in alike],
            "bytes_before": before,
            "bytes_after": after,
            "share": share,
            "label": f"{name}{_detail(kind, reason, alike)}\n{size}{noise}",
        }


def _detail(kind: str, reason: str, tensors: list[TensorPlan]) -> str:
    """Why a tensor is kept, or what it takes an element, hoisted masks counted."""
    if reason:
        return f": {reason}"
    elements = sum(t.numel for t in tensors)
    if not elements or kind in UNCODED:
        return ""
    bits = 8 * sum(t.bytes_after for t in tensors) / elements
    masks = " with masks" if kind != "exact" and any(t.exact_readers for t in tensors) else ""
    return f": {bits:.3g} bits{masks}"


# --- Graphviz -----------------------------------------------------------------------------------


def dot(plan: Plan, depth: int | None = None) -> graphviz.Digraph:
    """The graph for Graphviz: forward modules in a column on the left, backward on the right."""
    folded = graph(plan, depth)
    names = {node: f"{node[0][0]}{i}" for i, node in enumerate(folded.nodes)}
    widest = max((e["bytes_before"] for *_, e in folded.edges(data=True) if e["kind"]), default=0)
    drawn = graphviz.Digraph("plan", graph_attr=_GRAPH, node_attr=_NODE, edge_attr=_EDGE)
    drawn.attr(label=heading(plan) + "\n" + _legend(folded), labelloc="t")
    for side in ("forward", "backward"):
        with drawn.subgraph() as column:
            column.attr(rank="same")
            for node in folded.nodes:
                if node[0] == side:
                    label = f"{folded.nodes[node]['label']}\n{side}"
                    column.node(names[node], _escaped(label))
    for a, b, edge in folded.edges(data=True):
        if edge["kind"] is None:
            # Within a column Graphviz orders nodes by their edges: both columns from top to bottom.
            down, arrow = ((a, b), "forward") if a[0] == "forward" else ((b, a), "back")
            drawn.edge(*(names[n] for n in down), dir=arrow, color="#b5bac0", arrowsize="0.5")
            continue
        listed = ", ".join(edge["tensors"][:_NAMED])
        more = len(edge["tensors"]) - _NAMED
        drawn.edge(
            names[a],
            names[b],
            label=_escaped(edge["label"] + "\n"),
            color=KINDS[edge["kind"]].colour,
            penwidth=f"{1 + 7 * (edge['bytes_before'] / max(widest, 1)) ** 0.5:.1f}",
            tooltip=listed + (f" and {more} more" if more > 0 else ""),
            minlen="4",
        )
    return drawn


def _escaped(text: str) -> str:
    return graphviz.escape(text).replace("\n", "\\n")


def heading(plan: Plan) -> str:
    """The plan in a line or two."""
    budget = "none" if plan.budget_mb is None else f"{plan.budget_mb:g} MB"
    graphs = f", {plan.graphs} graphs" if plan.graphs > 1 else ""
    line = (
        f"policy {plan.policy}, budget {budget}{graphs}: saved "
        f"{megabytes(plan.saved_bytes_before)} → {megabytes(plan.saved_bytes)} MB, peak "
        f"{megabytes(plan.plain_peak_bytes)} → {megabytes(plan.planned_peak_bytes)} MB planned, "
        f"gradient variance {plan.predicted_variance:.3g} "
        f"({'measured' if plan.calibrated else 'guessed'})"
    )
    return f"{line}\n{plan.remarks}" if plan.remarks else line


def _legend(folded: nx.MultiDiGraph) -> str:
    used = Counter(e["kind"] for *_, e in folded.edges(data=True))
    return ";  ".join(f"{name}: {KINDS[name].meaning}" for name in KINDS if used[name])


_GRAPH = {"rankdir": "LR", "nodesep": "0.12", "ranksep": "2", "fontname": "Helvetica"}
_NODE = {"shape": "box", "style": "rounded", "fontname": "Helvetica", "fontsize": "10"}
_EDGE = {"fontname": "Helvetica", "fontsize": "9"}
