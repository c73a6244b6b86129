"""`fxcompress study`: each saved tensor, or each module, alone at few bits: its gradient error.

The layer-wise study: all else is exact, so an error is one tensor's own. Measured over noise
streams, and beside it what one double backward predicts (fxcompress/sensitivity.py); the last row
has all of them coded together, where the predictions add up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fxcompress import rng
from fxcompress.choose import bytes_of, codable_choice, is_codable
from fxcompress.codecs import codec
from fxcompress.errors import SettingsError
from fxcompress.passes.analyse import Candidate, analyse
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, Choice, rewrite
from fxcompress.provenance import module_path
from fxcompress.record import Recording, gradients
from fxcompress.sensitivity import Measured, price, sensitivity
from fxcompress.tools import models, output, plots
from fxcompress.tools.feed import feed, recorded, train
from fxcompress.tools.harness import machine

EXAMPLES = """\
examples:
  fxcompress study gpt:small --batch 4 --bits 4
  fxcompress study torchvision:resnet18 --bits 2 --by module --depth 2 -o study.png
  fxcompress study gpt:small --codec 'rotate(bits=2)' --format csv > study.csv
"""

MIN_BYTES = 16384
ALL = "all together"


@dataclass(frozen=True)
class Row:
    """One tensor or module coded alone. Errors are squared, relative to the gradient's square.

    Attributes:
        name: of the tensor or module.
        tensors: how many are coded.
        bytes_before, bytes_after: of these tensors, masks apart.
        predicted: variance and squared bias; None where the backward has no derivative.
        measured: mean over the noise streams.
        spread: standard deviation of that mean.
    """

    name: str
    module: str
    tensors: int
    bytes_before: int
    bytes_after: int
    predicted: float | None
    measured: float
    spread: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress study`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--bits", type=int, default=4, help="by affine quantization, groups of 256")
    parser.add_argument("--codec", metavar="SPEC", help="another codec, as 'rotate(bits=2)'")
    parser.add_argument("--by", choices=["tensor", "module"], default="tensor")
    parser.add_argument("--depth", type=int, default=2, help="of the modules, with --by module")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument("--data", type=Path, help="JPEG folders, or a text file for the GPT")
    parser.add_argument("--warm-steps", type=int, default=50, help="AdamW steps beforehand")
    parser.add_argument("--seeds", type=int, default=4, help="noise streams to average over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=output.FORMATS, default="table")
    parser.add_argument("-o", "--output", type=Path, metavar="PLOT", help="bar plot: .png, .svg, …")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and plot with -o."""
    spec = codec(args.codec or f"affine(bits={args.bits})").spec  # refuses a bad one at once
    if args.seeds < 2:
        raise SettingsError("--seeds must be 2 or more: the spread is told by them")
    if args.output is not None:
        plots.pyplot()
    torch.manual_seed(args.seed)
    task = models.load(args.model, args.batch, args.size)
    with Console(stderr=True).status("training"):
        source, data = feed(task, args.data, args.batch, args.size, args.seed)
        train(source, args.warm_steps)
        recordings = recorded(source, MIN_BYTES)
    depth = args.depth if args.by == "module" else None
    rows = study(recordings, spec, depth=depth, seeds=args.seeds)
    title = (
        f"{args.model}, batch {args.batch}, size {args.size}, {data}, {args.warm_steps} steps "
        f"first: each {args.by} alone as {spec}; squared relative error of the gradient over "
        f"{args.seeds} noise streams"
    )
    _write(rows, args.format, title, spec)
    if args.output is not None:
        plots.study(rows, args.output, title)
        Console(stderr=True).print(f"wrote {args.output}", markup=False, style="dim")
    return 0


def study(
    recordings: Sequence[Recording], spec: str, *, depth: int | None = None, seeds: int = 4
) -> list[Row]:
    """Each codable tensor alone under ``spec``, then all of them; the rest is kept.

    Args:
        recordings: of one step.
        depth: take the tensors of each module, so many levels deep, together; None: one by one.
        seeds: noise streams.
    """
    found = [sensitivity(r, is_codable, probes=2, seed=1) for r in recordings]
    priced = {t.candidate.name: t for s in found for t in s.tensors}
    square = sum(s.gradient_square for s in found)
    exact = _flat(recordings, [r.cut for r in recordings])
    groups = dict(_groups(recordings, spec, depth))
    groups[ALL] = [choice for group in groups.values() for choice in group]
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, choices in progress.track(groups.items(), description="coding one by one"):
            errors = _errors(recordings, choices, exact, seeds)
            own = [c.candidate for c in choices]
            module = "" if name == ALL else module_path(own[0].saved.forward)
            rows.append(
                Row(
                    name=name,
                    module=module if depth is None else "",
                    tensors=len(own),
                    bytes_before=sum(c.own_bytes for c in own),
                    bytes_after=sum(bytes_of(c, {}) for c in choices),
                    predicted=_predicted(choices, priced, square),
                    measured=mean(errors),
                    spread=stdev(errors) / len(errors) ** 0.5,
                )
            )
    return rows


def _groups(
    recordings: Sequence[Recording], spec: str, depth: int | None
) -> Iterator[tuple[str, list[Choice]]]:
    """Tensors to code together, by name; those for which coding saves nothing are left out."""
    groups: dict[str, list[Choice]] = {}
    for candidate in (c for r in recordings for c in r.candidates if is_codable(c)):
        choice = codable_choice(candidate, spec)
        if choice.representation != KEEP:
            groups.setdefault(_name(candidate, depth), []).append(choice)
    yield from groups.items()


def _name(candidate: Candidate, depth: int | None) -> str:
    if depth is None:
        return candidate.name
    path = module_path(candidate.saved.forward).split(".")
    return ".".join(path[:depth]) or "(top level)"


def _predicted(
    choices: Sequence[Choice], priced: Mapping[str, Measured], square: float
) -> float | None:
    total = 0.0
    for choice in choices:
        tensor = priced[choice.candidate.name]
        if tensor.weights is None:
            return None
        found = price(tensor, choice.representation, square)
        total += found.variance + found.bias
    return total


def _errors(
    recordings: Sequence[Recording], choices: Sequence[Choice], exact: Tensor, seeds: int
) -> list[float]:
    """Squared relative error of the whole gradient for each noise stream."""
    chosen = {c.candidate.name: c for c in choices}
    cuts = [_rewritten(r, chosen) for r in recordings]
    norm = float(exact.square().sum())
    errors = []
    for seed in range(seeds):
        rng.manual_seed(seed)
        errors.append(float((_flat(recordings, cuts) - exact).square().sum()) / norm)
    return errors


def _rewritten(recording: Recording, chosen: Mapping[str, Choice]) -> Cut:
    """A copy of the recording's graphs with these tensors coded and all others kept."""
    cut = recording.cut.copy()
    own = analyse(cut, MIN_BYTES, channels_last=recording.channels_last)
    choices = [Choice(c, chosen[c.name].representation if c.name in chosen else KEEP) for c in own]
    return rewrite(cut, choices, "", channels_last=recording.channels_last)


def _flat(recordings: Sequence[Recording], cuts: Sequence[Cut]) -> Tensor:
    """The whole parameter gradient, float64."""
    pairs = zip(recordings, cuts, strict=True)
    return torch.cat([g.flatten().double() for r, cut in pairs for g in gradients(r, cut)])


def _write(rows: Sequence[Row], form: str, title: str, spec: str) -> None:
    columns: list[str] = list(asdict(rows[0]))
    cells: list[dict[str, Any]] = [asdict(row) for row in rows]
    if form == "json":
        about = {"title": title, "codec": spec, "machine": machine()}
        output.write_json({**about, "rows": cells}, sys.stdout)
    elif form == "csv":
        output.write_csv(columns, cells, sys.stdout)
    elif form == "md":
        output.write_markdown(columns, cells, sys.stdout)
    else:
        output.write_table(columns, cells, title)
