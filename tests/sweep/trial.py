"""Trial: one model trained for a step by plain torch.compile and by us; a row of the table."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

import torch
from side_by_side import MORE_DRAWS, SUSPICIOUS, Mismatch, SideBySide
from subject import Subject, Trained, loss_of
from torch import Tensor

import fxcompress
from fxcompress.plan import merge
from fxcompress.settings import make

GRAPHS = "graphs"
PASSED, PLAIN_FAILS, FAILED, NOTHING = "passed", "plain fails", "FAILED", "nothing saved"
BIASED, FELL_BACK = "biased", "fell back"
BIAS_SHARE = 0.3  # of the noise; layer and batch norm read a decoded tensor twice


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        inner: what ran our graphs: ``graphs`` is :mod:`side_by_side`, the others are settings of
            ours.
        status: PASSED, NOTHING (no activation is saved, so there is nothing to do), PLAIN_FAILS
            (torch.compile without us cannot train it), BIASED (by more than BIAS_SHARE of the
            noise, at 8 bits, too), FELL_BACK (all of it is left as plain would have it) or FAILED.
        reason: why, where it did not pass; for one that did, graphs left as they were and why.
        graphs: compiled for training.
        saved_mb: by plain torch.compile, 1e6 bytes.
        lossless_ratio, ratio: saved bytes of plain over those of ``lossless`` and ``uniform4``.
        difference: of the gradient of ``lossless``, relative to plain's; 0.0 is bit for bit.
        noise, bias: of the gradient of ``uniform4``, relative to plain's.
        predicted: the noise that a calibrated plan predicts; None where it was not asked for.
        seconds: the whole trial took.
    """

    name: str
    inner: str
    status: str
    reason: str = ""
    graphs: int = 0
    saved_mb: float = 0.0
    lossless_ratio: float | None = None
    ratio: float | None = None
    difference: float | None = None
    noise: float | None = None
    bias: float | None = None
    predicted: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    random_state: Tensor


class Run:
    """The model compiled by one backend; every step starts from the same state and seed."""

    def __init__(self, trained: Trained, backend: Any) -> None:
        torch._dynamo.reset()
        self.trained, self.backend = trained, backend
        self.buffers = {k: b.clone() for k, b in trained.model.named_buffers()}
        self.compiled = torch.compile(trained.model, backend=backend)

    def step(self) -> Step:
        model = self.trained.model
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        try:
            output = self.compiled(*self.trained.args, **self.trained.kwargs)
            loss_of(output).backward()
            leaves = torch.utils._pytree.tree_leaves(output)
            return Step(
                [y.detach().clone() for y in leaves if isinstance(y, Tensor)],
                {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None},
                torch.get_rng_state(),
            )
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(self.buffers[name])


def attempt(subject: Subject, inner: str = "aot_eager", *, predict: bool = False) -> Row:
    """Try one subject; whatever goes wrong is in the row."""
    started = time.perf_counter()
    row = Row(subject.name, inner, FAILED)
    try:
        row = _graphs(subject) if inner == GRAPHS else _plain_then_ours(subject, inner, predict)
    except Mismatch as error:
        row = replace(row, reason=str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        row = replace(row, reason=f"{_short(error)} ({where.filename.split('/')[-1]})")
    finally:
        torch._dynamo.reset()
    return replace(row, seconds=round(time.perf_counter() - started, 1))


def _graphs(subject: Subject, policy: str = "uniform4") -> Row:
    """One trace; the graphs of plain torch.compile and ours run op by op on the same values."""
    row = Row(subject.name, GRAPHS, PASSED)
    exact, lossy = (make(policy=p, min_bytes=0, group=subject.group) for p in ("lossless", policy))
    backend = SideBySide(exact, lossy, draws=subject.draws, predict=subject.predict)
    torch.manual_seed(0)
    trained = subject.make()
    torch.manual_seed(5)
    fxcompress.manual_seed(1)
    try:
        output = torch.compile(trained.model, backend=backend)(*trained.args, **trained.kwargs)
        loss_of(output).backward()
    except Mismatch:
        raise
    except Exception as error:
        if reason := _plain_fails(trained):
            return replace(row, status=PLAIN_FAILS, reason=reason)
        raise error
    graphs = [g for g in backend.graphs if g.ran]
    if not graphs:
        return replace(row, status=PLAIN_FAILS, reason="torch.compile compiles no part of it")
    lossless, plan = (merge(g.plans[p] for g in graphs) for p in ("exact", "lossy"))
    row = replace(row, graphs=len(graphs), reason=lossless.note, difference=0.0)
    row = replace(row, saved_mb=plan.saved_bytes_before / 1e6, lossless_ratio=_ratio(lossless))
    if not plan.tensors:
        return replace(row, status=_without_tensors(plan))
    noises = [g.noise for g in graphs if g.noise is not None]
    norm = sum(n.norm for n in noises) or 1.0
    if not math.isfinite(norm):
        return replace(row, status=PLAIN_FAILS, reason="its gradients are not finite")
    noise, bias = (math.sqrt(sum(getattr(n, k) for n in noises) / norm) for k in ("noise", "bias"))
    row = replace(row, ratio=_ratio(plan), noise=noise, bias=bias)
    if subject.predict:
        row = replace(row, predicted=math.sqrt(sum(n.predicted or 0.0 for n in noises) / norm))
    if bias > BIAS_SHARE * noise:
        row = replace(row, status=BIASED)
        if policy == "uniform4":
            finer = _graphs(replace(subject, draws=MORE_DRAWS, predict=False), "uniform8")
            row = replace(row, status=finer.status, reason=_at_8_bits(finer.noise, finer.bias))
    return row


def _at_8_bits(noise: float | None, bias: float | None) -> str:
    return f"at 8 bits the bias is {(bias or 0.0) / (noise or 1.0):.2f} of the noise"


def _plain_fails(trained: Trained) -> str:
    """Why torch.compile without us cannot train the model; empty if it can."""
    try:
        step = Run(trained, fxcompress.backend(policy="inductor", inner="aot_eager")).step()
    except Exception as error:
        return _short(error)
    return "" if math.isfinite(_square(step.gradients)) else "its gradients are not finite"


def _plain_then_ours(subject: Subject, inner: str, predict: bool) -> Row:
    row = Row(subject.name, inner, PASSED)
    settings = {"inner": inner, "min_bytes": 0, "group": subject.group}
    try:
        torch.manual_seed(0)
        trained = subject.make()
        plain = Run(trained, fxcompress.backend(policy="inductor", **settings))
        expected = plain.step()
        if not expected.gradients or not any(g.numel() for g in expected.gradients.values()):
            return replace(row, status=PLAIN_FAILS, reason="no parameter gets a gradient")
        if not math.isfinite(_square(expected.gradients)):
            return replace(row, status=PLAIN_FAILS, reason="its gradients are not finite")
        repeats = _difference(plain.step(), expected) == 0
    except Exception as error:
        return replace(row, status=PLAIN_FAILS, reason=_short(error))

    lossless = Run(trained, fxcompress.backend(policy="lossless", **settings))
    difference = _difference(lossless.step(), expected)
    exact = inner == "aot_eager" and repeats
    if difference > (0.0 if exact else 1e-5):
        raise Mismatch(f"lossless gradients are off by {difference:.2e}")
    if not lossless.backend.plans:
        return replace(row, status=PLAIN_FAILS, reason="torch.compile compiles no part of it")
    plan = lossless.backend.plan()
    _check_notes(plan.note)
    row = replace(row, graphs=plan.graphs, difference=difference, reason=plan.note)
    row = replace(row, saved_mb=plan.saved_bytes_before / 1e6, lossless_ratio=_ratio(plan))
    if not plan.tensors:
        return replace(row, status=_without_tensors(plan))

    calibration = None
    if predict:
        batch: Any = dict(trained.kwargs) if trained.kwargs else trained.args
        try:
            calibration = fxcompress.calibrate(
                trained.model, batch, loss=loss_of, min_bytes=0, group=subject.group
            )
        except Exception as error:
            raise Mismatch(f"calibrate: {_short(error)}") from error
    lossy = Run(trained, fxcompress.backend(policy="uniform4", calibration=calibration, **settings))
    noise, bias = _noise_and_bias(lossy, expected, subject.draws, same_outputs=exact)
    plan = lossy.backend.plan()
    _check_notes(plan.note)
    row = replace(row, ratio=_ratio(plan), noise=noise, bias=bias)
    if bias > BIAS_SHARE * noise:
        finer = Run(trained, fxcompress.backend(policy="uniform8", **settings))
        noise, bias = _noise_and_bias(finer, expected, MORE_DRAWS, same_outputs=exact)
        vanishes = bias <= BIAS_SHARE * noise
        row = replace(row, status=PASSED if vanishes else BIASED, reason=_at_8_bits(noise, bias))
    if calibration is not None and plan.calibrated:
        row = replace(row, predicted=math.sqrt(plan.predicted_variance))
    return row


def _noise_and_bias(
    run: Run, exact: Step, draws: int, *, same_outputs: bool
) -> tuple[float, float]:
    """Both relative to the gradient's norm; the bias is what chance does not explain.

    Raises:
        Mismatch: another forward, or gradients that are not finite.
    """
    fxcompress.manual_seed(1)
    total = {k: torch.zeros_like(g) for k, g in exact.gradients.items()}
    noise = 0.0
    for _ in range(draws):
        step = run.step()
        _difference(replace(step, gradients=exact.gradients), exact, exact=same_outputs)
        errors = _minus(step.gradients, exact.gradients)
        noise += _square(errors) / draws
        for name, error in errors.items():
            total[name] += error
    if not math.isfinite(noise):
        raise Mismatch("uniform4 gradients are not finite")
    mean = _square(total) / draws**2
    if draws < MORE_DRAWS and mean * draws > SUSPICIOUS * noise:
        return _noise_and_bias(run, exact, MORE_DRAWS, same_outputs=same_outputs)
    norm = math.sqrt(_square(exact.gradients)) or 1.0
    # E|mean|² = bias² + variance/n, and E|error|² = bias² + variance.
    bias = math.sqrt(max((mean - noise / draws) / (1 - 1 / draws), 0.0)) / norm
    if mean * draws <= SUSPICIOUS * noise:
        bias = 0.0  # chance
    return math.sqrt(noise) / norm, bias


def _difference(found: Step, expected: Step, *, exact: bool = False) -> float:
    """Relative difference of the gradients, 0.0 if they are the same bits.

    Raises:
        Mismatch: the forward or the random state differ, or a gradient is missing.
    """
    if len(found.outputs) != len(expected.outputs):
        raise Mismatch("another number of outputs")
    for mine, theirs in zip(found.outputs, expected.outputs, strict=True):
        close = torch.equal if exact else torch.allclose
        same = close(mine, theirs) or torch.allclose(mine, theirs, equal_nan=True)
        if not same:
            raise Mismatch("the forward returns something else")
    if not torch.equal(found.random_state, expected.random_state):
        raise Mismatch("PyTorch's random state is another one")
    if found.gradients.keys() != expected.gradients.keys():
        raise Mismatch("other parameters get gradients")
    pairs = [(found.gradients[k], g) for k, g in expected.gradients.items()]
    if all(torch.equal(a, b) for a, b in pairs):
        return 0.0
    error = _square(_minus(found.gradients, expected.gradients))
    return max(math.sqrt(error / (_square(expected.gradients) or 1.0)), 1e-30)


def _minus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: a[name] - b[name] for name in b}


def _square(gradients: dict[str, Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradients.values())


def _ratio(plan: fxcompress.Plan) -> float:
    return plan.saved_bytes_before / max(plan.saved_bytes, 1) if plan.saved_bytes_before else 1.0


def _check_notes(note: str) -> None:
    if "a pass failed" in note:
        raise Mismatch(note)


def _without_tensors(plan: fxcompress.Plan) -> str:
    return NOTHING if "nothing is saved" in plan.note else FELL_BACK


def _short(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", None) or error
    text = str(inner).strip().split("\n")[0]
    return f"{type(inner).__name__}: {text}"[:160]
