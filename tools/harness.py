"""Harness: what the benchmarks share: timing in turn, results that outlive an interruption, bars.

A benchmark is a list of parts, each with a name and a value that JSON can hold. With ``--output``
every finished part is written to a file at once; called again with the same arguments, the command
takes it from there. Calls to be compared are timed in turn, round by round, so that a busy machine
is shared fairly; a figure is the median of its rounds, with the least and the most beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fxcompress.errors import FxCompressError, SettingsError
from fxcompress.policies import check_policy


def add_arguments(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """Options of every benchmark."""
    if seed:
        parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="results as JSON, written after each part; parts found there are not redone",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def split_policies(text: str) -> list[str]:
    """Names of policies, apart at commas outside parentheses, each once."""
    found, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return list(dict.fromkeys(name.strip() for name in found if name.strip()))


def settings_of(name: str) -> dict[str, Any]:
    """Settings of the backend for ``policy``, ``policy@R`` (1/R of the saved bytes) or
    ``policy@XMB`` (a budget).

    Raises:
        SettingsError: no such policy, or something else after the @.
    """
    base, at, bound = name.partition("@")
    check_policy(base)
    number = bound.removesuffix("MB")
    try:
        value = float(number) if at else 0.0
    except ValueError:
        raise SettingsError(
            f"{name!r}: write a ratio or a budget after @, as auto@12 or auto@100MB"
        ) from None
    if not at:
        return {"policy": base}
    return {"policy": base, "ratio_saved" if number == bound else "budget_mb": value}


# --- results that outlive an interruption ---------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Parts of a benchmark that are done.

    Attributes:
        path: where they are kept; None: nowhere.
        about: what they depend on: arguments, machine, versions.
    """

    path: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """The value of a part as JSON gives it back: kept by an earlier call, or worked out now.

        Args:
            name: of the part.
            work: what returns it; dataclasses become dictionaries.
            arguments: of ``work``.
        """
        if name not in self.parts:
            found = work(*arguments)
            self.parts[name] = json.loads(json.dumps(found, default=dataclasses.asdict))
            self._write()
        return self.parts[name]

    def _write(self) -> None:
        """Whole or not at all."""
        if self.path is None:
            return
        fresh = self.path.with_name(f"{self.path.name}.part")
        try:
            fresh.write_text(json.dumps({"about": self.about, "parts": self.parts}), "utf-8")
            fresh.replace(self.path)
        except OSError as error:
            raise FxCompressError(f"cannot write {self.path}: {error.strerror}") from None


def results(args: argparse.Namespace, *names: str, **more: Any) -> Results:
    """What an earlier call with the same arguments has kept in ``args.output``.

    Args:
        args: parsed arguments.
        names: of those that the results depend on.
        more: what else they depend on.

    Raises:
        FxCompressError: the file holds something else, or results of other arguments.
    """
    given = {name: getattr(args, name) for name in names}
    own = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    version = importlib.metadata.version("fxcompress")
    about = json.loads(json.dumps({**own, **more, "fxcompress": version, "machine": machine()}))
    path: Path | None = args.output
    if path is None or not path.exists():
        return Results(path, about)
    try:
        kept = json.loads(path.read_text("utf-8"))
        before, parts = dict(kept["about"]), dict(kept["parts"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FxCompressError(f"{path} holds no results of a benchmark: {error}") from None
    if changed := [k for k in {**before, **about} if before.get(k) != about.get(k)]:
        told = "; ".join(f"{k} {before.get(k)!r}, now {about.get(k)!r}" for k in changed)
        raise FxCompressError(f"{path} was made with other arguments ({told}): give another file")
    return Results(path, about, parts)


# --- timing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Of a figure over its rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call, work queued on a GPU included."""
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def interleaved(
    timed: Mapping[str, Callable[[], float]],
    rounds: int,
    warm: int = 1,
    done: Results | None = None,
    bars: Progress | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in every round, the calls of a round one after the other.

    Args:
        timed: what returns the seconds it took, by name (see :func:`seconds`).
        rounds: that count.
        warm: rounds before them, not counted; none where every round is kept already.
        done: where rounds are kept.
        bars: where progress is shown.
    """
    done = done or Results()
    if any(f"round {i}" not in done.parts for i in range(rounds)):
        for _ in range(warm):
            for call in timed.values():
                call()
    numbers = range(rounds)
    shown = numbers if bars is None else bars.track(numbers, description="timing")

    def in_turn() -> dict[str, float]:
        return {name: call() for name, call in timed.items()}

    found = [done.part(f"round {i}", in_turn) for i in shown]
    return {name: [each[name] for each in found] for name in timed}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- what is shown ------------------------------------------------------------------------------


def bars() -> Progress:
    """Progress bars on stderr, for `with`; nothing of them stays."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if "model name" in key), model)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def describe(where: Mapping[str, Any]) -> str:
    """The machine as one line."""
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    return (
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads{gpu}, "
        f"torch {where['torch']}"
    )
