"""Perturb: sensitivity by trial, for tensors that no derivative tells about.

Where an operator of the backward has no derivative and no stand-in (evaluate.py), the double
backward (sensitivity.py) does not see what errors do that pass through it. The saved tensors that
lead there are disturbed one by one, by a few random vectors, and the backward is run again: as GACT
(arXiv 2206.11357) does for all tensors. One number comes of it, a mean over the tensor's elements.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, fx

from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate

log = logging.getLogger("fxcompress")

VECTORS = 2  # a tensor
SIZE = 0.02  # of a disturbance, of what is coded's root mean square
MOST = 32  # tensors, the largest first: a backward pass for each vector

# The gradients that come out when the tensor's values, as coded, are off by this.
Trial = Callable[[Candidate, Tensor], Sequence[Tensor]]


def leads_to(node: fx.Node, operators: Collection[str]) -> bool:
    """An error of the node's value can pass through one of these operators (by schema name)."""
    pending, seen = [node], {node}
    while pending:
        for reader in pending.pop().users:
            if reader in seen or prop.is_integer(reader):
                continue
            target = reader.target
            if isinstance(target, torch._ops.OpOverload) and target._schema.name in operators:
                return True
            seen.add(reader)
            pending.append(reader)
    return False


def mean_derivatives(
    values: dict[Candidate, Tensor],
    exact: Sequence[Tensor],
    scales: Sequence[float],
    trial: Trial,
    generator: torch.Generator,
) -> dict[Candidate, float]:
    """Root mean squares of the derivatives by elements of these tensors, as coded.

    Args:
        values: what is coded of each.
        exact: the undisturbed gradients.
        scales: what each parameter's error is multiplied by.
        trial: see `Trial`.
    """
    largest = sorted(values, key=lambda c: -c.own_bytes)
    for candidate in largest[MOST:]:
        log.info("%s is not priced: too many tensors without derivative", candidate.name)
    found = {}
    for candidate in largest[:MOST]:
        value = values[candidate]
        size = SIZE * float(value.float().square().mean().sqrt())
        changed = disturbed = 0.0
        for _ in range(VECTORS):
            signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8) * 2 - 1
            error = signs.to(value.device, value.dtype) * size
            gradients = zip(trial(candidate, error), exact, scales, strict=True)
            changed += sum(float((g - e).float().square().sum()) * s**2 for g, e, s in gradients)
            disturbed += float(error.float().square().sum())
        found[candidate] = (changed / disturbed) ** 0.5 if disturbed else 0.0
        log.info("%s: sensitivity by %d backward passes", candidate.name, VECTORS)
    return found
