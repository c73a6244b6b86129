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
from typing import Any

import torch
from rich.progress import Progress

from fxcompress.choose import is_codable
from fxcompress.codecs import codec
from fxcompress.passes.capture import output_args
from fxcompress.record import Recording, run_forward
from fxcompress.tools import harness, models, output
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
    harness.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, record a step, print the table and, with --json, one line of JSON."""
    done = harness.results(args, "model", "batch", "size", "data", "warm_steps", "seed")
    with harness.bars() as bars:
        found = done.part("zeros", _found, args, bars)
    rows = [Row(**row) for row in found["tensors"]]
    columns = ("fp32_mb", "lossless_mb", "plain_4_bits_mb", "sparse_4_bits_mb")
    total = {c: sum(getattr(row, c) for row in rows) for c in columns}
    shown = [asdict(row) for row in sorted(rows, key=lambda r: -r.zeros)]
    shown.append({"name": "all", "zeros": None, "has_mask": None, **total})
    output.write_table(list(shown[0]), shown, f"{args.model}: exact zeros of saved tensors")
    print(harness.describe(harness.machine()))
    if args.json:
        about = {"model": args.model, "seed": args.seed, "machine": harness.machine()}
        print(json.dumps({"total": total, **found, **about}))
    return 0


def _found(args: argparse.Namespace, bars: Progress) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    task = models.load(args.model, args.batch, args.size)
    source, data = feed(task, args.data, args.batch, args.size, args.seed)
    loss = train(source, args.warm_steps, bars=bars)
    rows = [row for recording in recorded(source, MIN_BYTES) for row in measure(recording)]
    return {"tensors": rows, "data": data, "warm_loss": loss}


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
