"""Everything that only a GPU can show, in one run of at most 8 minutes, from a bare checkout.

    python tools/gpu_check.py --out gpu.json

Needs a GPU, torch, triton, and what they are usually installed with; fxcompress need not be
installed. Each part is measured as long as time is left, and written down when it is done:

    fill      codecs are timed; then every step below is compiled once, each by a process of its
              own, side by side, so that the caches are full when steps are timed
    kernels   meanwhile: every family's kernels equal the reference on CPU, bit for bit (transform:
              within the rounding of its matrix products); in fp32, gradients of what changes no
              value equal plain Inductor's
    graphs    under a CUDA graph each replay draws new noise, and decodes what eager code does
    cnn       ResNet-50 in bf16, by policy: step, saved bytes, error of the gradient and true peak
              (torch.cuda.max_memory_allocated) beside plain Inductor and PyTorch's memory budget;
              auto@12 saves 1/12 of the bytes, auto@1100MB has that budget (40 % of plain's peak)
              and fails where a step takes more
    gpt       as cnn, for a GPT of GPT-2's size
    bandwidth of kernels, beside the device's own copy
    compile   seconds of the first step of ResNet-50 with empty caches
    largest   the largest batch of ResNet-50 within a fixed peak: predicted, then run

The last line is one JSON object, also written to --out. Exit status: 0 all is well, 1 a check
failed or broke, 3 there is no GPU. `--rehearse` runs what can be run on a CPU, at small sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 3


def _import_checkout() -> None:
    """Import this checkout's fxcompress, whose subpackages passes and tools lie beside it."""
    # Run as a script, its folder comes first on the path, and data.py there hides any other.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT / "tools"]
    package = ROOT / "fxcompress"
    spec = importlib.util.spec_from_file_location(
        *("fxcompress", package / "__init__.py"),
        submodule_search_locations=[str(package), str(ROOT)],
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fxcompress"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _import_checkout()

import torch  # noqa: E402

from fxcompress import costs  # noqa: E402
from fxcompress.tools import gpu_kernels  # noqa: E402
from fxcompress.tools.gpu_steps import Model, exactness, is_sound, measure  # noqa: E402

# What is wanted most comes first: time may run out.
POLICIES = ("inductor", "auto@12", "uniform4", "auto@1100MB", "torch-budget", "offload")
COLD = ("inductor", "uniform4", "auto@12")  # whose compilation is timed
LIMITED = ("inductor", "auto@12")  # whose largest batch is sought
SMALL = (("torchvision:resnet18", "16", "64"), ("gpt:small", "8", "128"))  # compared in fp32
FILLED = 0.5  # of the time, at most, until all is compiled once
LEAST = 40  # seconds that must be left to begin with another row


@dataclass(frozen=True)
class Run:
    """How and on what to measure."""

    device: str
    deadline: float
    elements: int
    """Of the tensors that bandwidth is measured on."""
    cnn: Model
    gpt: Model
    peak_mb: float
    """Of activations, that the largest batch must stay within."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="also write the JSON here, part by part")
    parser.add_argument("--seconds", type=float, default=450, help="start nothing new after these")
    parser.add_argument("--parts", help="only these, with commas between them")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, small: tries the script")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)  # for processes of its own
    parser.add_argument("--exact", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        print("There is no GPU that PyTorch sees: nothing was measured. --rehearse needs none.")
        return NO_GPU
    if args.row or args.exact:
        return _alone(args.row, args.exact, "cpu" if args.rehearse else "cuda")
    deadline = time.perf_counter() + args.seconds
    if args.rehearse:
        tried = ("inductor", "auto@12")
        cnn = Model("torchvision:resnet18", 4, 32, (*tried, "auto@20MB"))
        gpt = Model("gpt:small", 2, 32, (*tried, "lossless"))
        run = Run("cpu", deadline, 1 << 20, cnn, gpt, 45)
    else:
        cnn = Model("torchvision:resnet50", 64, 224, POLICIES)
        gpt = Model("gpt:base", 16, 512, POLICIES)
        run = Run("cuda", deadline, 1 << 26, cnn, gpt, 8000)
    parts = _parts(run)
    asked = args.parts.split(",") if args.parts else list(parts)
    if unknown := set(asked) - set(parts):
        parser.error(f"--parts {sorted(unknown)}: there are {', '.join(parts)}")
    found: dict[str, Any] = {"machine": _machine(run), "rehearsal": args.rehearse}
    status = 0
    for name in (name for name in parts if name in asked):
        print(f"== {name}, {run.left:.0f} s left", flush=True)
        try:
            found[name] = parts[name](found)
        except Exception:
            found[name] = {"ok": False, "error": traceback.format_exc()}
            print(found[name]["error"], flush=True)
        status |= not found[name]["ok"]
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return int(status)


_Part = Callable[[Mapping[str, Any]], dict[str, Any]]


def _parts(run: Run) -> dict[str, _Part]:
    """By name, in order; each is given what was found before."""
    parts: dict[str, _Part] = {
        "fill": lambda _: fill(run),
        "graphs": lambda _: gpu_kernels.graphs(),
        "cnn": lambda _: steps(run, run.cnn),
        "gpt": lambda _: steps(run, run.gpt),
        "bandwidth": lambda _: gpu_kernels.bandwidth(run.device, run.elements),
        "compile": lambda _: cold(run),
        "largest": lambda found: largest(run, found.get("cnn", {}).get("rows", {})),
    }
    only_on_gpu = ("graphs", "bandwidth") if run.device == "cpu" else ()
    return {name: part for name, part in parts.items() if name not in only_on_gpu}


def _machine(run: Run) -> dict[str, Any]:
    version = str(torch.__version__)
    if run.device == "cpu":
        return {"torch": version, "gpu": None, "device_gb": None}
    properties = torch.cuda.get_device_properties(0)
    return {"torch": version, "gpu": properties.name, "device_gb": properties.total_memory / 1e9}


def _alone(row: Sequence[str], exact: Sequence[str], device: str) -> int:
    """What a process of its own is for; the last line is its result."""
    spec, batch, size = (row or exact)[:3]
    if exact:
        found = exactness(spec, int(batch), int(size), device)
    else:
        found = measure(spec, int(batch), int(size), row[3], device)
        found.pop("gradient", None)
    print(json.dumps(found))
    return not is_sound(found)


def _elsewhere(
    deadline: float, arguments: Sequence[str], device: str, **environment: str
) -> dict[str, Any]:
    """What a process of its own found by the deadline."""
    options = ["--rehearse"] if device == "cpu" else []
    try:
        done = subprocess.run(
            [sys.executable, __file__, *options, *arguments],
            capture_output=True,
            text=True,
            timeout=max(deadline - time.perf_counter(), 1),
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return {"skipped": "out of time"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"error": done.stderr[-2000:]}
    if not is_sound(found):
        found["stderr"] = done.stderr[-6000:]
    return found


def _asked(model: Model, policy: str) -> list[str]:
    return ["--row", model.spec, str(model.batch), str(model.size), policy]


def fill(run: Run) -> dict[str, Any]:
    """Compile every step side by side; check kernels and exactness meanwhile."""
    cores = os.cpu_count() or 1
    start = time.perf_counter()
    rates = costs.rates(run.device)  # all plan by one table, measured while nothing else runs
    timed = {"seconds": time.perf_counter() - start, **asdict(rates)}
    print("rates", timed, flush=True)
    each = zip_longest(*([(m, p) for p in m.policies] for m in (run.cnn, run.gpt)))
    asked = [found for pair in each for found in pair if found is not None]
    jobs = {f"{m.spec} {p}": _asked(m, p) for m, p in asked}
    jobs |= {f"{spec} in fp32": ["--exact", spec, *sizes] for spec, *sizes in SMALL}
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    end = start + FILLED * run.left

    def job(name: str) -> dict[str, Any]:
        row = _elsewhere(end, jobs[name], run.device, **threads)
        took = time.perf_counter() - start
        print(f"{took:.0f} s: {name} {row}", flush=True)
        return {"seconds": took, **row}

    # Each compiles in two threads. All at once, on one GPU, no plan of auto was made in 130 s.
    with ThreadPoolExecutor(max(cores // 2, 1)) as pool:
        under_way = {name: pool.submit(job, name) for name in jobs}
        kernels = gpu_kernels.equality(run.device, end)
        rows = {name: row.result() for name, row in under_way.items()}
    ok = kernels["ok"] and all(map(is_sound, rows.values()))
    return {"ok": ok, "rates": timed, "kernels": kernels, "rows": rows}


def steps(run: Run, model: Model) -> dict[str, Any]:
    """A row a policy."""
    rows: dict[str, Any] = {}
    exact = None
    for policy in model.policies:
        if run.left < LEAST:
            rows[policy] = {"skipped": "out of time"}
            continue
        if policy == "offload" and run.device == "cpu":
            rows[policy] = {"skipped": "the CPU's memory is the host's"}
            continue
        row = measure(model.spec, model.batch, model.size, policy, run.device, exact)
        gradient = row.pop("gradient", None)
        exact = gradient if policy == "inductor" else exact
        rows[policy] = row
        print(model.spec, policy, row, flush=True)
    about = {"model": model.spec, "batch": model.batch, "size": model.size}
    return {"ok": all(map(is_sound, rows.values())), **about, "rows": rows}


@contextmanager
def _empty_caches() -> Iterator[dict[str, str]]:
    """Environment variables under which nothing was ever compiled."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}


def cold(run: Run) -> dict[str, Any]:
    """Seconds of a first step with empty caches."""
    found: dict[str, Any] = {}
    for policy in COLD:
        if run.left < LEAST:
            found[policy] = None
            continue
        with _empty_caches() as environment:
            row = _elsewhere(run.deadline, _asked(run.cnn, policy), run.device, **environment)
        found[policy] = row.get("first_step_s")
        print(policy, found[policy], flush=True)
    return {"ok": True, "model": run.cnn.spec, "first_step_s": found}


def largest(run: Run, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks grow with the batch: from that of the table to one at the limit, run to prove it."""
    model = run.cnn
    found: dict[str, Any] = {}
    for policy in LIMITED:
        peak = rows.get(policy, {}).get("activations_mb")
        if peak is None or run.left < LEAST:
            found[policy] = {"skipped": "out of time"}
            continue
        tried = []
        size = int(model.batch * run.peak_mb / peak)
        for _ in range(2):  # the second where the first was too large
            row = measure(model.spec, size, model.size, policy, run.device)
            row.pop("gradient", None)
            tried.append({"batch": size, **row})
            reached = row.get("activations_mb")
            if reached is None or reached <= run.peak_mb or run.left < LEAST:
                break
            size = int(size * run.peak_mb / reached * 0.99)
        within = [t for t in tried if t.get("activations_mb", run.peak_mb + 1) <= run.peak_mb]
        found[policy] = {"largest": max((t["batch"] for t in within), default=None), "tried": tried}
        print(policy, found[policy], flush=True)
    sizes = [found[policy].get("largest") for policy in LIMITED]
    ratio = sizes[1] / sizes[0] if all(sizes) else None
    ok = all(is_sound(t) for row in found.values() for t in row.get("tried", []))
    return {"ok": ok, "model": model.spec, "limit_mb": run.peak_mb, "rows": found, "ratio": ratio}


if __name__ == "__main__":
    sys.exit(main())
