"""GPU kernels as compiled: what `fxcompress bench kernels` reads from code, without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor

from fxcompress.codecs import Adaptive, Average, Codec, Frequency, codec
from fxcompress.codecs.fused import Fusing, mask_bytes
from fxcompress.kernels import triton as kernels
from fxcompress.kernels.prologue import Filled, Standardised
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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Those that are also coded in one pass with what stands around it.
FUSED = (
    *(("affine(bits=4)", "fp32"), ("affine(bits=2)", "bf16")),
    *(("dither(bits=2)", "fp32"), ("rotate(bits=2)", "bf16")),
)
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
    works = [(*case, target) for case in _cases() for target in TARGETS]
    rows: list[GpuRow] = []
    for make, case, name, target in bars.track(works, description="compiling") if bars else works:
        part = f"{make.__name__} {case} {name} {target}"
        rows += [GpuRow(**row) for row in done.part(part, make, case, name, target)]
    return rows


def _cases() -> Iterator[tuple[Callable[..., list[GpuRow]], Any, str]]:
    """(what makes the rows, of what, dtype)."""
    for spec in COMPILED:
        yield from ((_codec_rows, codec(spec), name) for name in DTYPES)
    yield _codec_rows, codec("bits(bits=1)"), "bool"
    for spec, name in FUSED:
        yield _fused_rows, codec(spec), name
    for sides in ((1, 1), (4, 4)):  # of transform's blocks in space
        yield from ((_basis_rows, sides, name) for name in DTYPES)


def _codec_rows(c: Codec, name: str, target: str) -> list[GpuRow]:
    """Of each launch that touches the tensor; sorts and grids are small beside it."""
    from fxcompress.kernels.triton.aot import warp_of

    dtype = DTYPES.get(name, torch.bool)
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


def _fused_rows(c: Fusing, name: str, target: str) -> list[GpuRow]:
    """A mask written with the payload, and read with it; the units of 256 channels."""
    from fxcompress.kernels.triton.aot import warp_of

    x = torch.empty(_FLAT, dtype=DTYPES[name], device="meta")
    key = torch.empty(2, dtype=torch.int64, device="meta")
    mask = torch.empty(mask_bytes(x.shape), dtype=torch.uint8, device="meta")
    units = torch.empty(256, device="meta")
    payload = torch.empty(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8, device="meta")
    least = x.nbytes + payload.nbytes
    encode = partial(c.encode_kernel, x, payload, key, 1)
    masked = partial(c.decode_kernel, payload, x, key, 1, mask)
    calls = {"decode under a mask": (masked, least + mask.nbytes)}
    if c.name != "dither":  # which encodes as affine does
        filled = partial(encode, Filled(x.new_empty(()), mask))
        calls["encode with a mask"] = filled, least + mask.nbytes
        for title, inner in (("last", 1), ("first", 28 * 28)):
            call = partial(encode, Standardised(units, units, inner))
            calls[f"encode in units, channels {title}"] = call, least
    rows = []
    for what, (call, moved) in calls.items():
        with kernels.recorded(warp_of(target)) as launches:
            assert call()
        (launch,) = launches
        reads = what.startswith("encode")
        rows.append(_row(f"{c} {name} {what}", target, launch, x, x.nbytes, moved, reads))
    return rows


def _basis_rows(sides: tuple[int, int], name: str, target: str) -> list[GpuRow]:
    """Of 256 channels, in blocks of 64, and so many positions that runs of tiles are long."""
    from fxcompress.kernels.triton.aot import warp_of

    x = torch.empty(_LARGE, dtype=DTYPES[name], device="meta")
    first, second, back = basis_launches(x, sides, warp_of(target))
    energies, z = first.given["out"], second.given["out"]
    kind = f"transform(sides={sides[0]}x{sides[1]}) {name}"
    both = x.nbytes + z.nbytes
    return [
        _row(f"{kind} energies", target, first, x, x.nbytes, x.nbytes + energies.nbytes),
        _row(f"{kind} coefficients", target, second, x, x.nbytes, both),
        _row(f"{kind} inverse", target, back, x, x.nbytes, both, reads=False),
    ]


def basis_launches(x: Tensor, sides: tuple[int, int], warp: int) -> list[kernels.Launch]:
    """What changes basis of x (on meta, channels last and in blocks of 64), there and back."""
    from fxcompress.kernels.place import placed
    from fxcompress.kernels.triton import transform as gpu

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    place = placed(tuple(x.shape), 3, sides, 64)
    assert place is not None
    mean, matrices = empty(place.channels), empty(place.channels // 64, 64, 64)
    rows, z = empty(place.bands, of=torch.int64), empty(place.bands, place.positions)
    with kernels.recorded(warp):
        return [
            *gpu.energies(x, mean, matrices, place, empty(gpu.lines(place), place.bands)),
            *gpu.analyse(x, mean, matrices, place, rows, z),
            *gpu.synthesise(z, mean, matrices, place, rows, x),
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

    tiles = int(launch.given.get("tiles", 1))  # that each program takes, one after the other
    code, threads = compile_for(target, launch, turns * tiles), launch.warps * warp_of(target)
    device, moved = DEVICES[target], code.moved_bytes * launch.programs
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
