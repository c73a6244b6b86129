"""Passing: what noise in a saved tensor does through others that are rebuilt from it.

Let ``w`` be the derivative of ``v·g`` (sensitivity.py) by a saved tensor ``r``, and ``uᵢ`` that by
each buffer rebuilt from it, pulled back through its steps. The same error of ``r`` then counts with
``w + Σuᵢ``: its ways add up as vectors, not as squares. The planner prices pairs of a root and a
buffer, so what is between two buffers, ``2·uᵢ·uⱼ``, is shared between them (as Shapley's values
are): together they cost what they do if all are rebuilt. One that costs more where it is the only
one counts as that. On a ViT, whose residual stream all layers can be rebuilt of, the bound
``|Σu|² ≤ k·Σ|u|²`` that was here before made it four times too dear.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.choose import passes_noise
from fxcompress.codecs import codec
from fxcompress.evaluate import Evaluation
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate

log = logging.getLogger("fxcompress")

REFERENCE = "rotate(bits=2)"

# Of a tensor's derivative: what its codec sees of it.
AsCoded = Callable[[Candidate, Tensor], Tensor]


def passed(
    module: fx.GraphModule,
    coded: Mapping[Candidate, Tensor],
    derivatives: Sequence[Mapping[str, Tensor]],
    known: Mapping[fx.Node, Any],
    as_coded: AsCoded,
) -> dict[str, dict[str, float]]:
    """By root and first tensor of a buffer that is rebuilt of it: the squared error of the gradient
    that noise in the root adds through these, over what it adds by itself. Measured under
    `REFERENCE`; errors of other codecs are taken to be spread alike.

    Args:
        module: the forward.
        coded: tensors that were priced, with what is coded of them in storage order.
        derivatives: for each probe, by name of the tensor.
        known: values of nodes of the forward, all that recipes start from.
        as_coded: see `AsCoded`.
    """
    buffers: dict[fx.Node, list[Candidate]] = defaultdict(list)
    for candidate in coded:
        if passes_noise(candidate):
            buffers[prop.storage_root(candidate.saved.forward)].append(candidate)
    roots_of = {c.saved.forward: c for c in coded}
    # By root and first view of a buffer, the derivative by the root, for each probe.
    ways: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)
    for views in buffers.values():
        recipes = [c.recipe for c in views if c.recipe is not None]
        if sum(r.share for r in recipes) < 1 - 1e-6:  # another view of it passes no noise
            continue
        roots = [n for n in dict.fromkeys(n for r in recipes for n in r.roots) if n in roots_of]
        try:
            pulled = [_pulled_back(module, views, roots, each, known) for each in derivatives]
        except (RuntimeError, NotImplementedError) as error:
            log.info(
                "what is rebuilt of coded tensors as %s is not priced: %s", views[0].name, error
            )
            continue
        for root, *through in zip(roots, *pulled, strict=True):
            candidate = roots_of[root]
            ways[candidate.name][views[0].name] = [as_coded(candidate, u) for u in through]
    found = {}
    for candidate, values in coded.items():
        if candidate.name in ways:
            own = [as_coded(candidate, each[candidate.name]) for each in derivatives]
            found[candidate.name] = _shares(values, own, ways[candidate.name])
    return found


def _shares(
    values: Tensor, own: Sequence[Tensor], ways: Mapping[str, Sequence[Tensor]]
) -> dict[str, float]:
    """By buffer, what it adds to the square of the root's own; see the module docstring.

    Args:
        values: of the root, as it is coded.
        own: derivatives by it, one a probe.
        ways: the same through each buffer.
    """

    def effect(weights: Tensor) -> float:
        return codec(REFERENCE).effect(values, weights)[0]

    direct = sum(map(effect, own))
    if direct <= 0:
        return {}
    others = [2 * w + sum(us) for w, *us in zip(own, *ways.values(), strict=True)]
    found = {}
    for buffer, through in ways.items():
        alone = sum(effect(w + u) for w, u in zip(own, through, strict=True)) - direct
        pairs = zip(through, others, strict=True)
        among = sum(effect(u + o) - effect(u - o) for u, o in pairs) / 4
        found[buffer] = max(alone, among, 0.0) / direct
    return found


def _pulled_back(
    module: fx.GraphModule,
    views: Sequence[Candidate],
    roots: Sequence[fx.Node],
    derivatives: Mapping[str, Tensor],
    known: Mapping[fx.Node, Any],
) -> tuple[Tensor, ...]:
    """Derivatives by the roots, from those by the tensors that are rebuilt of them."""
    run = Evaluation(module, differentiable=True)
    recipes = [c.recipe for c in views if c.recipe is not None]
    steps = sorted({step for recipe in recipes for step in recipe.steps})

    def rebuilt(*values: Tensor) -> tuple[Tensor, ...]:
        made = {**known, **dict(zip(roots, values, strict=True))}
        for step in steps:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), made.__getitem__)
            made[step] = run.call_function(step.target, args, kwargs)
        return tuple(made[c.saved.forward] for c in views)

    pulled: Any = torch.func.vjp(rebuilt, *(known[root] for root in roots))
    found: tuple[Tensor, ...] = pulled[1](tuple(derivatives[c.name] for c in views))
    return tuple(each.detach() for each in found)
