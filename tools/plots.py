"""Plots of benchmark results, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from fxcompress.errors import FxCompressError

if TYPE_CHECKING:
    from fxcompress.tools.bench_accuracy import Run

_EVERY = 25  # steps that a point of a curve averages over


def pyplot() -> Any:
    """matplotlib.pyplot without a display.

    Raises:
        FxCompressError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise FxCompressError("plots need matplotlib: pip install 'fxcompress[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def accuracy(runs: Sequence[Run], names: Sequence[str], path: Path, title: str) -> None:
    """Held-out loss against saved bytes, and training curves (means over seeds)."""
    from fxcompress.tools.bench_accuracy import standard_error

    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for name in names:
        own = [r for r in runs if r.policy == name]
        if not own:
            continue
        losses = [r.validation_loss for r in own]
        share = mean(r.saved_mb for r in own) / mean(r.plain_saved_mb for r in own)
        left.errorbar(
            share, mean(losses), yerr=standard_error(losses), fmt="o", capsize=3, label=name
        )
        curve = [mean(step) for step in zip(*(r.losses for r in own), strict=True)]
        points = [mean(curve[i : i + _EVERY]) for i in range(0, len(curve), _EVERY)]
        right.plot([i * _EVERY for i in range(len(points))], points, label=name)
    left.set(xscale="log", xlabel="saved bytes over plain Inductor's", ylabel="held-out loss")
    right.set(xlabel="step", ylabel="training loss")
    left.set_title(title)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
