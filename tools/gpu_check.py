"""Everything that only a GPU can show, in one run of at most 8 minutes, from a bare checkout.

    python tools/gpu_check.py --out gpu.json

Needs a GPU, torch, triton, and what they are usually installed with; fxcompress need not be
installed. Each part is measured as long as time is left, and written down when it is done:

    kernels  every family's kernels equal the reference on CPU, bit for bit (transform: within the
             rounding of its matrix products); their bandwidth beside the device's own copy
    graphs   under a CUDA graph each replay draws new noise, and decodes what eager code does
    cnn      ResNet-50 in bf16, by policy: step, compile time, saved bytes, error of the gradient
             and true peak (torch.cuda.max_memory_allocated) beside plain Inductor and PyTorch's
             memory budget; auto@12 saves 1/12 of the bytes, auto@40% has 40 % of plain's peak as
             its budget, and fails where a step takes more
    batch    the largest batch of ResNet-50 within a fixed peak: predicted, then run
    gpt      as cnn, for a GPT

The last line is one JSON object, also written to --out. Exit status: 0 all is well, 1 a check
failed or broke, 3 there is no GPU. `--rehearse` runs what can be run on a CPU, at small sizes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
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
from torch import Tensor  # noqa: E402

import fxcompress  # noqa: E402
from fxcompress import rng, torch_private  # noqa: E402
from fxcompress.codecs import Codec, codec, fused  # noqa: E402
from fxcompress.errors import BudgetError, SettingsError  # noqa: E402
from fxcompress.fit import at_rate, fit  # noqa: E402
from fxcompress.tools import harness, memory, models  # noqa: E402
from fxcompress.tools.models import Task  # noqa: E402

KERNELS = (
    *("affine(bits=1)", "affine(bits=2)", "affine(bits=4)", "affine(bits=8)", "affine(bits=3)"),
    *("dither(bits=4)", "rotate(bits=1)", "rotate(bits=2)", "rotate(bits=4)", "rotate(bits=5)"),
    *("subsample(rate=0.5)", "subsample(rate=0.0625)", "average(beta=0.5)", "sign(scale=mean)"),
    *("magnitude(levels=4)", "cast(format=bf16)", "cast(format=fp16,rounding=stochastic)"),
    *("cast(format=e4m3)", "cast(format=e5m2,rounding=stochastic)", "bits(bits=1)"),
)
# A kernel takes the GPU's compiler about a second: in bf16 those that differ most.
FUSED = ("affine(bits=4)", "dither(bits=4)", "rotate(bits=2)")  # with what stands around them
KERNELS_BF16 = ("affine(bits=4)", "dither(bits=4)", "rotate(bits=2)", "cast(format=e4m3)")
POLICIES = (
    *("inductor", "auto@12", "auto@40%", "uniform4", "uniform2"),
    *("torch-budget", "lossless", "offload"),
)
PLAIN = ("inductor", "torch-budget")  # without us
LIMITED = ("inductor", "auto@12")  # whose largest batch is sought
STREAM = 3


@dataclass(frozen=True)
class Run:
    """How and on what to measure."""

    device: str
    deadline: float
    elements: int
    """Of the tensors that bandwidth is measured on."""
    cnn: tuple[str, int, int]
    """(model, batch, size)."""
    gpt: tuple[str, int, int]
    peak_mb: float
    """Of activations, that the largest batch must stay within."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="also write the JSON here, part by part")
    parser.add_argument("--seconds", type=float, default=450, help="start nothing new after these")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, small: tries the script")
    args = parser.parse_args(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        print("There is no GPU that PyTorch sees: nothing was measured. --rehearse needs none.")
        return NO_GPU
    deadline = time.perf_counter() + args.seconds
    if args.rehearse:
        cnn, gpt = ("torchvision:resnet18", 4, 32), ("gpt:small", 2, 32)
        run = Run("cpu", deadline, 1 << 20, cnn, gpt, 45)
    else:
        cnn, gpt = ("torchvision:resnet50", 64, 224), ("gpt:base", 16, 512)
        run = Run("cuda", deadline, 1 << 26, cnn, gpt, 8000)
    found: dict[str, Any] = {"machine": _machine(run), "rehearsal": args.rehearse}
    status = 0
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: kernels(run),
        "graphs": lambda: graphs(run),
        "cnn": lambda: steps(run, run.cnn, 0.4 * run.left),
        "batch": lambda: batch(run, found["cnn"].get("rows", {})),
        "gpt": lambda: steps(run, run.gpt, 0),
    }
    for name, part in parts.items():
        print(f"== {name}, {run.left:.0f} s left", flush=True)
        try:
            found[name] = part()
        except Exception:
            found[name] = {"ok": False, "error": traceback.format_exc()}
            print(found[name]["error"], flush=True)
        status |= not found[name]["ok"]
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return int(status)


def _machine(run: Run) -> dict[str, Any]:
    version = str(torch.__version__)
    if not run.cuda:
        return {"torch": version, "gpu": None, "device_gb": None}
    properties = torch.cuda.get_device_properties(0)
    return {"torch": version, "gpu": properties.name, "device_gb": properties.total_memory / 1e9}


# ---- kernels ----


def kernels(run: Run) -> dict[str, Any]:
    """Equality and bandwidth of each codec, fp32 and bf16."""
    rows, copy = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(run.elements, device=run.device).to(dtype)
        y = torch.empty_like(x)
        copy[str(dtype)] = 2 * x.nbytes / seconds(run, partial(y.copy_, x)) / 1e9
        for spec in KERNELS if dtype == torch.float32 else KERNELS_BF16:
            if run.cuda and run.left < 300:
                break
            row = _kernel(run, codec(spec), x, copy[str(dtype)])
            print(row, flush=True)
            rows.append(row)
        for spec in FUSED:
            if run.cuda and run.left < 300:
                break
            rows.append(_fused(run, codec(spec), x, copy[str(dtype)]))
            print(rows[-1], flush=True)
        if not run.cuda or run.left > 300:
            rows.append(_transform(run, x, copy[str(dtype)]))
            print(rows[-1], flush=True)
    ok = bool(rows) and all(row["equal"] for row in rows)
    return {"ok": ok, "copy_gb_s": copy, "rows": rows}


def _kernel(run: Run, c: Codec, x: Tensor, copy_gb_s: float) -> dict[str, Any]:
    x = x > 0 if c.lossless else x
    key = torch.tensor([0x1234567890ABCDEF, 7])
    row = _timed(run, c, x, key, copy_gb_s)  # first: kernels are tuned when a large tensor comes
    equal = True
    for size in (1, 77, 5000, (1 << 20) + 333):  # tails, and whole tiles with one
        part = x[:size].contiguous()
        expected = c.encode(part.cpu(), key, STREAM)
        payload = c.encode(part, key.to(run.device), STREAM)
        decoded = c.decode(expected, part.shape, part.dtype, key, STREAM)
        found = c.decode(payload, part.shape, part.dtype, key.to(run.device), STREAM)
        equal &= torch.equal(payload.cpu(), expected) and torch.equal(found.cpu(), decoded)
    return {**row, "equal": equal}


def _fused(run: Run, c: Codec, x: Tensor, copy_gb_s: float) -> dict[str, Any]:
    """With a mask and in units of channels, as the CPU does by parts; bandwidth with the mask."""
    key, fill = torch.tensor([0x1234567890ABCDEF, 7]), torch.tensor(0.75, dtype=x.dtype)
    given, value = key.to(run.device), fill.to(run.device)
    payload, mask = fused.encode_filled(c, x, value, given, STREAM)
    moved, decoding = (x.nbytes + payload.nbytes + mask.nbytes) / 1e9, (x.shape, x.dtype, given)
    encode = seconds(run, lambda: fused.encode_filled(c, x, value, given, STREAM))
    decode = seconds(run, lambda: fused.decode_filled(c, payload, mask, *decoding, STREAM))
    equal = True
    for rows in (1, 4321):  # a tail, and whole tiles with one
        part = x[: rows * 240].view(rows, 48, 5)
        own, shape = part.cpu(), part.shape
        both = fused.compose_filled(c, own, fill, key, STREAM)
        found = fused.encode_filled(c, part, value, given, STREAM)
        equal &= all(torch.equal(a.cpu(), b) for a, b in zip(found, both, strict=True))
        decoded = fused.decode_filled(c, *found, shape, x.dtype, given, STREAM)
        expected = fused.compose_unfilled(c, *both, shape, x.dtype, key, STREAM)
        equal &= torch.equal(decoded.cpu(), expected)
        for kept in (1, 2):  # channels first, channels last
            sizes = [size if dim == kept else 1 for dim, size in enumerate(shape)]
            mean, rstd = torch.randn(sizes), torch.rand(sizes) + 0.1
            units = fused.compose_standardised(c, own, mean, rstd, key, STREAM)
            on_device = (mean.to(run.device), rstd.to(run.device))
            coded = fused.encode_standardised(c, part, *on_device, given, STREAM)
            equal &= torch.equal(coded.cpu(), units)
    row = _row(f"{c} with a mask", x.dtype, moved / encode, moved / decode, copy_gb_s)
    return {**row, "equal": equal}


def _transform(run: Run, x: Tensor, copy_gb_s: float) -> dict[str, Any]:
    """Two bits an element in a basis fitted to correlated channels and pixels.

    A payload decodes to the same on both devices, within the rounding of sums; what each encodes
    is as near to x.
    """
    x = x.view(-1, 16, 16, 64).cumsum(1).cumsum(2)
    x = (x + 4 * x.mean(3, keepdim=True)).contiguous()
    sample, key = x[:64].cpu(), torch.tensor([0x1234567890ABCDEF, 7])
    c = at_rate(fit(sample.float(), [torch.randn(sample.shape)], -1), 2.0)
    payload = c.encode(x[:64], key.to(run.device), STREAM)
    found = c.decode(payload, sample.shape, x.dtype, key.to(run.device), STREAM).cpu().float()
    same = c.decode(payload.cpu(), sample.shape, x.dtype, key, STREAM).float()
    own = c.encode(sample, key, STREAM)
    other = c.decode(own, sample.shape, x.dtype, key, STREAM).float()
    near = 5e-2 if x.dtype == torch.bfloat16 else 1e-3  # of the spread: an ulp of large values
    errors = [float((y - sample.float()).square().mean()) for y in (found, other)]
    equal = float((found - same).abs().max()) < near * float(sample.float().std())
    equal &= abs(errors[0] / errors[1] - 1) < 0.05
    return {**_timed(run, c, x, key, copy_gb_s), "equal": equal}


def _timed(run: Run, c: Codec, x: Tensor, key: Tensor, copy_gb_s: float) -> dict[str, Any]:
    given = key.to(run.device)
    payload = c.encode(x, given, STREAM)
    moved = (x.nbytes + payload.nbytes) / 1e9
    encode = moved / seconds(run, lambda: c.encode(x, given, STREAM))
    decode = moved / seconds(run, lambda: c.decode(payload, x.shape, x.dtype, given, STREAM))
    return _row(str(c), x.dtype, encode, decode, copy_gb_s)


def _row(
    codec: str, dtype: torch.dtype, encode: float, decode: float, copy_gb_s: float
) -> dict[str, Any]:
    return {
        "codec": codec,
        "dtype": str(dtype),
        "encode_gb_s": encode,
        "decode_gb_s": decode,
        "encode_vs_copy": encode / copy_gb_s,
        "decode_vs_copy": decode / copy_gb_s,
    }


def seconds(run: Run, call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call, the first one left out."""
    call()
    if not run.cuda:
        return median(_clock(call) for _ in range(3))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3


def _clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- CUDA graphs ----


def graphs(run: Run) -> dict[str, Any]:
    """Capture a step's key, an encode and a decode; replay twice."""
    if not run.cuda:
        return {"ok": True, "skipped": "no CUDA graphs on CPU"}
    x = torch.randn(100_000, device="cuda")
    c = codec("rotate(bits=2)")
    rng.prepare(x.device)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        key = torch.ops.fxcompress.next_key("", x.device)
        payload = torch.ops.fxcompress.encode(x, key, c.spec, STREAM, [0])
        decoded = torch.ops.fxcompress.decode(
            payload, key, c.spec, STREAM, list(x.shape), [0], x.dtype
        )
        return key, payload, decoded

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        key, payload, decoded = step()
    seen = []
    for _ in range(2):
        graph.replay()
        eager = c.encode(x, key, STREAM)
        again = c.decode(eager, x.shape, x.dtype, key, STREAM)
        same = torch.equal(payload, eager) and torch.equal(decoded, again)
        seen.append((key.tolist(), same))
    advanced = seen[1][0][1] == seen[0][0][1] + 1
    return {"ok": advanced and all(same for _, same in seen), "keys": [key for key, _ in seen]}


# ---- training steps ----


def steps(run: Run, task: tuple[str, int, int], reserve: float) -> dict[str, Any]:
    """A row a policy, as long as more than `reserve` seconds are left."""
    model, batch_size, size = task
    rows: dict[str, Any] = {}
    exact = None
    for policy in POLICIES:
        if run.left < max(reserve, 30):
            rows[policy] = {"skipped": "out of time"}
            continue
        if policy == "offload" and not run.cuda:
            rows[policy] = {"skipped": "the CPU's memory is the host's"}
            continue
        row = measure(run, policy, model, batch_size, size, rows.get("inductor"))
        gradient = row.pop("gradient", None)
        exact = gradient if policy == "inductor" else exact
        if gradient is not None and exact is not None:
            row["grad_error"] = float((gradient - exact).norm() / exact.norm())
        rows[policy] = row
        print(model, policy, row, flush=True)
    ok = all("error" not in row and row.get("holds", True) for row in rows.values())
    return {"ok": ok, "model": model, "batch": batch_size, "size": size, "rows": rows}


def measure(
    run: Run, policy: str, model: str, batch_size: int, size: int, plain: dict[str, Any] | None
) -> dict[str, Any]:
    """One policy on one model: what a row of the table says, or why there is none.

    Args:
        plain: the row of plain Inductor, of whose peak a budget is a share.
    """
    try:
        return _measure(run, _settings(policy, plain), model, batch_size, size)
    except BudgetError as error:
        return {"refused": str(error)[:500]}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if run.cuda:
            torch.cuda.empty_cache()


def _settings(policy: str, plain: dict[str, Any] | None) -> dict[str, Any]:
    """Of the backend; ``auto@40%`` has that share of plain Inductor's peak as its budget."""
    if not policy.endswith("%"):
        return {"policy": policy} if policy in PLAIN else harness.settings_of(policy)
    if plain is None or "activations_mb" not in plain:
        raise SettingsError(f"{policy}: plain Inductor's peak is not known")
    base, _, share = policy.partition("@")
    return {"policy": base, "budget_mb": float(share[:-1]) / 100 * plain["activations_mb"]}


def _measure(
    run: Run, settings: dict[str, Any], model: str, batch_size: int, size: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    task = _bf16(models.load(model, batch_size, size, run.device))
    compiled = torch.compile(task.model, backend=_backend(settings))

    def step() -> None:
        task.model.zero_grad(set_to_none=True)
        task.forward(compiled).backward()

    compile_s = _clock(step)
    step()
    saved = memory.measure_saved(task.forward(compiled), task.held())
    task.model.zero_grad(set_to_none=True)
    row: dict[str, Any] = {"compile_s": compile_s, "saved_mb": saved.activation_bytes / 1e6}
    row |= _peaks(run, step, task)
    row["step_ms"] = median(_clock(step) for _ in range(20 if run.cuda else 2)) * 1e3
    if settings["policy"] not in PLAIN:
        row["planned_mb"] = (fxcompress.explain(compiled).planned_peak_bytes or 0) / 1e6
    if "budget_mb" in settings:
        row["budget_mb"] = settings["budget_mb"]
        row["holds"] = row["activations_mb"] <= row["budget_mb"]
    torch.manual_seed(1)
    fxcompress.manual_seed(1)
    step()
    gradients = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
    return {**row, "gradient": torch.cat(gradients).float().cpu()}


def _bf16(task: Task) -> Task:
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in task.inputs)
    return replace(task, model=task.model.bfloat16(), inputs=inputs)


def _backend(settings: dict[str, Any]) -> Any:
    """PyTorch's own budget is asked for half of the activations."""
    if settings["policy"] == "torch-budget":
        return torch_private.inductor_with_memory_budget(0.5)
    return "inductor" if settings["policy"] == "inductor" else fxcompress.backend(**settings)


def _peaks(run: Run, step: Callable[[], None], task: Task) -> dict[str, float]:
    """MB over what was there before a step.

    `peak_mb` is all, as CUDA counts it (on a CPU there is no such count); `activations_mb` is
    without the gradients of parameters, as budgets are understood.
    """
    measured = memory.measure_step(step, task.model.parameters())
    found = {"activations_mb": measured.peak_bytes / 1e6}
    task.model.zero_grad(set_to_none=True)
    if run.cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        task.model.zero_grad(set_to_none=True)
    return found


# ---- largest batch ----


def batch(run: Run, rows: dict[str, Any]) -> dict[str, Any]:
    """Peaks grow with the batch: from that of the table to one at the limit, run to prove it."""
    model, number, size = run.cnn
    found: dict[str, Any] = {}
    for policy in LIMITED:
        peak = rows.get(policy, {}).get("activations_mb")
        if peak is None or run.left < 30:
            found[policy] = {"skipped": "out of time"}
            continue
        tried = []
        largest = int(number * run.peak_mb / peak)
        for _ in range(2):  # the second where the first was too large
            row = measure(run, policy, model, largest, size, None)
            row.pop("gradient", None)
            tried.append({"batch": largest, **row})
            reached = row.get("activations_mb")
            if reached is None or reached <= run.peak_mb or run.left < 60:
                break
            largest = int(largest * run.peak_mb / reached * 0.99)
        fits = [
            t["batch"] for t in tried if t.get("activations_mb", run.peak_mb + 1) <= run.peak_mb
        ]
        found[policy] = {"largest": max(fits, default=None), "tried": tried}
        print(policy, found[policy], flush=True)
    sizes = [found[policy].get("largest") for policy in LIMITED]
    ratio = sizes[1] / sizes[0] if all(sizes) else None
    ok = all("error" not in t for row in found.values() for t in row.get("tried", []))
    return {"ok": ok, "model": model, "limit_mb": run.peak_mb, "rows": found, "ratio": ratio}


if __name__ == "__main__":
    sys.exit(main())
