"""Settings of one compile: where they come from, whether they make sense, and their cache key."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fxcompress.errors import FxCompressError, SettingsError
from fxcompress.evidence import Calibration
from fxcompress.overrides import Rule
from fxcompress.overrides import parse as parse_overrides
from fxcompress.plan import Plan
from fxcompress.policies import check_policy, policy
from fxcompress.program import TIME_PRICE

LOWERINGS = ("auto", "triton", "cpu", "inductor")
INNER_COMPILERS = ("inductor", "aot_eager")
ENV_PREFIX = "FXCOMPRESS_"


@dataclass(frozen=True)
class Settings:
    """What the user asked for. Immutable, hashable, and whole: nothing else steers a plan.

    Attributes:
        budget_mb: bound on the peak of activation memory over a training step, in MB (1e6 bytes):
            everything the compiled graphs allocate for intermediates, saved or transient.
            Parameters, gradients, inputs and optimizer state are not counted. None: no bound.
        policy: a name from :func:`fxcompress.policies`.
        seed: seed of the rounding noise; None follows ``torch.manual_seed``.
        ratio_saved: for ``policy="auto"``: aim at 1/ratio_saved of plain Inductor's saved bytes.
        ratio: bound on the peak as a share: 1/ratio of plain Inductor's modelled peak.
        max_grad_error: for ``policy="auto"``: the lowest peak at which the predicted relative error
            of the gradient is at most this: the root of the tensors' predicted squared errors
            summed, over the norm of each graph's own parameter gradients. Tensors whose noise
            could not be measured are not coded.
        max_loss_increase: for ``policy="auto"`` with a calibration on several batches: the lowest
            peak at which noise adds at most this share to the variance that a batch's gradient has
            anyway, being of some samples only. Near a minimum, at a constant rate, the loss that
            SGD cannot get rid of is proportional to that variance (Bottou, Curtis and Nocedal 2018,
            theorem 4.6; AC-GC, Evans and Aamodt 2021, bounds errors by it): 0.05 lets this excess
            grow by a twentieth. Calibrate with ``weighting="adam"`` for Adam.
        time_price: for ``policy="auto"``: the squared gradient error, over the squared norm, that a
            step of twice the time is worth. At 0.05 a plan is 10 % slower where that halves a
            variance of 0.01 and more, not to win at the fourth digit; at 0 only noise counts.
        inner: ``"inductor"``, or ``"aot_eager"`` for quick debugging without code generation.
        lowering: by what payloads are decoded: ``"triton"`` or ``"cpu"``, our kernels;
            ``"inductor"``: operations in the graph, fused with the readers; ``"auto"`` chooses for
            each tensor. All give the same bits (see :mod:`fxcompress.lowering`).
        group: elements that share one scale and minimum.
        min_bytes: saved tensors smaller than this are left alone.
        repeats: how often each compiled graph runs before its backwards do. N for a block that is
            compiled by itself and stands N times in the model: the budget then holds for all of
            them together (each graph of this backend counts N times; outputs and inputs of blocks,
            which stay whole, included).
        calibration: from :func:`fxcompress.calibrate`, or the path of a saved one.
        overrides: rules that fix the representation of some tensors, under any policy: dictionaries
            or JSON text, see :mod:`fxcompress.overrides`.
        replan_every: measure again every so many steps: bases of transform codecs are renewed, and
            a graph is compiled again if that makes its gradients clearly less noisy (see
            :mod:`fxcompress.replan`). Such graphs are not found in the on-disk cache.
        plan: a plan to follow, or the path of a saved one, instead of a policy; each tensor gets
            the representation it has there (see :mod:`fxcompress.load_plan`).
    """

    budget_mb: float | None = None
    policy: str = "auto"
    seed: int | None = None
    ratio_saved: float | None = None
    ratio: float | None = None
    max_grad_error: float | None = None
    max_loss_increase: float | None = None
    time_price: float = TIME_PRICE
    inner: str = "inductor"
    lowering: str = "auto"
    group: int = 256
    min_bytes: int = 16384
    repeats: int = 1
    calibration: Calibration | None = None
    overrides: tuple[Rule, ...] = ()
    plan: Plan | None = None
    replan_every: int | None = None

    def __post_init__(self) -> None:
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise SettingsError(
                "calibration is not what fxcompress.calibrate(model, batch) returns, nor the path "
                "of a saved one"
            )
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise SettingsError(
                "plan is not what fxcompress.explain(model) returns, nor the path of a saved one"
            )
        if not all(isinstance(rule, Rule) for rule in self.overrides):
            raise SettingsError("overrides are rules; fxcompress.backend takes dictionaries too")
        for name, parse in _PARSERS.items():
            if parse not in _KINDS:
                continue
            value = getattr(self, name)
            kind, article = _KINDS[parse]
            is_absent = value is None and name in _OPTIONAL
            if not is_absent and (not isinstance(value, kind) or isinstance(value, bool)):
                raise SettingsError(f"{name}={value!r} is not {article}")
        check_policy(self.policy)
        if self.budget_mb is not None and not (
            math.isfinite(self.budget_mb) and self.budget_mb > 0
        ):
            raise SettingsError(
                f"budget_mb={self.budget_mb!r} is not a positive number of megabytes; give the "
                "activation memory the step may use, e.g. budget_mb=4000, or None for no bound"
            )
        for name, what in (("ratio_saved", "saved bytes"), ("ratio", "peak")):
            ratio = getattr(self, name)
            if ratio is not None and not (math.isfinite(ratio) and ratio >= 1):
                raise SettingsError(
                    f"{name}={ratio!r} must be 1 or more: {name}=8 asks for an eighth of plain "
                    f"Inductor's {what}"
                )
        if self.max_grad_error is not None and not (
            math.isfinite(self.max_grad_error) and self.max_grad_error >= 0
        ):
            raise SettingsError(
                f"max_grad_error={self.max_grad_error!r} must be 0 or more: 0.1 allows an error of "
                "a tenth of the gradient's norm"
            )
        if not (math.isfinite(self.time_price) and self.time_price >= 0):
            raise SettingsError(
                f"time_price={self.time_price!r} must be 0 or more: at 0 only noise counts, at 1 a "
                "step hardly gets slower"
            )
        self._check_together()
        if self.max_loss_increase is not None:
            self._check_loss_increase(self.max_loss_increase)
        if self.inner not in INNER_COMPILERS:
            raise SettingsError(
                f"inner={self.inner!r} is not known; choose one of {', '.join(INNER_COMPILERS)}"
            )
        if self.lowering not in LOWERINGS:
            raise SettingsError(
                f"lowering={self.lowering!r} is not known; choose one of {', '.join(LOWERINGS)}"
            )
        if self.lowering == "triton" and not torch.cuda.is_available():
            raise SettingsError(
                "lowering='triton' needs a GPU, and PyTorch sees none here: install its build for "
                "your GPU, or take lowering='auto', which uses the kernels of the CPU"
            )
        if self.group < 8 or self.group % 8:
            raise SettingsError(f"group={self.group} must be a multiple of 8, 8 or more")
        if self.replan_every is not None and self.replan_every < 1:
            raise SettingsError(f"replan_every={self.replan_every} must be 1 step or more")
        if self.min_bytes < 0:
            raise SettingsError(f"min_bytes={self.min_bytes} must be 0 or more")
        if self.repeats < 1:
            raise SettingsError(
                f"repeats={self.repeats} must be 1 or more, as the model has blocks"
            )

    def _check_together(self) -> None:
        """At most one bound, and a policy that can meet it."""
        bounds = [b for b in _BOUNDS if getattr(self, b) is not None]
        if len(bounds) > 1:
            raise SettingsError(f"give {' or '.join(bounds)}, not both")
        of_auto = [b for b in bounds if b in _BOUNDS[2:]]
        if of_auto and self.plan is None and not policy(self.policy).solves:
            raise SettingsError(
                f"{of_auto[0]} needs a policy that chooses bits; policy={self.policy!r} has its "
                f'own bytes. Use policy="auto" or drop {of_auto[0]}'
            )
        found = policy(self.policy)
        measures = self.plan is None and (found.calibrated or (found.solves and bounds))
        if self.replan_every is not None and not measures:
            raise SettingsError(
                "replan_every measures again what a plan was made from, and this one is made from "
                'no measurements: use policy="auto" with a bound, or drop replan_every'
            )
        if self.plan is not None and (self.policy != "auto" or of_auto):
            raise SettingsError(
                f"a plan has its own choices: drop {of_auto[0] if of_auto else 'policy'}"
            )

    def _check_loss_increase(self, share: float) -> None:
        if not (math.isfinite(share) and share >= 0):
            raise SettingsError(
                f"max_loss_increase={share!r} must be 0 or more: 0.05 allows noise of a twentieth "
                "of the variance between batches"
            )
        if self.calibration is None or self.calibration.scatter is None:
            raise SettingsError(
                f"max_loss_increase={share:g} needs to know how much gradients differ from batch "
                "to batch: pass calibration=fxcompress.calibrate(model, batch1, batch2, loss=…), "
                "on batches of the size that you train on, or smaller"
            )

    @property
    def noise_ceiling(self) -> float | None:
        """Largest allowed squared error of the gradient, over its squared norm; None: no bound."""
        if self.max_grad_error is not None:
            return self.max_grad_error**2
        if self.max_loss_increase is not None:
            assert self.calibration is not None
            assert self.calibration.scatter is not None
            return self.max_loss_increase * self.calibration.scatter
        return None

    def bound_of(self, noise: float) -> float:
        """What would have to be asked for, in the unit of the bound on noise, to allow this."""
        if self.max_loss_increase is None:
            return math.sqrt(noise)
        assert self.calibration is not None
        scatter = self.calibration.scatter
        return noise / scatter if scatter else math.inf

    @property
    def is_bounded(self) -> bool:
        """Memory or noise is bounded, so that ``policy="auto"`` has something to solve."""
        return any(getattr(self, b) is not None for b in _BOUNDS)

    @property
    def budget_bytes(self) -> int | None:
        return None if self.budget_mb is None else int(self.budget_mb * 1e6)

    def key(self) -> str:
        """All that changes a plan, as text (the seed changes noise, not plans)."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seed"}
        if self.calibration is not None:
            given["calibration"] = self.calibration.key()
        if self.plan is not None:
            given["plan"] = self.plan.key()
        return ",".join(f"{k}={v!r}" for k, v in given.items())


def _load_plan(path: str | os.PathLike[str]) -> Plan:
    try:
        return Plan.load(Path(path))
    except FileNotFoundError:
        raise SettingsError(
            f"there is no plan at {path}: make one with fxcompress.explain(model).save(path)"
        ) from None


_PARSERS: dict[str, Any] = {
    "budget_mb": float,
    "policy": str,
    "seed": int,
    "ratio_saved": float,
    "ratio": float,
    "max_grad_error": float,
    "max_loss_increase": float,
    "time_price": float,
    "inner": str,
    "lowering": str,
    "group": int,
    "min_bytes": int,
    "repeats": int,
    "replan_every": int,
    "calibration": Calibration.load,
    "overrides": parse_overrides,
    "plan": _load_plan,
}


_KINDS: dict[Any, tuple[type, str]] = {
    float: (numbers.Real, "a number"),
    int: (numbers.Integral, "a whole number"),
    str: (str, "a text"),
}
# The first two suit any policy.
_BOUNDS = ("budget_mb", "ratio", "ratio_saved", "max_grad_error", "max_loss_increase")
_OPTIONAL = frozenset({*_BOUNDS, "seed", "replan_every"})


def from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Settings named by ``FXCOMPRESS_BUDGET_MB``, ``FXCOMPRESS_POLICY``, … that are set.

    Raises:
        SettingsError: a value that does not parse.
    """
    found = {}
    for name, parse in _PARSERS.items():
        text = environ.get(ENV_PREFIX + name.upper())
        if text:
            try:
                found[name] = parse(text)
            except FxCompressError:
                raise
            except (ValueError, OSError):
                raise SettingsError(
                    f"{ENV_PREFIX}{name.upper()}={text!r} is not a valid {parse.__name__}"
                ) from None
    return found


def make(**given: Any) -> Settings:
    """Settings from keyword arguments over ``FXCOMPRESS_*`` variables over the defaults.

    Raises:
        SettingsError: an unknown name or a value out of range.
    """
    return update(Settings(), {**from_environment(), **given})


def update(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """``settings`` with the ``given`` fields replaced, each checked."""
    known = [f.name for f in fields(Settings)]
    for name in given:
        if name not in known:
            raise SettingsError(f"unknown setting {name!r}; known: {', '.join(known)}")
    for name, load in (("calibration", Calibration.load), ("plan", _load_plan)):
        if isinstance(given.get(name), str | os.PathLike):
            given = {**given, name: load(given[name])}
    if "overrides" in given:
        given = {**given, "overrides": parse_overrides(given["overrides"] or ())}
    return replace(settings, **given)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``torch.compile(options=…)`` split into (ours, Inductor's)."""
    known = {f.name for f in fields(Settings)}
    ours = {k: v for k, v in options.items() if k in known}
    return ours, {k: v for k, v in options.items() if k not in known}
