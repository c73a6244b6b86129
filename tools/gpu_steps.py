"""What `gpu_check` asks of whole training steps in bf16: memory, time, gradients, by policy."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fxcompress
from fxcompress import torch_private
from fxcompress.errors import BudgetError
from fxcompress.tools import harness, memory, models
from fxcompress.tools.models import Task

PLAIN = ("inductor", "torch-budget")  # without us
EXACT = ("lossless", "offload")
WARM, TIMED = 3, 20  # steps


@dataclass(frozen=True)
class Model:
    """A model, its batch, and what is tried on it: plain Inductor first."""

    spec: str
    batch: int
    size: int
    policies: tuple[str, ...]


def measure(
    spec: str, batch: int, size: int, policy: str, device: str, exact: Tensor | None = None
) -> dict[str, Any]:
    """What a row of the table says, or why there is none; `gradient` is for the next call.

    Args:
        exact: the gradient of plain Inductor, from the same random state.
    """
    try:
        return _measure(spec, batch, size, policy, device, exact)
    except BudgetError as error:
        return {"refused": str(error)[:500]}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def is_sound(row: dict[str, Any]) -> bool:
    """It was measured, or refused, and a budget held."""
    return "error" not in row and row.get("holds", True) and row.get("ok", True)


def _measure(
    spec: str, batch: int, size: int, policy: str, device: str, exact: Tensor | None
) -> dict[str, Any]:
    torch.manual_seed(0)
    task = _bf16(models.load(spec, batch, size, device))
    backend, settings = _backend(policy)
    compiled = torch.compile(task.model, backend=backend)

    def step() -> None:
        task.model.zero_grad(set_to_none=True)
        task.forward(compiled).backward()

    row: dict[str, Any] = {"first_step_s": _clock(step, device)}
    step()
    saved = memory.measure_saved(task.forward(compiled), task.held())
    row["saved_mb"] = saved.activation_bytes / 1e6
    row |= _peaks(step, task, device)
    for _ in range(WARM):
        step()
    row["step_ms"] = median(_clock(step, device) for _ in range(TIMED)) * 1e3
    if settings:
        row["planned_mb"] = (fxcompress.explain(compiled).planned_peak_bytes or 0) / 1e6
    if "budget_mb" in settings:
        row["holds"] = row["activations_mb"] <= settings["budget_mb"]
    torch.manual_seed(1)
    fxcompress.manual_seed(1)
    step()
    gradients = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
    gradient = torch.cat(gradients).float().cpu()
    if exact is not None:
        row["grad_error"] = float((gradient - exact).norm() / exact.norm())
    return {**row, "gradient": gradient}


def exactness(spec: str, batch: int, size: int, device: str) -> dict[str, Any]:
    """Gradients in fp32 of what changes no value, beside plain Inductor's.

    `again` is plain Inductor a second time: what the GPU's own sums of changing order make of it.
    """
    torch.backends.cudnn.allow_tf32 = False
    exact: dict[str, Tensor] = {}
    found: dict[str, Any] = {"worst": {}}
    exactly = EXACT if device == "cuda" else EXACT[:1]
    for policy in ("inductor", "again", *exactly):
        torch.manual_seed(0)
        task = models.load(spec, batch, size, device)
        torch._dynamo.reset()
        compiled = torch.compile(
            task.model, backend=_backend(policy.replace("again", "inductor"))[0]
        )
        for seed in (0, 1):  # the second finds what the first has left in memory
            task.model.zero_grad(set_to_none=True)
            torch.manual_seed(seed)
            task.forward(compiled).backward()
        given = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
        if policy == "inductor":
            exact = given
            continue
        off = {n: float((given[n] - g).norm()) for n, g in exact.items()}
        total = sum(float(g.norm()) ** 2 for g in exact.values()) ** 0.5
        found[policy] = sum(e**2 for e in off.values()) ** 0.5 / total
        found["worst"][policy] = sorted(off, key=lambda n: -off[n])[:5]
    return {"ok": all(found[p] <= max(1e-4, 10 * found["again"]) for p in exactly), **found}


def _bf16(task: Task) -> Task:
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in task.inputs)
    return replace(task, model=task.model.bfloat16(), inputs=inputs)


def _backend(policy: str) -> tuple[Any, dict[str, Any]]:
    """(the backend, our settings). PyTorch's own budget is asked for half of the activations."""
    if policy == "torch-budget":
        return torch_private.inductor_with_memory_budget(0.5), {}
    if policy == "inductor":
        return "inductor", {}
    settings = harness.settings_of(policy)
    return fxcompress.backend(**settings), settings


def _clock(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peaks(step: Callable[[], None], task: Task, device: str) -> dict[str, float]:
    """MB over what was there before a step.

    `activations_mb` is without the gradients of parameters, as budgets are understood; `peak_mb`
    is all, as CUDA counts it.
    """
    measured = memory.measure_step(step, task.model.parameters())
    found = {"activations_mb": measured.peak_bytes / 1e6}
    task.model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        task.model.zero_grad(set_to_none=True)
    return found
