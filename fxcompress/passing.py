"""Passing: what noise in a saved tensor does through others that are rebuilt from it.

Let ``w`` be the derivative of ``v·g`` (sensitivity.py) by a saved tensor ``r``, and ``uᵢ`` that by
each buffer rebuilt from it, pulled back through its steps. The same error of ``r`` then counts with
``w + Σuᵢ``: its ways add up as vectors, not as squares. The planner prices pairs of a root and a
buffer and may take any of the buffers, so what is between two ways counts where it adds and not
where it takes away: ``|w + Σu|² ≤ |w|² + Σᵢ(|uᵢ|² + 2(w·uᵢ)₊ + Σⱼ(uᵢ·uⱼ)₊)``, whichever they are.
(What holds of any ``k`` ways, ``k·Σ|u|²``, made the residual stream of a ViT four times too dear.)
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
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
) -> tuple[dict[str, dict[str, float]], dict[str, tuple[Tensor, ...]]]:
    """(shares, readings) by name of the root. Shares are by first tensor of a buffer that is
    rebuilt of it: the squared error of the gradient that noise in the root adds through these, over
    what it adds by itself, measured under `REFERENCE`. Readings are, for each probe, the derivative
    by the root, as it is coded, through all these buffers together: from them follows what codecs
    do whose errors are spread otherwise (fit.transform_prices).

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
    shares, readings = {}, {}
    for candidate, values in coded.items():
        name = candidate.name
        if name in ways:
            own = [as_coded(candidate, each[name]) for each in derivatives]
            shares[name] = _shares(values, own, ways[name])
            each_probe = zip(*ways[name].values(), strict=True)
            readings[name] = tuple(reduce(torch.add, through) for through in each_probe)
    return shares, readings


def _shares(
    values: Tensor, own: Sequence[Tensor], ways: Mapping[str, Sequence[Tensor]]
) -> dict[str, float]:
    """By buffer, what it adds to the square of the root's own; see the module docstring.

    Args:
        values: of the root, as it is coded.
        own: derivatives by it, one a probe.
        ways: the same through each buffer.
    """
    spread = codec(REFERENCE).error(values).variance.sqrt().flatten()
    spread = torch.where(spread.isfinite(), spread, 0.0)
    products = torch.zeros(len(ways) + 1, len(ways) + 1, dtype=torch.float64)
    for each in zip(own, *ways.values(), strict=True):
        rows = torch.stack([weights.flatten().float() * spread for weights in each])
        products += (rows @ rows.mT).double().cpu()
    direct = float(products[0, 0])
    if direct <= 0:
        return {}
    adding = products.clamp(min=0)
    shares = (adding.sum(1) + adding[:, 0])[1:] / direct
    return dict(zip(ways, shares.tolist(), strict=True))


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
    given = (derivatives[c.name].to(y.dtype) for c, y in zip(views, pulled[0], strict=True))
    found: tuple[Tensor, ...] = pulled[1](tuple(given))
    return tuple(each.detach() for each in found)
