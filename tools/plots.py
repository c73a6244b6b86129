"""Plots of benchmark results, by matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from fxcompress.errors import FxCompressError

if TYPE_CHECKING:
    from fxcompress.tools.bench_accuracy import Run
    from fxcompress.tools.bench_codecs import Row as RateRow
    from fxcompress.tools.pareto_command import Row as ParetoRow
    from fxcompress.tools.study import Row as StudyRow

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


def rate_distortion(rows: Sequence[RateRow], path: Path) -> None:
    """Error against rate of every codec, a panel a source, beside the bound."""
    plt = pyplot()
    sources = list(dict.fromkeys(row.source for row in rows))
    columns = min(3, len(sources))
    lines = -(-len(sources) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 4.5 * lines), squeeze=False)
    for panel, source in zip(axes.flat, sources, strict=False):
        families: dict[str, list[RateRow]] = {}
        for row in (r for r in rows if r.source == source):
            family = re.sub(r"(bits|rate|beta|levels)=[\d.]+,?|\s[\d.]+$", "", row.codec)
            families.setdefault(family.replace("(,", "(").replace("()", ""), []).append(row)
        for family, found in families.items():
            found = sorted(found, key=lambda r: r.rate)
            panel.plot([r.rate for r in found], [r.error for r in found], marker="o", label=family)
        rates = [0.1 * i for i in range(1, 85)]
        panel.plot(rates, [2 ** (-2 * r) for r in rates], "k--", label="bound, white normal")
        panel.set(yscale="log", xlabel="bits an element", ylabel="error / variance", title=source)
        panel.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def study(rows: Sequence[StudyRow], path: Path, title: str) -> None:
    """Predicted and measured gradient error of each tensor or module, as bars."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
    at = range(len(rows))
    measured, spread = [r.measured for r in rows], [r.spread for r in rows]
    axes.barh([y - 0.2 for y in at], measured, 0.4, xerr=spread, label="measured", color="#2f6fb5")
    predicted = [r.predicted or 0.0 for r in rows]
    axes.barh([y + 0.2 for y in at], predicted, 0.4, label="predicted", color="#e8b93c")
    names = [f"{r.name}  {r.module}" if r.module else r.name for r in rows]
    axes.set_yticks(list(at), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("squared relative error of the parameter gradient")
    axes.set_title(title, fontsize=8, wrap=True)
    axes.legend()
    _save(plt, figure, path)


def pareto(rows: Sequence[ParetoRow], path: Path, title: str) -> None:
    """Predicted gradient error against the planned peak: auto's curve, other policies as points."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    curve = [r for r in rows if r.policy == "auto" and r.variance > 0]
    at, errors = [r.peak_mb for r in curve], [r.variance for r in curve]
    axes.plot(at, errors, marker="o", label="auto")
    exact: dict[float, list[str]] = {}  # they have no place on a logarithmic axis: lines
    for row in (r for r in rows if r.policy != "auto"):
        if row.variance > 0:
            axes.plot(row.peak_mb, row.variance, "s", color="#b3521f", markersize=4)
            axes.annotate(f"  {row.policy}", (row.peak_mb, row.variance), fontsize=7, va="center")
        else:
            exact.setdefault(round(row.peak_mb, 1), []).append(row.policy)
    for peak, names in exact.items():
        label = f"exact: {', '.join(names)}"
        axes.axvline(peak, color="#9aa0a6", linestyle="--", linewidth=1, label=label)
    axes.set(yscale="log", xlabel="planned peak, MB", title=title)
    axes.set_ylabel("predicted squared error of the gradient")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise FxCompressError(f"cannot write the plot {path}: {error}") from None
    plt.close(figure)
