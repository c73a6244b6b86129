"""Sensitivity: what noise in each saved tensor does to the parameter gradients, all at once.

Let ``g(s)`` be the parameter gradients that the backward graph computes from the saved tensors
``s``. For a random vector ``v`` of signs, ``w = J_s(g)ᵀ v`` is one vector–Jacobian product through
the backward graph (a double backward), and per element ``E[w²] = Σ_p (∂g_p/∂s)²``. Independent
noise of variance ``σ²`` in each element then adds ``Σ E[w²]·σ²`` to the squared error of the
gradient, and a fixed error ``e`` adds ``E[(w·e)²]``. So one product prices every tensor under every
codec, where perturbing the tensors one by one (GACT, arXiv 2206.11357) takes passes for each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.codecs import codec
from fxcompress.codecs.groups import groups, mean_square
from fxcompress.evaluate import Evaluation, evaluate
from fxcompress.evidence import Price
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.capture import placeholders
from fxcompress.passes.rectified import filled, mask_of
from fxcompress.passes.standardise import units_of
from fxcompress.passing import REFERENCE, passed
from fxcompress.perturb import leads_to, mean_derivatives
from fxcompress.record import Recording, backward_inputs, run_forward

log = logging.getLogger("fxcompress")

WEIGHTINGS = ("plain", "relative", "adam")
WEIGHTING = "plain"
FAINT = 1e-4  # of the mean square of all elements
HELD_AS = torch.bfloat16  # derivatives of all tensors are held at once; what counts is their size

_MAKES_ANEW = re.compile(r"::(new_|.*_like$)")  # values do not matter to these
# PyTorch's own operators, and those of torch.library.custom_op.
_NO_DERIVATIVE = re.compile(
    r"derivative for '?([\w:.]+)'? is not implemented"
    r"|backward through ([\w:.]+) but no autograd formula was registered"
)


@dataclass(frozen=True)
class Measured:
    """One saved tensor as its codec would see it, and what its errors do.

    Attributes:
        candidate: the tensor.
        values: what would be encoded (batch-norm inputs standardised), in storage order.
        weights: for each probe ``v``, the derivative of ``v·g`` by ``values``, in the same order,
            as `HELD_AS`; None where the backward has no derivative.
        through: the same through all tensors that may be rebuilt of it (passing.py); none where
            there are none.
    """

    candidate: Candidate
    values: Tensor
    weights: tuple[Tensor, ...] | None
    through: tuple[Tensor, ...] = ()

    @property
    def readings(self) -> tuple[Tensor, ...]:
        """How the gradient may read it: by itself, and with all that may be rebuilt of it."""
        own = self.weights or ()
        return own + tuple(w + u for w, u in zip(own, self.through, strict=bool(self.through)))


@dataclass(frozen=True)
class Sensitivity:
    """Saved tensors of a recording under probes, and its exact gradient.

    Attributes:
        gradient: of each parameter, weighed as its errors are.
        gradient_square: squared norm of the unweighed gradient.
        passed: what noise does through rebuilt tensors (see :func:`fxcompress.passing.passed`).
    """

    tensors: tuple[Measured, ...]
    gradient: tuple[Tensor, ...]
    gradient_square: float
    passed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def sensitivity(
    recording: Recording,
    codable: Callable[[Candidate], bool],
    *,
    probes: int = 1,
    seed: int = 0,
    weighting: str = "plain",
) -> Sensitivity:
    """Measure the saved tensors for which ``codable`` holds.

    Args:
        probes: random sign vectors to average over.
        seed: of the signs.
        weighting: ``plain``: every parameter's error counts alike; ``relative``: in units of its
            own gradient's norm, so that small parameters count as much as large ones; ``adam``: the
            same for each element, as in an update that divides by the gradient's root mean square;
            ``norm``: only what changes the norm of each parameter's gradient.
    """
    cut = recording.cut
    candidates = [c for c in recording.candidates if codable(c)]
    units = {c.name: units_of(c.saved.forward) for c in candidates}
    watch = {n.name for u in units.values() if u is not None for n in (u.mean, u.rstd)}
    watch |= {n.name for c in candidates if c.recipe for n in c.recipe.statistics}
    saved, watched = run_forward(recording, cut, list(watch))
    arguments = backward_inputs(recording, cut, saved)
    gradient, pullback = _pullback(recording, arguments, [c.name for c in candidates])
    gradient = [g.detach() for g in gradient]
    norms = [float(g.float().square().sum()) for g in gradient]
    total = sum(norms)
    norms_of = list(zip(gradient, norms, strict=True))
    scales = _scales(norms, [g.numel() for g in gradient], weighting)
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = []
    for _ in range(probes):
        if weighting == "norm":
            directions = [_sign(generator) * g / max(n**0.5, 1e-30) for g, n in norms_of]
        else:
            directions = [_signs(g, generator) * s for g, s in zip(gradient, scales, strict=True)]
        found.append({name: w.to(HELD_AS) for name, w in pullback(directions).items()})
    by_name = dict(zip((n.name for n in _backward_nodes(recording)), arguments, strict=True))
    values = {c.name: by_name[c.name].detach() for c in candidates}

    def as_coded(candidate: Candidate, weight: Tensor) -> Tensor:
        """The derivative by what is coded of the tensor, in storage order."""
        unit = units[candidate.name]
        if unit is not None:
            weight = weight / watched[unit.rstd.name].detach()
        elif mask_of(candidate) is not None:  # zeros come back exact
            weight = weight * (values[candidate.name] > 0)
        return weight.to(HELD_AS).permute(candidate.order).contiguous()

    tensors = []
    for candidate in candidates:
        value, unit = values[candidate.name], units[candidate.name]
        if unit is not None:
            mean, rstd = (watched[n.name].detach() for n in (unit.mean, unit.rstd))
            value = (value - mean) * rstd
        elif mask_of(candidate) is not None:
            value = filled(value)
        value = value.permute(candidate.order).contiguous()
        weights = [as_coded(candidate, w[candidate.name]) for w in found if candidate.name in w]
        tensors.append(Measured(candidate, value, tuple(weights) or None))
    shares: dict[str, dict[str, float]] = {}
    if weighting != "norm":
        coded = {t.candidate: t.values for t in tensors if t.weights is not None}
        blind = {t.candidate: t.values for t in tensors if t.weights is None}

        def trial(candidate: Candidate, error: Tensor) -> list[Tensor]:
            """Gradients when what is coded of a tensor is off by this."""
            error = error.permute(_inverse(candidate.order))
            unit = units[candidate.name]
            if unit is not None:
                error = error / watched[unit.rstd.name].detach()
            elif mask_of(candidate) is not None:
                error = error * (values[candidate.name] > 0)
            changed = {candidate.name: values[candidate.name] + error.to(values[candidate.name])}
            return _gradients(recording, {**by_name, **changed})

        if blind:
            exact = _gradients(recording, by_name)
            sizes = mean_derivatives(blind, exact, scales, trial, generator)
            tensors = [
                replace(
                    t,
                    weights=tuple(
                        _signs(t.values, generator) * sizes[t.candidate] for _ in range(probes)
                    ),
                )
                if t.candidate in sizes
                else t
                for t in tensors
            ]
        given = zip(placeholders(cut.forward), recording.inputs, strict=True)
        known = {
            n: values.get(n.name, by_name.get(n.name, watched.get(n.name)))
            for c in candidates
            if c.recipe
            for n in (*c.recipe.roots, *c.recipe.inputs)
        }
        known.update({n: v for n, v in given if n in known})
        shares, through = passed(cut.forward, coded, found, known, as_coded)
        tensors = [replace(t, through=through.get(t.candidate.name, ())) for t in tensors]
    weighed = tuple(g * s for g, s in zip(gradient, scales, strict=True))
    return Sensitivity(tuple(tensors), weighed, total, shares)


def price(tensor: Measured, spec: str, gradient_square: float) -> Price:
    """What ``spec`` on this tensor adds to the squared error of the gradient, relative to it."""
    return prices(tensor, [spec], gradient_square)[spec]


def prices(tensor: Measured, specs: Sequence[str], gradient_square: float) -> dict[str, Price]:
    """`price` by spec."""
    assert tensor.weights is not None
    flat = (tensor.values.reshape(1, -1), mean_square(tensor.weights).reshape(1, -1))
    sums, found = groups(*flat), {}
    for spec in specs:
        one, passing = codec(spec), 1.0
        noise = one.noise(sums)
        variance, bias = one.effect(tensor.values, *tensor.weights) if noise is None else (noise, 0)
        if one.shapes_noise and tensor.through:
            through = one.effect(tensor.values, *tensor.through)[0]
            passing = ratio(through, variance * through_of_reference(tensor))
        found[spec] = Price(variance / gradient_square, bias / gradient_square, passing)
    return found


def through_of_reference(tensor: Measured) -> float:
    """What noise does through all that may be rebuilt over what it does by itself, under the codec
    by which the shares of the buffers were measured."""
    assert tensor.weights is not None
    effect, values = codec(REFERENCE).effect, tensor.values
    return ratio(effect(values, *tensor.through)[0], effect(values, *tensor.weights)[0])


def ratio(a: float, b: float) -> float:
    """1 where nothing is known."""
    return a / b if a > 0 and b > 0 else 1.0


def _gradients(recording: Recording, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Parameter gradients from these arguments of the backward, by name."""
    inputs = [arguments[node.name] for node in _backward_nodes(recording)]
    outputs, _ = evaluate(recording.cut.backward, inputs)
    return [outputs[i] for i in recording.parameter_gradients()]


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _backward_nodes(recording: Recording) -> list[fx.Node]:
    return list(recording.cut.backward.graph.find_nodes(op="placeholder"))


def _pullback(
    recording: Recording, arguments: Sequence[Any], names: Sequence[str]
) -> tuple[list[Tensor], Callable[[list[Tensor]], dict[str, Tensor]]]:
    """(parameter gradients, function from signs to derivatives by tensor name)."""
    module, wanted = recording.cut.backward, recording.parameter_gradients()
    order = [n.name for n in _backward_nodes(recording)]
    alone = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    fixed = dict(zip(order, alone, strict=True))
    opaque: set[str] = set()

    def backward(leaves: dict[str, Tensor]) -> list[Tensor]:
        run = _Detaching(module, opaque)
        outputs = run.run(*[leaves.get(name, fixed[name]) for name in order])
        return [outputs[i] for i in wanted]

    def pull() -> tuple[list[Tensor], Callable[[list[Tensor]], dict[str, Tensor]]]:
        """Not by torch.func, whose transforms refuse operators of torch.library.custom_op."""
        leaves = {name: fixed[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            gradient = backward(leaves)

        def product(signs: list[Tensor]) -> dict[str, Tensor]:
            reached = [(g, s) for g, s in zip(gradient, signs, strict=True) if g.requires_grad]
            if not leaves or not reached:
                return {name: torch.zeros_like(x) for name, x in leaves.items()}
            outputs, given = zip(*reached, strict=True)
            found = torch.autograd.grad(
                outputs, list(leaves.values()), given, retain_graph=True, allow_unused=True
            )
            return {
                name: torch.zeros_like(leaf) if w is None else w
                for (name, leaf), w in zip(leaves.items(), found, strict=True)
            }

        return gradient, product

    gradient, pullback = pull()

    def derivatives(signs: list[Tensor]) -> dict[str, Tensor]:
        nonlocal pullback
        while True:
            try:
                found = pullback(signs)
            except RuntimeError as error:
                missing = _NO_DERIVATIVE.search(str(error))
                name = missing and _schema_name(missing[1] or missing[2])
                if name is None or name in opaque:
                    raise
                log.info("no derivative of %s: what leads to it is perturbed", name)
                opaque.add(name)
                _, pullback = pull()
                continue
            return {k: v.detach() for k, v in found.items() if _is_priced(recording, k, opaque)}

    return gradient, derivatives


class _Detaching(Evaluation):
    """An evaluation that lets no derivative through ops that have none.

    Some raise when they are asked for one; others, noted here, just give none.
    """

    def __init__(self, module: fx.GraphModule, opaque: set[str]) -> None:
        super().__init__(module, differentiable=True)
        self.opaque = opaque

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = _operator(target)
        if self.opaque and name in self.opaque:
            args, kwargs = torch.utils._pytree.tree_map_only(
                Tensor, torch.Tensor.detach, (args, kwargs)
            )
        found = super().call_function(target, args, kwargs)
        is_float = isinstance(found, Tensor) and found.is_floating_point()
        if is_float and not found.requires_grad and not _MAKES_ANEW.search(name):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            if any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
                log.info("no derivative of %s: what leads to it is perturbed", name)
                self.opaque.add(name)
        return found


def _operator(target: Any) -> str:
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _schema_name(name: str) -> str:
    """Of an operator as PyTorch's messages have it: `f`, `library::f` or `library.f.overload`."""
    if "::" in name:
        return name
    return "::".join(name.split(".")[:2]) if "." in name else f"aten::{name}"


def _is_priced(recording: Recording, name: str, opaque: set[str]) -> bool:
    """No error of the tensor passes through an op without derivative."""
    candidate = next(c for c in recording.candidates if c.name == name)
    return not leads_to(candidate.saved.backward, opaque)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(like.device, like.dtype)


def _sign(generator: torch.Generator) -> int:
    return int(torch.randint(0, 2, (), generator=generator)) * 2 - 1


def _scales(norms: Sequence[float], sizes: Sequence[int], weighting: str) -> list[float]:
    """What each parameter's error is multiplied by.

    A gradient of next to nothing (the bias of an attention's keys) counts as `FAINT` of the average
    element: relative errors have no bound there, and mean nothing.
    """
    if weighting == "plain":
        return [1.0] * len(norms)
    total, elements = sum(norms), sum(sizes)
    shares = [s / elements if weighting == "adam" else 1 / len(norms) for s in sizes]
    floors = [FAINT * total * s / elements for s in sizes]
    return [
        (total * share / max(norm, floor)) ** 0.5 if norm > 0 else 0.0
        for norm, share, floor in zip(norms, shares, floors, strict=True)
    ]
