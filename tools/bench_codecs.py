"""`fxcompress bench codecs`: error of every codec at its true rate, beside the theoretical bound.

Error is the mean square of decoded − x over the variance of x, the rate all payload bits over the
elements: scales and means are counted. No quantizer of a normal source has less error than
2^(−2·rate); correlated tensors have a bound of their own, below that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.choose import is_codable
from fxcompress.codecs import Codec, codec
from fxcompress.fit import at_rate, fit
from fxcompress.sensitivity import sensitivity
from fxcompress.tools import beyond, harness, models, output
from fxcompress.tools.bench_noise import MIN_BYTES
from fxcompress.tools.feed import feed, recorded, train
from fxcompress.tools.structure import structure

SPECS = (
    *(f"affine(bits={b})" for b in (1, 2, 3, 4, 6, 8)),
    *(f"affine(bits={b},rounding=nearest)" for b in (1, 2, 3, 4)),
    *(f"dither(bits={b})" for b in (1, 2, 3, 4, 6, 8)),
    *(f"rotate(bits={b})" for b in (1, 2, 3, 4, 5)),
    *(f"rotate(bits={b},scale=lsq)" for b in (1, 2, 3, 4, 5)),
    *(f"subsample(rate={r})" for r in (0.5, 0.25, 0.125)),
    *(f"average(beta={b})" for b in (1.0, 0.5, 0.25)),
    "frequency(block=8,bits=2)",
    "magnitude(levels=4)",
    "cast(format=e4m3)",
    "cast(format=e5m2)",
)
RATES = (4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.25)  # of transform codecs, on real tensors
DRAWS = 8
ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Row:
    """One codec on one source; `bias` is the squared bias over the signal's variance."""

    source: str
    codec: str
    rate: float
    error: float
    bias: float
    bound: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench codecs`."""
    parser.add_argument(
        "--model", action="append", default=[], help="saved tensors of this, too:\n" + models.SPECS
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument("--data", type=Path, help="JPEG folders, or a text file for a GPT")
    parser.add_argument("--warm-steps", type=int, default=100, help="AdamW steps beforehand")
    parser.add_argument("--tensors", type=int, default=3, help="the largest of each model")
    parser.add_argument(
        "--beyond",
        action="store_true",
        help="what we do not ship, for comparison: quantizers, and other models of saved tensors",
    )
    parser.add_argument("--plot", type=Path, help="all codecs against the bound")
    harness.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and with --json one line of JSON."""
    done = harness.results(args, "batch", "size", "data", "warm_steps", "tensors", "seed")
    works: dict[str, Callable[[], Tables]] = {
        "synthetic": partial(_synthetic, args.seed),
        **{name: partial(_real, args, name) for name in args.model},
    }
    rows: list[Row] = []
    masks: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    with harness.bars() as bars:
        for name, work in bars.track(works.items(), description="sources"):
            found, of_masks, of_shapes = done.part(name, work)
            rows += [Row(**each) for each in found]
            masks += of_masks
            shapes += of_shapes
        others = done.part("beyond", beyond.quantizers) if args.beyond else []
    for source in dict.fromkeys(row.source for row in rows):
        shown = sorted((r for r in rows if r.source == source), key=lambda r: -r.rate)
        columns = ["codec", "rate", "error", "bias", "bound"]
        output.write_table(columns, [asdict(r) for r in shown], source)
    for title, table in (
        ("masks given the decoded tensor", masks),
        ("beyond: quantizers of a normal", others),
        ("beyond: models of saved tensors, coded ideally", shapes),
    ):
        if table:
            output.write_table(list(table[0]), table, title)
    print(harness.describe(harness.machine()))
    if args.plot:
        from fxcompress.tools.plots import rate_distortion

        rate_distortion(rows, args.plot)
    if args.json:
        tables = {"codecs": [asdict(r) for r in rows], "masks": masks, "beyond": others}
        tables["structure"] = shapes
        print(json.dumps({**tables, "seed": args.seed, "machine": harness.machine()}))
    return 0


# Of codecs, of masks, and of other models of tensors.
Tables = tuple[list[Row], list[dict[str, Any]], list[dict[str, Any]]]


def _synthetic(seed: int) -> Tables:
    torch.manual_seed(seed)
    return [row for name, x in synthetic().items() for row in measure(name, x, SPECS)], [], []


def _real(args: argparse.Namespace, name: str) -> Tables:
    torch.manual_seed(args.seed)
    rows: list[Row] = []
    masks: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for saved in _saved(args, name):
        label, first, second, axis = saved.label, saved.first, saved.second, saved.channels
        rows += measure(label, second, SPECS)
        fitted = fit(first, [torch.randn_like(first)], axis)
        for rate in RATES:
            for unbiased in (True, False):
                found = at_rate(fitted, rate, unbiased=unbiased)
                kind = "transform" if unbiased else "transform, bands dropped"
                rows.append(_row(label, f"{kind} {rate:g}", found, second))
        masks += beyond.masks(label, second, [at_rate(fitted, r) for r in RATES])
        if args.beyond:
            shapes += structure(label, first, second, axis, saved.before)
    return rows, masks, shapes


def synthetic() -> dict[str, Tensor]:
    """Independent samples of three sources."""
    normal = torch.randn(ELEMENTS)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((ELEMENTS,))
    return {"normal": normal, "Laplace": laplace, "ReLU of normal": torch.randn(ELEMENTS).relu()}


def measure(source: str, x: Tensor, specs: Sequence[str]) -> list[Row]:
    """A row for each codec on x."""
    return [_row(source, spec, codec(spec), x) for spec in specs]


def _row(source: str, name: str, found: Codec, x: Tensor) -> Row:
    total, square = torch.zeros(x.shape, dtype=torch.float64), 0.0
    for draw in range(DRAWS):
        key = torch.tensor([0x1234567890ABCDEF, draw])
        payload = found.encode(x, key, 1)
        error = found.decode(payload, x.shape, x.dtype, key, 1).double() - x.double()
        total += error
        square += float(error.square().mean()) / DRAWS
    variance = float(x.double().var(correction=0))
    rate = 8 * payload.numel() / x.numel()
    mean = float((total / DRAWS).square().mean())
    bias = max((mean - square / DRAWS) / (1 - 1 / DRAWS), 0.0)  # without what chance gives
    return Row(source, name, rate, square / variance, bias / variance, 2 ** (-2 * rate))


@dataclass(frozen=True)
class Saved:
    """A saved tensor on two batches, and the one before it that has as many positions."""

    label: str
    first: Tensor
    second: Tensor
    channels: int
    before: tuple[Tensor, Tensor, int] | None


def _saved(args: argparse.Namespace, name: str) -> list[Saved]:
    """The largest saved tensors of a model."""
    task = models.load(name, args.batch, args.size)
    source, _ = feed(task, args.data, args.batch, args.size, args.seed)
    train(source, args.warm_steps)
    both = [recorded(source, MIN_BYTES)[0] for _ in range(2)]
    first, second = (sensitivity(r, is_codable).tensors for r in both)
    largest = sorted(range(len(first)), key=lambda i: -first[i].values.numel())[: args.tensors]

    def positions(i: int) -> int:
        values = first[i].values
        return values.numel() // values.shape[first[i].candidate.channels]

    def before(i: int) -> tuple[Tensor, Tensor, int] | None:
        alike = [j for j in range(i) if positions(j) == positions(i)]
        if not alike:
            return None
        j = alike[-1]
        return first[j].values, second[j].values, first[j].candidate.channels

    return [
        Saved(
            f"{name} {first[i].candidate.name} {'×'.join(map(str, first[i].values.shape))}",
            first[i].values,
            second[i].values,
            first[i].candidate.channels,
            before(i),
        )
        for i in sorted(largest)
    ]
