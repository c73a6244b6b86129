"""Artefacts: what became of each compiled graph, for people to read.

With ``FXCOMPRESS_DUMP_DIR=folder`` every graph that is partitioned leaves a folder there, named by
its plan's key: `plan.json`, `plan.txt`, and the forward and backward before and after, as readable
Python. The plan is a ``trace_structured`` artefact as well, so that tlparse shows it beside the
graphs of Dynamo and Inductor. Nothing here can stop a training: what cannot be written is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import fx

from fxcompress import torch_private
from fxcompress.plan import Plan

VARIABLE = "FXCOMPRESS_DUMP_DIR"

log = logging.getLogger("fxcompress")


def show_plan(key: str, plan: Plan) -> None:
    """Leave the plan of one graph in the dump folder, if there is one, and in PyTorch's trace."""
    torch_private.trace_artifact("fxcompress_plan", plan.to_json)
    torch_private.trace_artifact("fxcompress_plan_table", lambda: str(plan))
    if _wanted():
        _write(key, {"plan.json": plan.to_json(), "plan.txt": f"{plan}\n"})


def show_graphs(
    key: str, before: Sequence[fx.GraphModule], after: Sequence[fx.GraphModule] | None
) -> None:
    """Leave (forward, backward) of plain Inductor, and of the plan if it changed them."""
    if not _wanted():
        return
    sides = ("forward", "backward")
    texts = {f"before_{side}.py": _text(g) for side, g in zip(sides, before, strict=True)}
    for side, graph in zip(sides, after or (), strict=False):
        texts[f"after_{side}.py"] = _text(graph)
    _write(key, texts)


def _wanted() -> bool:
    return bool(os.environ.get(VARIABLE))


def _text(graph: fx.GraphModule) -> str:
    return graph.print_readable(print_output=False)


def _write(key: str, texts: Mapping[str, str]) -> None:
    folder = Path(os.environ[VARIABLE]) / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            folder.joinpath(name).write_text(text, encoding="utf-8")
    except OSError as error:
        log.warning("%s: cannot write to %s: %s", VARIABLE, folder, error.strerror)
