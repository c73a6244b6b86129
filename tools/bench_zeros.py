"""`fxcompress bench zeros`: what exact zeros in the saved tensors would save, losslessly or not.

For each float saved tensor of a real step, bytes as fp32; as a bitmap of the nonzero places with
the nonzero values in fp32 (lossless); at 4 bits; and at 4 bits for the nonzero ones only, with the
bitmap paid for, or free where the backward reads a mask of the same tensor anyway.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fxcompress.choose import is_codable
from fxcompress.codecs import codec
from fxcompress.passes.capture import output_args
from fxcompress.record import Recording, run_forward
from fxcompress.tools import models
from fxcompress.tools.feed import feed, recorded, train

MB = 1e6
MIN_BYTES = 16384
FOUR_BITS = codec("affine(bits=4)")


@dataclass(frozen=True)
class Row:
    """One saved tensor; sizes in MB. `has_mask`: the backward compares it with something."""

    name: str
    zeros: float
    has_mask: bool
    fp32_mb: float
    lossless_mb: float
    plain_4_bits_mb: float
    sparse_4_bits_mb: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench zeros`."""
    parser.add_argument("model", help=models.SPECS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="image side, or sequence length")
    parser.add_argument("--data", type=Path, help="JPEG folders, or a text file for the GPT")
    parser.add_argument("--warm-steps", type=int, default=200, help="AdamW steps beforehand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Train, record a step, print the table and, with --json, one line of JSON."""
    torch.manual_seed(args.seed)
    task = models.load(args.model, args.batch, args.size)
    source, data = feed(task, args.data, args.batch, args.size, args.seed)
    loss = train(source, args.warm_steps)
    rows = [row for recording in recorded(source, MIN_BYTES) for row in measure(recording)]
    columns = ("fp32_mb", "lossless_mb", "plain_4_bits_mb", "sparse_4_bits_mb")
    table = Table("tensor", "zeros", "mask", "fp32 MB", "lossless", "4 bits", "sparse 4 bits")
    for row in sorted(rows, key=lambda r: -r.zeros):
        sizes = (f"{getattr(row, c):.2f}" for c in columns)
        table.add_row(row.name, f"{row.zeros:.1%}", "yes" if row.has_mask else "", *sizes)
    total = {c: sum(getattr(row, c) for row in rows) for c in columns}
    table.add_row("all", "", "", *(f"{total[c]:.2f}" for c in columns))
    Console().print(table)
    if args.json:
        about = {"model": args.model, "data": data, "warm_loss": loss}
        print(json.dumps({"total": total, "tensors": [asdict(r) for r in rows], **about}))
    return 0


def measure(recording: Recording) -> list[Row]:
    """The float saved tensors of one graph; where a sparse form is larger, the plain one counts."""
    cut = recording.cut
    values, _ = run_forward(recording, cut)
    nodes = output_args(cut.forward)[cut.num_outputs :]
    by_name = {n.name: v for n, v in zip(nodes, values, strict=True) if n is not None}
    rows = []
    for candidate in filter(is_codable, recording.candidates):
        x = by_name[candidate.saved.forward.name]
        count, nonzero = x.numel(), int(x.count_nonzero())
        size, bitmap = x.element_size() * count, (count + 7) // 8
        has_mask = any(n.meta["val"].dtype == torch.bool for n in candidate.exact)
        four = FOUR_BITS.payload_bytes(x.shape, x.dtype)
        sparse = FOUR_BITS.payload_bytes([nonzero], x.dtype) + (0 if has_mask else bitmap)
        sizes = (size, bitmap + x.element_size() * nonzero, four, min(four, sparse))
        kept = [min(size, each) / MB for each in sizes]
        rows.append(Row(candidate.name, 1 - nonzero / max(count, 1), has_mask, *kept))
    return rows
