"""`fxcompress doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import rng, torch_private
from fxcompress.codecs import Codec, codec, codec_names
from fxcompress.errors import FxCompressError
from fxcompress.kernels import cpu
from fxcompress.settings import from_environment
from fxcompress.tools.output import console, write_table

EXAMPLES = """\
examples:
  fxcompress doctor            # exit code 1 if there is a problem
  fxcompress doctor --quick    # without the self-test, which compiles two small models
  fxcompress doctor --json | jq '.[] | select(.state == "problem")'
"""

_OPTIONAL = {
    "torchvision": ("models named torchvision:NAME", "pip install 'fxcompress[bench]'"),
    "sklearn": ("the images of fxcompress demo", "pip install 'fxcompress[bench]'"),
    "matplotlib": ("plots", "pip install 'fxcompress[bench]'"),
    "transformers": ("models named hf:NAME", "pip install 'fxcompress[hf]'"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        state: "ok", "note" (something optional is missing) or "problem".
        remedy: what to do; empty if it is fine.
    """

    subject: str
    state: str
    found: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress doctor`."""
    parser.add_argument("--quick", action="store_true", help="leave the self-test out")
    parser.add_argument("--json", action="store_true", help="a list of findings instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if there is a problem."""
    findings = list(examine(quick=args.quick))
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        rows = [asdict(f) for f in findings]
        write_table(["subject", "state", "found", "remedy"], rows, "fxcompress doctor")
        problems = sum(f.state == "problem" for f in findings)
        verdict = "all is well" if not problems else f"{problems} to be solved"
        console().print(verdict, style="red" if problems else "green")
    return int(any(f.state == "problem" for f in findings))


def examine(*, quick: bool = False) -> Iterator[Finding]:
    """All findings; without the self-test if ``quick``."""
    yield from versions()
    yield from devices()
    yield compiler()
    yield cache_folder()
    yield environment()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        yield from lowerings(device)
        if not quick:
            yield self_test(device)


def versions() -> Iterator[Finding]:
    """fxcompress, Python, PyTorch, and the optional packages."""
    yield Finding("fxcompress", "ok", fxcompress.__version__)
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield pytorch(torch.__version__)
    for name, (purpose, remedy) in _OPTIONAL.items():
        if find_spec(name) is None:
            yield Finding(name, "note", f"not installed: no {purpose}", remedy)
        else:
            package = {"sklearn": "scikit-learn"}.get(name, name)
            yield Finding(name, "ok", metadata.version(package))
    if shutil.which("dot") is None:
        remedy = "apt install graphviz, or brew or conda"
        yield Finding("Graphviz", "note", "no program dot: no fxcompress viz -o plan.svg", remedy)
    else:
        yield Finding("Graphviz", "ok", str(shutil.which("dot")))


def pytorch(version: str) -> Finding:
    """Is this one of the versions that we know the private parts of?"""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    low, high = torch_private.SUPPORTED
    if low <= numbers < high:
        return Finding("PyTorch", "ok", version)
    wanted = f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    return Finding("PyTorch", "problem", f"{version}, not tested", f"pip install '{wanted}'")


def devices() -> Iterator[Finding]:
    """CPU and GPUs, and Triton for the latter."""
    yield Finding("CPU", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
            yield Finding(
                "GPU",
                "problem",
                "the driver's tools are installed, but PyTorch sees no GPU",
                "install a GPU build of PyTorch (pytorch.org); check nvidia-smi and "
                "CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Finding("GPU", "note", "none: training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB")
    if find_spec("triton") is None:
        yield Finding(
            "Triton",
            "problem",
            "not installed: codecs run as plain PyTorch operations, and Inductor not at all",
            "pip install triton",
        )
    else:
        yield Finding("Triton", "ok", metadata.version("triton"))


def compiler() -> Finding:
    """C++: Inductor on CPU needs it as much as our kernels."""
    if cpu.available():
        return Finding("C++ compiler", "ok", "compiles our kernels")
    return Finding(
        "C++ compiler",
        "problem",
        f"our kernels do not compile (CXX={os.environ.get('CXX', 'not set')})",
        "apt install g++ (or set CXX to one); TORCH_LOGS=output_code shows what was tried",
    )


def cache_folder() -> Finding:
    """Plans are kept beside Inductor's cache."""
    try:
        folder = torch_private.cache_dir() / "fxcompress"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder you may write to"
        return Finding("cache", "problem", f"{error.filename}: {error.strerror}", remedy)
    free = shutil.disk_usage(folder).free
    if free < 1e9:
        remedy = "free some disk space, or set TORCHINDUCTOR_CACHE_DIR to another disk"
        return Finding("cache", "problem", f"{folder}: {free / 1e6:.0f} MB left", remedy)
    return Finding("cache", "ok", str(folder))


def environment() -> Finding:
    """Settings from FXCOMPRESS_* variables."""
    try:
        found = from_environment()
    except FxCompressError as error:
        return Finding("settings", "problem", str(error), "unset or correct the variable")
    names = ", ".join(f"{name}={value}" for name, value in found.items())
    return Finding("settings", "ok", f"from the environment: {names or 'none'}")


# --- lowerings ----------------------------------------------------------------------------------


def lowerings(device: str) -> Iterator[Finding]:
    """What each codec family runs as, and whether that agrees with its definition."""
    for name in codec_names():
        subject = f"{name} on {device}"
        try:
            yield Finding(subject, *_lowering(codec(name), device))
        except FxCompressError:  # transform: its bases come from a calibration
            yield Finding(subject, "note", "needs a calibration: not tried")
        except Exception as error:  # whatever a broken compiler, driver or kernel raises
            yield Finding(subject, "problem", f"fails: {error}", _REPORT)


_REPORT = "please report it with the output of fxcompress doctor --json"


def _lowering(found: Codec, device: str) -> tuple[str, str, str]:
    x = _sample(found.dtypes[0]).to(device)
    key = torch.tensor([12345, 0], device=device)
    keys = rng.stream_keys(key, 1)
    size = found.payload_bytes(x.shape, x.dtype)
    expected = x.new_zeros(size, dtype=torch.uint8)
    found.encode_reference(x, expected, keys)
    payload = torch.zeros_like(expected)
    encodes = found.encode_kernel(x, payload, key, 1)
    value, decoded = torch.empty_like(x), torch.empty_like(x)
    found.decode_reference(expected, value, keys)
    decodes = found.decode_kernel(expected, decoded, key, 1)
    wrong = encodes and not torch.equal(payload, expected)
    wrong |= decodes and not torch.equal(decoded, value)
    if wrong:
        return "problem", "the kernel's bits are not those of the definition", _REPORT
    kernel = "a C++ kernel" if device == "cpu" else "a Triton kernel"
    ways = [kernel if used else "PyTorch operations" for used in (encodes, decodes)]
    return "ok", ways[0] if encodes == decodes else "encodes by {}, decodes by {}".format(*ways), ""


def _sample(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(8, 16, 64, generator=generator).to(dtype)
    return torch.randint(0, 2, (8, 16, 64), generator=generator).to(dtype)


# --- self-test ----------------------------------------------------------------------------------


def self_test(device: str) -> Finding:
    """A small model, compiled plain and at 4 bits: forward equal, gradients noisy but right."""
    subject = f"self-test on {device}"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.GELU()).to(device)
    try:
        found = fxcompress.check(
            model,
            torch.randn(256, 64, device=device),
            with_backend=fxcompress.backend(policy="uniform4", budget_mb=None),
            seeds=4,
        )
    except Exception as error:  # this is what a broken installation looks like
        return Finding(subject, "problem", f"{type(error).__name__}: {error}", _REPORT)
    if not found.outputs_equal or not 0 < found.noise < 0.3 or found.bias > found.noise:
        return Finding(subject, "problem", str(found), _REPORT)
    return Finding(subject, "ok", str(found))
