"""Passing: what noise in a saved tensor does through others that are rebuilt from it.

Let ``w`` be the derivative of ``v·g`` (sensitivity.py) by a saved tensor ``r``, and ``u`` that by
the tensors rebuilt from it, pulled back through their steps. The same error of ``r`` then counts
with ``w + u``: its two ways add up as vectors, not as squares. The planner prices pairs, so where
``k`` buffers may be rebuilt of ``r``, what is between two of them is bounded:
``|Σu|² ≤ k·Σ|u|²``.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
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
    readers: Counter[fx.Node] = Counter()
    tasks: list[tuple[list[Candidate], list[fx.Node]]] = []
    for views in buffers.values():
        recipes = [c.recipe for c in views if c.recipe is not None]
        if sum(r.share for r in recipes) < 1 - 1e-6:  # another view of it passes no noise
            continue
        roots = [n for n in dict.fromkeys(n for r in recipes for n in r.roots) if n in roots_of]
        readers.update(roots)
        tasks.append((views, roots))
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for views, roots in tasks:
        try:
            pulled = [_pulled_back(module, views, roots, each, known) for each in derivatives]
        except (RuntimeError, NotImplementedError) as error:
            log.info(
                "what is rebuilt of coded tensors as %s is not priced: %s", views[0].name, error
            )
            continue
        for i, root in enumerate(roots):
            candidate = roots_of[root]
            extra = direct = 0.0
            for each, ways in zip(derivatives, pulled, strict=True):
                own = as_coded(candidate, each[candidate.name])
                other = as_coded(candidate, ways[i])
                alone, through, both = (
                    codec(REFERENCE).effect(coded[candidate], w)[0]
                    for w in (own, other, own + other)
                )
                extra += readers[root] * through + max(both - alone - through, 0.0)
                direct += alone
            if direct > 0:
                found[candidate.name][views[0].name] = extra / direct
    return dict(found)


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
