"""`fxcompress bench kernels`: what the compiled GPU kernels are like, and the speed of the CPU's.

The GPU part needs no GPU: kernels are compiled for each target, and all but the last column is read
from the compiled code. The last is an estimate from it: the bytes at the device's memory bandwidth
or the instructions at its issue rates, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fxcompress import costs, rng
from fxcompress.codecs import Adaptive, Average, Bits, Codec, Frequency, codec
from fxcompress.errors import SettingsError
from fxcompress.fit import at_rate, fit
from fxcompress.kernels import cpu
from fxcompress.kernels import triton as kernels
from fxcompress.tools import harness
from fxcompress.tools.harness import Results

if TYPE_CHECKING:
    from fxcompress.kernels.triton.aot import Code

GB = 1e9
TARGETS = ("sm_80", "sm_90", "gfx942")
COMPILED = (
    *("affine(bits=2)", "affine(bits=4)", "dither(bits=2)", "dither(bits=4)"),
    *("rotate(bits=2)", "rotate(bits=4)", "subsample(rate=0.5)", "subsample(rate=0.125)"),
    *("average(beta=0.5)", "magnitude(levels=4)", "sign(scale=mean)"),
    *("cast(format=bf16)", "cast(format=e4m3)", "cast(format=e4m3,rounding=stochastic)"),
    *("average(beta=0)", "mixture(base_levels=4)", "adaptive(bits=2)"),
    *("frequency(bits=2,channels=-1)", "frequency(bits=2,channels=1)"),
    *("average(beta=0.5,along=space,channels=-1)", "average(beta=0.5,along=space,channels=1)"),
)
TIMED = ("affine", "dither", "rotate", "transform")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What kernels are compiled for: whole tiles only.
_FLAT, _SAMPLES = (1 << 20,), (16, 1 << 16)
_LAST, _FIRST = (4, 32, 32, 256), (4, 256, 32, 32)  # channels
_LARGE = (128, 112, 112, 256)  # so that programs have many tiles


@dataclass(frozen=True)
class GpuRow:
    """One kernel compiled for one target.

    tensor_access_bytes: every byte of the tensor moves in accesses of at least so many bytes.
    bytes_ratio: bytes that a program moves over those of its elements and their payload.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    tensor_access_bytes: int
    bytes_ratio: float
    instructions_per_element: float
    estimated_gb_s: float
    estimated_for: str


# What only the tables have.
NOT_IN_JSON = {
    *("instructions_per_element", "estimated_gb_s", "estimated_for"),
    *("clone_range", "encode_range", "decode_range", "encode_reused", "decode_reused"),
}


@dataclass(frozen=True)
class CpuRow:
    """Median time over that of x.clone(); below 1 is faster. Ranges: of single calls, over it.

    Results, the clone's too, are fresh memory, whose pages fault; `reused`: written where the last
    one was.
    """

    codec: str
    bits: int
    dtype: str
    encode_vs_clone: float
    decode_vs_clone: float
    encode_reused: float
    decode_reused: float
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
    """Compile, measure, print two tables, and with --json one line of JSON."""
    if args.repeats < 1 or args.mb <= 0:
        raise SettingsError("--repeats must be 1 or more, --mb above 0")
    if not args.skip_gpu and find_spec("triton") is None:
        raise SettingsError("the GPU part compiles with Triton, which is missing; use --skip-gpu")
    console = Console(width=None if sys.stdout.isatty() else 120)
    done = harness.results(args, "mb", "repeats", "seed")
    with harness.bars() as bars:
        gpu = [] if args.skip_gpu else compiled(done, bars)
        timed = [] if args.skip_cpu else measured(int(args.mb * 1e6), args.repeats, done, bars)
        fused = lowerings(done, bars) if args.lowerings else []
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
        console.print(harness.describe(harness.machine()), highlight=False)
    if fused:
        _print(
            console,
            fused,
            title="CPU, one thread: decode and one reader, nanoseconds an element",
            codec="codec",
            kernel_ns="kernel",
            inductor_ns="fused by Inductor",
        )
    if args.json:
        print(json.dumps({"gpu": _json(gpu), "cpu": _json(timed)}))
    return 0


# ---- GPU: compiled, not run ----


@dataclass(frozen=True)
class Device:
    """Peaks from the vendor's data sheet and programming guide; a unit is an SM or compute unit.

    lanes: instructions of any kind that a unit issues a cycle, times their threads; pipes: the same
    of the instructions whose names start so.
    """

    name: str
    gb_s: float
    units: int
    ghz: float
    lanes: int
    pipes: tuple[tuple[int, tuple[str, ...]], ...]

    def seconds(self, instructions: Counter[str], threads: int) -> float:
        """Of a program of `threads` that has a unit to itself, by its busiest pipe."""
        cycles = [instructions.total() / self.lanes]
        for lanes, names in self.pipes:
            count = sum(n for name, n in instructions.items() if name.startswith(names))
            cycles.append(count / lanes)
        return max(cycles) * threads / (self.ghz * 1e9)


_LOGIC = (
    *("LOP3", "SHF", "IADD3", "VIADD", "LEA", "PRMT", "SEL", "SGXT", "ISETP", "IMNMX"),
    *("VIMNMX", "FMNMX", "FSEL", "FSETP"),
)
_NVIDIA = ((64, _LOGIC), (64, ("IMAD",)), (32, ("SHFL",)))
DEVICES = {
    "sm_80": Device("A100 SXM", 2039, 108, 1.41, 128, (*_NVIDIA, (16, ("F2I", "I2F")))),
    "sm_90": Device("H100 SXM", 3350, 132, 1.83, 128, (*_NVIDIA, (64, ("F2I", "I2F")))),
    "gfx942": Device("MI300X", 5300, 304, 2.1, 64, ((16, ("v_mul_lo_u32",)),)),
}


def compiled(done: Results | None = None, bars: Progress | None = None) -> list[GpuRow]:
    """Every family's kernels for every target."""
    done = done or Results()
    works = [(*case, target) for case in (*_cases(), *_BASES) for target in TARGETS]
    rows: list[GpuRow] = []
    for case, name, dtype, target in bars.track(works, description="compiling") if bars else works:
        make = _basis_rows if isinstance(case, tuple) else _codec_rows
        found = done.part(f"{case} {name} {target}", make, case, name, dtype, target)
        rows += [GpuRow(**row) for row in found]
    return rows


def _cases() -> Iterator[tuple[Codec, str, torch.dtype]]:
    for spec in COMPILED:
        for name, dtype in DTYPES.items():
            yield codec(spec), name, dtype
    yield codec("bits(bits=1)"), "bool", torch.bool


# The changes of basis of transform, by the sides of its blocks in space.
_BASES = [(sides, name, dtype) for sides in ((1, 1), (4, 4)) for name, dtype in DTYPES.items()]


def _codec_rows(c: Codec, name: str, dtype: torch.dtype, target: str) -> list[GpuRow]:
    """Of each launch that touches the tensor; sorts and grids are small beside it."""
    from fxcompress.kernels.triton.aot import warp_of

    x = torch.empty(_shape(c), dtype=dtype, device="meta")
    key = torch.empty(2, dtype=torch.int64, device="meta")
    with kernels.recorded(warp_of(target)) as encoding:
        payload = c.encode(x, key, 1)
    with kernels.recorded(warp_of(target)) as decoding:
        c.decode(payload, x.shape, dtype, key, 1)
    rows = []
    for way, launches in (("encode", encoding), ("decode", decoding)):
        found = [
            launch for launch in launches if any(t.nbytes == x.nbytes for t in _touched(launch))
        ]
        for launch in found:
            title = f"{c} {name} {way}" + (f": {_pass(launch)}" if len(found) > 1 else "")
            turns = int(c.bits) if isinstance(c, Adaptive) else 1
            others = sum(t.nbytes for t in _touched(launch)) - x.nbytes
            own = int(x.nbytes * _share(launch, x.numel()))
            rows.append(_row(title, target, launch, x, own, own + others, way == "encode", turns))
    return rows


def _shape(c: Codec) -> tuple[int, ...]:
    if isinstance(c, Adaptive):
        return _SAMPLES
    if isinstance(c, Frequency) or (isinstance(c, Average) and c.along == "space"):
        return _LAST if c.channels == -1 else _FIRST
    return _FLAT


def _touched(launch: kernels.Launch) -> list[Tensor]:
    """The tensors among its arguments, each once."""
    return list({id(a): a for a in launch.arguments if isinstance(a, Tensor)}.values())


def _share(launch: kernels.Launch, numel: int) -> float:
    """Of the tensor's elements that it handles: kernels of one width take their groups only."""
    tile = launch.constants.get("ROWS", 0) * launch.constants.get("GROUP", 0)
    return launch.programs * tile / numel if tile else 1.0


def _pass(launch: kernels.Launch) -> str:
    name = str(launch.kernel.fn.__name__).removesuffix("_kernel")
    levels = launch.constants.get("LEVELS")
    return name if levels is None else f"{name} at {levels} levels"


def _basis_rows(sides: tuple[int, int], name: str, dtype: torch.dtype, target: str) -> list[GpuRow]:
    """Of 256 channels, in blocks of 64, and so many positions that runs of tiles are long."""
    from fxcompress.kernels.triton import transform as gpu
    from fxcompress.kernels.triton.aot import warp_of

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, mean, matrices = empty(*_LARGE, of=dtype), empty(256), empty(4, 64, 64)
    place = gpu.placed(x.shape, 3, sides, 64)
    assert place is not None
    rows, energies = empty(place.bands, of=torch.int64), empty(place.lines, place.bands)
    z = empty(place.bands, place.positions)
    with kernels.recorded(warp_of(target)):
        (first,) = gpu.energies(x, mean, matrices, place, energies)
        (second,) = gpu.analyse(x, mean, matrices, place, rows, z)
        (back,) = gpu.synthesise(z, mean, matrices, place, rows, x)
    kind = f"transform(sides={sides[0]}x{sides[1]}) {name}"
    both = x.nbytes + z.nbytes
    return [
        _row(f"{kind} energies", target, first, x, x.nbytes, x.nbytes + energies.nbytes),
        _row(f"{kind} coefficients", target, second, x, x.nbytes, both),
        _row(f"{kind} inverse", target, back, x, x.nbytes, both, reads=False),
    ]


def _row(
    kernel: str,
    target: str,
    launch: kernels.Launch,
    x: Tensor,
    own: int,
    least: int,
    reads: bool = True,
    turns: int = 1,
) -> GpuRow:
    """`own`: bytes of x that it handles; `least`: that all programs must move; `reads`: x is what
    they read, not write; `turns`: see `compile_for`."""
    from fxcompress.kernels.triton.aot import compile_for, warp_of

    code, threads = compile_for(target, launch, turns), launch.warps * warp_of(target)
    device, moved = DEVICES[target], code.moved_bytes * launch.programs
    tiles = int(launch.constants.get("TILES", 1))
    instructions = code.instructions.total() * tiles * threads * launch.programs
    elements = own // x.element_size()
    seconds = max(
        moved / GB / device.gb_s,
        device.seconds(code.instructions, threads) * tiles * launch.programs / device.units,
    )
    return GpuRow(
        kernel=kernel,
        target=target,
        registers=code.registers,
        spills=code.stack_bytes,
        tensor_access_bytes=_access(code, reads, own // launch.programs // tiles // threads),
        bytes_ratio=moved / least,
        instructions_per_element=instructions / elements,
        estimated_gb_s=own / GB / seconds,
        estimated_for=device.name,
    )


def _access(code: Code, reads: bool, needed: int) -> int:
    """The widest accesses on the tensor's side that carry the `needed` bytes of a thread."""
    widths = code.loads if reads else code.stores
    for width in sorted(widths, reverse=True):
        needed -= width * widths[width]
        if needed <= 0:
            return width
    raise AssertionError(f"{needed} bytes of the tensor are not accessed: {widths}")


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
    timed = {name: partial(harness.seconds, call) for name, call in calls.items()}
    taken = {n: harness.spread(s) for n, s in harness.interleaved(timed, repeats).items()}
    clone = taken["clone"].median
    ratio = {name: t.median / clone for name, t in taken.items()}
    ranges = {name: f"{t.low / clone:.2f} to {t.high / clone:.2f}" for name, t in taken.items()}
    return CpuRow(
        codec=c.name,
        bits=bits,
        dtype=dtype,
        encode_vs_clone=ratio["encode"],
        decode_vs_clone=ratio["decode"],
        encode_reused=ratio["encode_reused"],
        decode_reused=ratio["decode_reused"],
        clone_range=ranges["clone"],
        encode_range=ranges["encode"],
        decode_range=ranges["decode"],
    )


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
    ours, fused = (costs.own_seconds(way, payload, gradient, key) / count * 1e9 for way in ways)
    return LoweringRow(spec, round(ours, 3), round(fused, 3))


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
