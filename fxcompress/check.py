"""Check: gradients of a compressed model beside plain Inductor's, over several seeds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress import rng
from fxcompress.backend import Backend, backend
from fxcompress.calibrate import call, sum_of_squares
from fxcompress.errors import FxCompressError


@dataclass(frozen=True)
class Check:
    """Errors of the whole parameter gradient, relative to the norm of the exact one.

    Attributes:
        noise: root mean square of the error of one step, over the seeds.
        bias: the part of it that does not average out, corrected for chance: what the mean over
            the seeds is off by, less the noise that such a mean still has; 0 where chance alone
            explains it.
        outputs_equal: the forward gave the same loss, bit for bit, at every seed.
        seeds: how many.
    """

    noise: float
    bias: float
    outputs_equal: bool
    seeds: int

    def __str__(self) -> str:
        forward = "unchanged" if self.outputs_equal else "CHANGED"
        return (
            f"gradient noise {self.noise:.2e}, bias {self.bias:.2e} of its norm over {self.seeds} "
            f"seeds; forward {forward}"
        )


def check(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    with_backend: Backend | None = None,
    seeds: int = 4,
) -> Check:
    """Compare gradients under compression with plain Inductor's.

    The model is left as it was: copies are compiled and run. Dropout and other randomness of the
    model are the same on both sides.

    Args:
        model: uncompiled module in training mode.
        batch: a tensor, or the tuple of positional (or dict of keyword) arguments of the model.
        loss: scalar from the model's output; default: the sum of squares of its float tensors.
        with_backend: default ``fxcompress.backend()``.
        seeds: random streams to average over, 2 or more.

    Raises:
        FxCompressError: fewer than 2 seeds, or a model without trainable parameters.
    """
    if seeds < 2:
        raise FxCompressError(f"seeds={seeds}: bias and noise need 2 seeds or more")
    if not any(p.requires_grad for p in model.parameters()):
        raise FxCompressError("the model has no parameter that requires a gradient")
    loss = loss or sum_of_squares
    chosen = with_backend or backend()
    inner = "inductor" if chosen.settings.inner == "inductor" else None
    plain_backend: Any = inner or backend(policy="inductor", inner=chosen.settings.inner)
    plain = torch.compile(copy.deepcopy(model), backend=plain_backend)
    ours = torch.compile(copy.deepcopy(model), backend=chosen)
    state = {k: v.clone() for k, v in model.state_dict().items()}

    exact, errors, equal = 0.0, [], True
    noise_state = rng.get_state()
    with torch.random.fork_rng():
        for seed in range(seeds):
            expected_loss, expected = _gradient(plain, state, batch, loss, seed)
            found_loss, found = _gradient(ours, state, batch, loss, seed)
            equal = equal and torch.equal(expected_loss, found_loss)
            exact += float(expected.square().sum()) / seeds
            errors.append(found - expected)
    rng.set_state(noise_state)
    noise = sum(float(e.square().sum()) for e in errors) / seeds
    mean = float((sum(errors[1:], errors[0]) / seeds).square().sum())
    # E|mean|² = bias² + variance/n, and E|error|² = bias² + variance.
    bias = max((mean - noise / seeds) / (1 - 1 / seeds), 0.0)
    return Check(math.sqrt(noise / exact), math.sqrt(bias / exact), equal, seeds)


def _gradient(
    compiled: Any,
    state: dict[str, Tensor],
    batch: Any,
    loss: Callable[[Any], Tensor],
    seed: int,
) -> tuple[Tensor, Tensor]:
    compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in state.items()})
    compiled.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    rng.manual_seed(seed)
    value = loss(call(compiled, batch))
    value.backward()
    parts = [p.grad.flatten().double() for p in compiled.parameters() if p.grad is not None]
    return value.detach(), torch.cat(parts)
