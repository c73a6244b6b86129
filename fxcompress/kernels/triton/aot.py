"""Kernels compiled ahead of time, for GPUs that need not be there, and what came of it.

Everything is read from the compiler's own output: registers, stack and the width of each access
from the machine code (SASS by the cuobjdump that comes with Triton, AMD assembly), the bytes that a
program moves from Triton's IR, whose accesses have shapes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxcompress.kernels.triton import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.M)
_GCN = re.compile(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)", re.M)
_ACCESS = re.compile(r"tt\.(?:load|store) .* : (?:tensor<([\dx]+)x)?!tt\.ptr<[a-z]+(\d+)>")
_CONSTANT = re.compile(r"(%\S+) = arith.constant (-?\d+) : i32")
_LOOP = re.compile(r"scf\.for .* = (%\S+) to (%\S+) step (%\S+)")
_GCN_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}


@dataclass(frozen=True)
class Code:
    """One kernel's machine code."""

    target: str
    registers: int
    """A thread's vector registers."""
    stack_bytes: int
    """A thread's memory for registers that did not fit."""
    loads: Counter[int]
    """Instructions that read global memory, by the bytes a thread reads."""
    stores: Counter[int]
    instructions: Counter[str]
    moved_bytes: int
    """What a program reads and writes of global memory."""


def warp_of(target: str) -> int:
    """Threads of a warp."""
    return int(TARGETS[target].warp_size)


def compile_for(target: str, launch: Launch, turns: int = 1) -> Code:
    """Compile a launch as its first call would be.

    turns: of a loop whose number the data decide.
    """
    signature, constants, aligned = specialised(launch)
    device = TARGETS[target]
    divisible = {(position,): [["tt.divisibility", 16]] for position in aligned}
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, divisible),
        target=device,
        options=launch.options,
    )
    moved = _moved(compiled.asm["ttir"], turns)
    if device.backend == "cuda":
        return _from_cubin(target, compiled.asm["cubin"], moved)
    return _from_amdgcn(target, compiled.asm["amdgcn"], moved)


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """What a launch is compiled for: (types, constants, positions of multiples of 16).

    As Triton does on a first call: arguments that are 1 or None are constants. Tensors, of any
    device (meta will do), count as aligned to 16 bytes. Launches of one kernel that have all these
    in common share its code.
    """
    given = launch.given
    general = {p.name for p in launch.kernel.params if p.do_not_specialize}
    special = {name: value for name, value in given.items() if name not in general}
    fixed = {
        name: value
        for name, value in special.items()
        if not isinstance(value, Tensor) and value in (None, 1)
    }
    constants = {**launch.constants, **fixed}
    signature = {
        name: "constexpr" if name in constants else _kind(given[name])
        for name in launch.kernel.arg_names
    }
    aligned = [
        position
        for position, name in enumerate(launch.kernel.arg_names)
        if name not in constants and _is_aligned(given[name], name in special)
    ]
    return signature, constants, aligned


def _kind(value: Any) -> str:
    return f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def _is_aligned(value: Any, special: bool) -> bool:
    return isinstance(value, Tensor) or (special and value % 16 == 0)


def _moved(ttir: str, turns: int) -> int:
    """Bytes of all accesses, each times the turns of the loops around it."""
    constants = {name: int(value) for name, value in _CONSTANT.findall(ttir)}
    moved, times = 0, [1]
    for line in ttir.splitlines():
        if access := _ACCESS.search(line):
            moved += _accessed(access[1] or "", access[2]) * times[-1]
        if loop := _LOOP.search(line):
            bounds = [constants[name] for name in loop.groups() if name in constants]
            known = (bounds[1] - bounds[0]) // bounds[2] if len(bounds) == 3 else turns
            times.append(times[-1] * known)
        elif line.rstrip().endswith("{"):
            times.append(times[-1])
        elif line.strip().startswith("}"):
            times.pop()
            if line.rstrip().endswith("{"):  # } else {
                times.append(times[-1])
    return moved


def _accessed(shape: str, bits: str) -> int:
    numel = 1
    for size in filter(None, shape.split("x")):
        numel *= int(size)
    return numel * int(bits) // 8


def _from_cubin(target: str, cubin: bytes, moved: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found is not None, usage.stdout
    names = _SASS.findall(sass.stdout)
    return Code(
        target=target,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        loads=Counter(_sass_bytes(name) for name in names if name.startswith("LDG")),
        stores=Counter(_sass_bytes(name) for name in names if name.startswith("STG")),
        instructions=Counter(name.split(".")[0] for name in names),
        moved_bytes=moved,
    )


def _sass_bytes(name: str) -> int:
    parts = name.split(".")
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return size
    return 4


def _from_amdgcn(target: str, text: str, moved: int) -> Code:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    names = _GCN.findall(text)

    def accesses(kind: str) -> Counter[int]:
        found = (re.fullmatch(rf"(?:global|buffer|flat)_{kind}_([a-z0-9]+)\w*", n) for n in names)
        return Counter(_GCN_BYTES.get(match[1], 1) for match in found if match)

    return Code(
        target=target,
        registers=number("vgpr_count"),
        stack_bytes=number("private_segment_fixed_size"),
        loads=accesses("load"),
        stores=accesses("store"),
        instructions=Counter(names),
        moved_bytes=moved,
    )
