"""`fxcompress viz`: a plan as a drawing, a page, or data for other viewers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import graphviz
from rich.console import Console

from fxcompress.calibrate import evidence_of
from fxcompress.errors import FxCompressError
from fxcompress.pareto import Point, pareto
from fxcompress.plan import Plan
from fxcompress.record import Recording
from fxcompress.tools import plan_command, viz_export, viz_graph, viz_html
from fxcompress.tools.models import Task
from fxcompress.tools.values import histograms

EXAMPLES = """\
examples:
  fxcompress viz gpt:small --batch 16 --size 256 --budget-mb 100 -o gpt.html
  fxcompress viz torchvision:resnet18 --ratio-saved 8 --values --points 12 --measure -o resnet.html
  fxcompress viz plan.json -o plan.svg --depth 2
  fxcompress viz plan.json -o plan.dot
  fxcompress viz plan.json -o plan.graph.json  # a graph for Google's Model Explorer
  fxcompress viz plan.json -o plan.bits.json   # and the node data that colours it
  fxcompress viz plan.json -o plan.trace.json  # live bytes over the step, for ui.perfetto.dev
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress viz`."""
    plan_command.add_source_arguments(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"its ending says what is made: {', '.join(WRITERS)}",
    )
    parser.add_argument(
        "--depth", type=int, help="levels of modules shown at first (default: what is readable)"
    )
    parser.add_argument(
        "--values",
        action="store_true",
        help="for a MODEL's .html: histograms of each tensor's values and quantization error",
    )
    parser.add_argument(
        "--points",
        type=int,
        metavar="N",
        help="for a MODEL's .html: N plans of the Pareto curve for the slider to go through, not\n"
        "an estimate from the alternatives of one plan",
    )


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    endings = [ending for ending in WRITERS if args.output.name.endswith(ending)]
    if not endings:
        raise FxCompressError(
            f"{args.output}: the ending must be one of {', '.join(WRITERS)}, it says what is made"
        )
    if args.depth is not None and args.depth < 1:
        raise FxCompressError(f"--depth {args.depth} must be 1 or more")
    wants_model = [f"--{n}" for n in ("values", "points") if getattr(args, n)]
    if wants_model and (endings[0] != ".html" or args.source.endswith(".json")):
        raise FxCompressError(f"{wants_model[0]} needs a MODEL, to run it, and -o FILE.html")
    plan, title = plan_command.plan_of(args), Path(args.source).name
    if wants_model:
        task = plan_command.task_of(args.source, args.batch, args.size, args.seed)
        recordings = plan_command.recorded(task)
        shown = histograms(plan, recordings) if args.values else None
        points = _points(task, recordings, args.points) if args.points else []
        text = viz_html.page(plan, title, args.depth, shown, points)
    else:
        text = WRITERS[endings[0]](plan, title, args.depth)
    plan_command.save(args.output, text)
    return 0


def _points(task: Task, recordings: Sequence[Recording], count: int) -> list[Point]:
    """The Pareto curve on the batch that was recorded."""
    batch: Any = dict(task.keywords) or task.inputs
    with Console(stderr=True).status("planning the curve"):
        return pareto(task.model, batch, points=count, calibration=evidence_of(recordings))


def svg(plan: Plan, title: str, depth: int | None) -> str:
    """The graph drawn by Graphviz.

    Raises:
        FxCompressError: its `dot` program is missing.
    """
    try:
        return viz_graph.dot(plan, depth).pipe(format="svg", encoding="utf-8")
    except graphviz.ExecutableNotFound:
        raise FxCompressError(
            "an SVG is drawn by Graphviz, whose program `dot` is not installed: apt install "
            "graphviz (brew, conda: the same name), or write a .html instead, which needs nothing"
        ) from None


WRITERS: dict[str, Callable[[Plan, str, int | None], str]] = {
    ".html": viz_html.page,
    ".svg": svg,
    ".dot": lambda plan, title, depth: viz_graph.dot(plan, depth).source,
    ".graph.json": lambda plan, title, depth: viz_export.explorer_graph(plan, title),
    ".bits.json": lambda plan, title, depth: viz_export.explorer_bits(plan),
    ".trace.json": lambda plan, title, depth: viz_export.perfetto(plan),
}
