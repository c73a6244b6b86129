"""`fxcompress bench kernels`: what the compiled GPU kernels are like, and the speed of the CPU's.

The GPU part needs no GPU: kernels are compiled for each target, and all but the last column is read
from the compiled code. The last is an estimate from it: the bytes at the device's memory bandwidth
or the instructions at its issue rates, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fxcompress import costs, rng
from fxcompress.codecs import Bits, Codec, codec, fused
from fxcompress.errors import SettingsError
from fxcompress.fit import at_rate, fit
from fxcompress.kernels import cpu
from fxcompress.tools import harness
from fxcompress.tools.compiled_kernels import DTYPES, GpuRow, compiled
from fxcompress.tools.harness import Results

TIMED = ("affine", "dither", "rotate", "transform")
FUSED = ("affine", "rotate")
# What only the tables have.
NOT_IN_JSON = {
    *("instructions_per_element", "estimated_gb_s", "estimated_for"),
    *("clone_range", "encode_range", "decode_range", "encode_reused", "decode_reused"),
}


@dataclass(frozen=True)
class CpuRow:
    """Median time over that of x.clone(); below 1 is faster. Ranges: of single calls, over it.

    Results, the clone's too, are fresh memory, whose pages fault; `reused`: written where the last
    one was, of codecs alone.

    codec: "affine+mask" codes a ReLU's output with its mask, and decodes it under the mask;
    "affine+units" codes a batch norm's input in units of its channels. "…, parts": the same, one
    operation after the other (codecs/fused.py).
    """

    codec: str
    bits: int
    dtype: str
    encode_vs_clone: float
    decode_vs_clone: float
    encode_reused: float | None
    decode_reused: float | None
    clone_range: str
    encode_range: str
    decode_range: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress bench kernels`."""
    parser.add_argument("--mb", type=float, default=64, help="size of the CPU tensor, MB")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each CPU kernel")
    parser.add_argument("--skip-cpu", action="store_true", help="only compile")
    parser.add_argument("--skip-gpu", action="store_true", help="only time the CPU's")
    parser.add_argument(
        "--lowerings", action="store_true", help="also time decodes that Inductor fuses (minutes)"
    )
    harness.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compile, measure, print tables, and with --json one line of JSON."""
    if args.repeats < 1 or args.mb <= 0:
        raise SettingsError("--repeats must be 1 or more, --mb above 0")
    if not args.skip_gpu and find_spec("triton") is None:
        raise SettingsError("the GPU part compiles with Triton, which is missing; use --skip-gpu")
    console = Console(width=None if sys.stdout.isatty() else 120)
    done = harness.results(args, "mb", "repeats", "seed")
    with harness.bars() as bars:
        gpu = [] if args.skip_gpu else compiled(done, bars)
        timed = [] if args.skip_cpu else measured(int(args.mb * 1e6), args.repeats, done, bars)
        fusing = [] if args.skip_cpu else fusions(int(args.mb * 1e6), args.repeats, done, bars)
        lowered = lowerings(done, bars) if args.lowerings else []
    if gpu:
        _print(
            console,
            gpu,
            title="Compiled for GPUs (none ran); tensor GB/s estimated from compiled code",
            kernel="kernel",
            target="compiled for",
            registers="registers",
            spills="spills",
            tensor_access_bytes="access B",
            bytes_ratio="bytes",
            instructions_per_element="instr",
            estimated_gb_s="GB/s est.",
            estimated_for="of",
        )
    if timed:
        _print(
            console,
            timed,
            title=f"CPU, {args.mb:g} MB: time over that of x.clone(); *: into memory in use",
            codec="codec",
            bits="bits",
            dtype="dtype",
            encode_vs_clone="encode",
            decode_vs_clone="decode",
            encode_reused="encode*",
            decode_reused="decode*",
            clone_range="clone, range",
            encode_range="encode, range",
            decode_range="decode, range",
        )
        _print(
            console,
            fusing,
            title=f"CPU, {args.mb:g} MB, in one pass with what stands around it: as above",
            codec="codec",
            bits="bits",
            dtype="dtype",
            encode_vs_clone="encode",
            decode_vs_clone="decode",
            clone_range="clone, range",
            encode_range="encode, range",
            decode_range="decode, range",
        )
        console.print(harness.describe(harness.machine()), highlight=False)
    if lowered:
        _print(
            console,
            lowered,
            title="CPU, one thread: decode and one reader, nanoseconds an element",
            codec="codec",
            kernel_ns="kernel",
            inductor_ns="fused by Inductor",
        )
    if args.json:
        print(json.dumps({"gpu": _json(gpu), "cpu": _json([*timed, *fusing])}))
    return 0


# ---- CPU: measured ----


def measured(
    size: int, repeats: int, done: Results | None = None, bars: Progress | None = None
) -> list[CpuRow]:
    """Codecs that have CPU kernels, and `transform`, which uses them, at 2 and 4 bits; calls
    interleaved with x.clone().

    Args:
        size: of the tensor, bytes.
        repeats: timed rounds.
        done, bars: where rows are kept, and progress is shown.
    """
    if not cpu.available():
        raise SettingsError("there is no C++ compiler for the CPU kernels; use --skip-cpu")
    done = done or Results()
    works = [(name, family, bits) for name in DTYPES for family in TIMED for bits in (2, 4)]
    rows = []
    for name, family, bits in bars.track(works, description="timing") if bars else works:
        row = done.part(f"{family} {bits} {name}", _timed, family, bits, name, size, repeats)
        rows.append(CpuRow(**row))
    return rows


def _subject(family: str, bits: int, elements: int) -> tuple[Codec, Tensor]:
    """(codec, what it codes): white noise, or of `transform` feature maps that are smooth enough
    for it to take blocks of 4 by 4."""
    if family != "transform":
        return codec(f"{family}(bits={bits})"), torch.randn(elements)
    count = max(elements // (32 * 32 * 64), 1)
    coarse = torch.randn(count, 8, 1, 8, 1, 64).expand(-1, 8, 4, 8, 4, 64)
    x = coarse.reshape(count, 32, 32, 64) + 0.5 * torch.randn(count, 32, 32, 64)
    some = x[:8]
    return at_rate(fit(some, [torch.randn_like(some)], -1), float(bits)), x


def _timed(family: str, bits: int, dtype: str, size: int, repeats: int) -> CpuRow:
    kind = DTYPES[dtype]
    c, x = _subject(family, bits, size // kind.itemsize)
    x, key = x.to(kind), torch.tensor([1, 2])
    payload, out = c.encode(x, key, 0), torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {
        "clone": x.clone,
        "encode": lambda: c.encode(x, key, 0),
        "decode": lambda: c.decode(payload, x.shape, x.dtype, key, 0),
        "encode_reused": lambda: c.encode_kernel(x, payload, key, 0),
        "decode_reused": lambda: c.decode_kernel(payload, out, key, 0),
    }
    return _row(_taken(calls, repeats), c.name, bits, dtype)


def _taken(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, harness.Spread]:
    timed = {name: partial(harness.seconds, call) for name, call in calls.items()}
    return {n: harness.spread(s) for n, s in harness.interleaved(timed, repeats).items()}


def _row(
    taken: Mapping[str, harness.Spread], codec: str, bits: int, dtype: str, which: str = ""
) -> CpuRow:
    """Of the calls whose names end in `which`."""
    clone = taken["clone"].median
    ratio = {name: t.median / clone for name, t in taken.items()}
    ranges = {name: f"{t.low / clone:.2f} to {t.high / clone:.2f}" for name, t in taken.items()}
    return CpuRow(
        codec=codec + which,
        bits=bits,
        dtype=dtype,
        encode_vs_clone=ratio[f"encode{which}"],
        decode_vs_clone=ratio[f"decode{which}"],
        encode_reused=ratio.get("encode_reused"),
        decode_reused=ratio.get("decode_reused"),
        clone_range=ranges["clone"],
        encode_range=ranges[f"encode{which}"],
        decode_range=ranges[f"decode{which}"],
    )


# ---- CPU: in one pass, and by parts ----

_PARTS = ", parts"


def fusions(
    size: int, repeats: int, done: Results | None = None, bars: Progress | None = None
) -> list[CpuRow]:
    """What is coded in one pass with what stands around it, and the same by parts; as `measured`.

    A ReLU's output half of which is 0, and feature maps of 64 channels, channels last; fp32.
    """
    done = done or Results()
    works = [
        (make, family, bits) for make in (_masked, _in_units) for family in FUSED for bits in (2, 4)
    ]
    rows = []
    for make, family, bits in bars.track(works, description="fused") if bars else works:
        part = f"{make.__name__} {family} {bits}"
        rows += [CpuRow(**row) for row in done.part(part, make, family, bits, size, repeats)]
    return rows


def _masked(family: str, bits: int, size: int, repeats: int) -> list[CpuRow]:
    c, key = codec(f"{family}(bits={bits})"), torch.tensor([1, 2])
    x = torch.randn(size // 4).relu_()
    fill, shape = x.sum() / (x > 0).sum(), x.shape
    payload, mask = fused.encode_filled(c, x, fill, key, 0)

    def decode_parts() -> Tensor:  # as a graph does: into memory of its own
        zeros = Bits(1).decode(mask, shape, torch.bool, None, 0)
        return torch.where(zeros, 0, c.decode(payload, shape, x.dtype, key, 0))

    calls: dict[str, Callable[[], object]] = {
        "clone": x.clone,
        "encode": lambda: fused.encode_filled(c, x, fill, key, 0),
        "decode": lambda: fused.decode_filled(c, payload, mask, shape, x.dtype, key, 0),
        f"encode{_PARTS}": lambda: fused.compose_filled(c, x, fill, key, 0),
        f"decode{_PARTS}": decode_parts,
    }
    taken = _taken(calls, repeats)
    return [_row(taken, f"{family}+mask", bits, "fp32", which) for which in ("", _PARTS)]


def _in_units(family: str, bits: int, size: int, repeats: int) -> list[CpuRow]:
    c, key = codec(f"{family}(bits={bits})"), torch.tensor([1, 2])
    x = torch.randn(size // 256, 64)
    mean, rstd = torch.randn(1, 64), torch.rand(1, 64)
    payload = fused.encode_standardised(c, x, mean, rstd, key, 0)
    calls: dict[str, Callable[[], object]] = {
        "clone": x.clone,
        "encode": lambda: fused.encode_standardised(c, x, mean, rstd, key, 0),
        "decode": lambda: c.decode(payload, x.shape, x.dtype, key, 0),
        f"encode{_PARTS}": lambda: fused.compose_standardised(c, x, mean, rstd, key, 0),
    }
    taken = _taken(calls, repeats)
    taken[f"decode{_PARTS}"] = taken["decode"]  # not fused with what undoes the units
    return [_row(taken, f"{family}+units", bits, "fp32", which) for which in ("", _PARTS)]


# ---- lowerings: measured, and kept for plans ----

LOWERED = (
    "bits(bits=1)",
    "cast(format=bf16)",
    "affine(bits=2)",
    "affine(bits=4)",
    "dither(bits=2)",
)
_LOWERED_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class LoweringRow:
    """A codec's decode and one pointwise reader, by our kernel and fused by Inductor."""

    codec: str
    kernel_ns: float
    inductor_ns: float


def lowerings(done: Results | None = None, bars: Progress | None = None) -> list[LoweringRow]:
    """Both lowerings of codecs that have both, kept beside Inductor's cache for later plans."""
    done = done or Results()
    rows = []
    for spec in bars.track(LOWERED, description="lowerings") if bars else LOWERED:
        rows.append(LoweringRow(**done.part(f"lowering {spec}", _lowering, spec)))
    costs.keep_lowerings({r.codec: (r.kernel_ns, r.inductor_ns) for r in rows})
    return rows


def _lowering(spec: str) -> LoweringRow:
    c, key, count = codec(spec), torch.tensor([1, 2]), _LOWERED_ELEMENTS
    x = torch.randn(count)
    x = x > 0 if isinstance(c, Bits) else x
    payload, gradient = c.encode(x, key, 0), torch.randn(count)

    def read(value: Tensor, gradient: Tensor) -> Tensor:
        return torch.where(value, 0.0, gradient) if isinstance(c, Bits) else value * gradient

    def kernel(payload: Tensor, gradient: Tensor, key: Tensor) -> Tensor:
        kind = torch.uint8 if isinstance(c, Bits) else x.dtype  # as passes/booleans.py
        decoded = torch.ops.fxcompress.decode(payload, key, spec, 0, [count], [0], kind)
        return read(decoded.float() != 0 if isinstance(c, Bits) else decoded, gradient)

    def inlined(payload: Tensor, gradient: Tensor, key: Tensor) -> Tensor:
        return read(c.pointwise(payload, count, x.dtype, rng.stream_keys(key, 0)), gradient)

    ways = (torch.compile(kernel), torch.compile(inlined))
    ours, theirs = (costs.own_seconds(way, payload, gradient, key) / count * 1e9 for way in ways)
    return LoweringRow(spec, round(ours, 3), round(theirs, 3))


def _json(rows: Sequence[GpuRow | CpuRow]) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(row).items() if k not in NOT_IN_JSON} for row in rows]


def _print(console: Console, rows: Sequence[Any], **titles: str) -> None:
    table = Table(title=titles.pop("title"))
    for heading in titles.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        values = (getattr(row, name) for name in titles)
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)
