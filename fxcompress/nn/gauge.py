"""How well an auxiliary stands in for the input it replaces."""

from __future__ import annotations

from torch import Tensor


def learning_indicator(x: Tensor, auxiliary: Tensor) -> Tensor:
    """1 − |x − a|²/|x|² of each sample: 1 is backpropagation, below 0 is worse than no update.

    For :class:`LinearASA`, ``a = ε·sign(x)`` and x the input with that added.

    Args:
        x: (samples, …), the layer's true input.
        auxiliary: of the same shape, what its weight gradient reads.

    Returns: float (samples,).
    """
    of_sample = tuple(range(1, x.dim()))
    error = (x - auxiliary).square().sum(of_sample)
    return 1 - error / x.square().sum(of_sample)
