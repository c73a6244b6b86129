"""Plots of benchmark results, by matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from fxcompress.codecs import codec, codec_names
from fxcompress.errors import FxCompressError

if TYPE_CHECKING:
    from fxcompress.tools.bench_accuracy import Run
    from fxcompress.tools.bench_codecs import Row as RateRow
    from fxcompress.tools.pareto_command import Row as ParetoRow
    from fxcompress.tools.study import Row as StudyRow

_EVERY = 25  # steps that a point of a curve averages over
_MARKERS = "osv^D"


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
    """Against bits, held-out loss above the first policy's and accuracy; training curves beside.

    A line joins policies that differ in bits only, dashed where their codec is biased; means over
    seeds with standard errors.
    """
    plt = pyplot()
    base = {r.seed: r.validation_loss for r in runs if r.policy == names[0]}
    runs = [r for r in runs if r.seed in base]

    def gap(run: Run) -> float:
        return run.validation_loss - base[run.seed]

    def right(run: Run) -> float | None:
        return run.accuracy

    measures: dict[str, Callable[[Run], Any]] = {f"held-out loss above {names[0]}'s": gap}
    if all(r.accuracy is not None for r in runs):
        measures["held-out accuracy"] = right
    columns = len(measures) + 1
    figure, axes = plt.subplots(1, columns, figsize=(6.5 * columns, 6), layout="constrained")
    families: dict[str, list[str]] = {}
    for name in names:
        if any(r.policy == name for r in runs):
            families.setdefault(_family(name), []).append(name)
    for panel, (what, measure) in zip(axes, measures.items(), strict=False):
        for i, (family, members) in enumerate(families.items()):
            points = sorted(_point(runs, name, measure) for name in members)
            at, values, errors = zip(*points, strict=True)
            line = "--" if _is_biased(members[0]) else "-"
            style = {"marker": _MARKERS[i // 10 % len(_MARKERS)], "capsize": 3, "linestyle": line}
            panel.errorbar(at, values, yerr=errors, label=family, color=f"C{i % 10}", **style)
        if measure is gap:  # some diverge, some are within chance of nothing
            panel.set_yscale("symlog", linthresh=0.01)
        panel.set(xscale="log", xlabel="bits for each float32 that plain Inductor saves")
        panel.set(ylabel=what, title=title)
    for name in names:
        own = [r.losses for r in runs if r.policy == name]
        curve = [mean(step) for step in zip(*own, strict=True)]
        means = [mean(curve[i : i + _EVERY]) for i in range(0, len(curve), _EVERY)]
        axes[-1].plot([i * _EVERY for i in range(len(means))], means, label=name, linewidth=1)
    axes[-1].set(xlabel="step", ylabel="training loss", title=f"means of {_EVERY} steps")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=6)
    _save(plt, figure, path)


def _point(
    runs: Sequence[Run], name: str, measure: Callable[[Run], Any]
) -> tuple[float, float, float]:
    """(bits for each saved float32, mean over seeds, its standard error) of a policy."""
    from fxcompress.tools.bench_accuracy import standard_error

    own = [r for r in runs if r.policy == name]
    share = mean(r.saved_mb for r in own) / mean(r.plain_saved_mb for r in own)
    values = [measure(r) for r in own]
    return 32 * share, mean(values), standard_error(values) or 0.0


def _family(name: str) -> str:
    """The policy without its bits: ``rotate2`` and ``rotate4`` are one family, ``aq-1.0`` its own.

    >>> [_family(n) for n in ("rotate2", "auto@12", "rotate(bits=2,scale=lsq)", "aq-1.0")]
    ['rotate', 'auto', 'rotate(scale=lsq)', 'aq-1.0']
    """
    bare = re.sub(r"(bits|rate|beta|levels)=[\d.]+,?", "", name.partition("@")[0])
    return re.sub(r"^([a-z]+)[\d.]+$", r"\1", bare.replace(",)", ")").replace("()", ""))


def _is_biased(name: str) -> bool:
    if "unbiased=False" in name:
        return True
    return name.partition("(")[0] in codec_names() and not codec(name).unbiased


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
