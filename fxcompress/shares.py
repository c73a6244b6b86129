"""Shares: what the graphs of one model were given together, kept for later processes.

Graphs that share a budget are planned twice in the process that first sees them: one by one as they
come, together when all are known (fxcompress/whole.py). What came of it is kept beside Inductor's
cache under the name of each, so that later each is compiled but once, and is found in that cache.
A graph may come back among others than it was planned with: then all are planned anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fxcompress import files, report, schema, torch_private
from fxcompress.evidence import Calibration
from fxcompress.planner import Given

LARGEST = 1 << 24  # bytes; a hundred for each saved tensor


@dataclass(frozen=True)
class Share:
    """Of one graph.

    Attributes:
        given: to it.
        graphs: names of all that were planned together.
        is_calibrated: by measurements, kept under its name.
    """

    given: Given
    graphs: tuple[str, ...]
    is_calibrated: bool


def remember(graphs: Mapping[str, tuple[Given, Calibration | None]]) -> None:
    """Keep what each graph was given, and the measurements that it was planned by.

    Args:
        graphs: all that were planned together, by name (:func:`fxcompress.report.graph_key`).
    """
    for name, (given, calibration) in graphs.items():
        if calibration is not None:
            report.remember_calibration(f"share-{name}", calibration)
        share = Share(given, tuple(graphs), calibration is not None)
        files.keep(_path(name), json.dumps(asdict(share)))


def recall(name: str) -> tuple[Share, Calibration | None] | None:
    """The share of a graph, and the measurements behind it; None if there is none."""
    try:
        share = schema.build(Share, files.read_json(_path(name), LARGEST))
    except (OSError, ValueError):
        return None
    if not share.is_calibrated:
        return share, None
    calibration = report.recall_calibration(f"share-{name}")
    return None if calibration is None else (share, calibration)


def forget(share: Share) -> None:
    """Its graphs are to be planned together anew, by the next process that sees them."""
    for name in share.graphs:
        _path(name).unlink(missing_ok=True)


def _path(name: str) -> Path:
    return torch_private.cache_dir() / "fxcompress" / f"share-{name}.json"
