"""Lifetimes: where in the step a saved tensor is held, and which module a moment belongs to."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import RECOMPUTE
from fxcompress.plan import Plan
from fxcompress.provenance import module_path


def located(plan: Plan, cut: Cut) -> Plan:
    """``plan`` with `Moment.module` and `TensorPlan.alive` filled in from the graphs it is for."""
    if not plan.timeline:
        return plan
    forward, backward = list(cut.forward.graph.nodes), list(cut.backward.graph.nodes)
    by_phase = {
        "forward": {node.name: node for node in forward},
        "backward": {node.name: node for node in backward},
    }
    positions = {node: i for i, node in enumerate([*forward, *backward])}
    # The timeline is thinned out evenly: every moment stands for this many positions.
    step = -(-len(positions) // len(plan.timeline))

    def last_reader(node: fx.Node) -> int:
        return max((positions[user] for user in node.users), default=positions[node])

    alive = {
        saved.name: (positions[saved.forward] // step, last_reader(saved.backward) // step)
        for saved in cut.saved
    }
    moments = tuple(
        replace(moment, module=module_path(by_phase[moment.phase][moment.node]))
        for moment in plan.timeline
    )
    tensors = tuple(
        replace(t, alive=None if t.representation == RECOMPUTE else alive.get(t.name))
        for t in plan.tensors
    )
    return replace(plan, timeline=moments, tensors=tensors)
