"""Random programs over tensors, as data: what the graph fuzzer draws, runs and shrinks.

A program is a few inputs and a list of steps. A step names an expression of the table below and
picks its operands, by number, among the live values of the right kind; every list of steps is a
valid program (what PyTorch refuses is left out), so that Hypothesis shrinks it by dropping steps.
The program is written out as Python, and that is what gets compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TRIES = 12  # choices of operands for a step
LARGEST = 6000  # elements of a value
STEEPEST = 1e3  # absolute value
_REFUSALS = (RuntimeError, IndexError, ValueError, TypeError)  # NotImplementedError included


class Kept(torch.autograd.Function):
    """Saves one tensor with, one without a version check."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.x = x
        return x * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return gradient * y, gradient * ctx.x


def region(x: Tensor) -> Tensor:
    return (x.sin() * x).relu().square()


NAMES = {"torch": torch, "F": F, "Kept": Kept, "checkpoint": checkpoint, "region": region}

# Kinds of operands: f float, i integer, b boolean, c complex. {0}, {1}, {2} are the operands, {d}
# and {e} dimensions of the first, {n} the size of {d} and {k} a place in it. Simplest first.
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "f": (
        # pointwise
        "{0}.sin()",
        "{0}.relu()",
        "{0}.sigmoid()",
        "{0}.tanh()",
        "{0}.abs()",
        "{0}.square()",
        "{0} * 0.7 - 0.2",
        "{0} ** 3",
        "({0} * 0.3).exp()",
        "({0}.abs() + 0.1).log()",
        "({0}.abs() + 0.1).rsqrt()",
        "1 / ({0}.square() + 1)",
        "F.gelu({0})",
        "F.gelu({0}, approximate='tanh')",
        "F.silu({0})",
        "F.mish({0})",
        "F.elu({0})",
        "F.softplus({0})",
        "F.leaky_relu({0}, 0.1)",
        "F.hardtanh({0})",
        "F.hardswish({0})",
        "F.softshrink({0})",
        "F.threshold({0}, 0.1, 0.5)",
        "F.logsigmoid({0})",
        "{0}.clamp(-0.5, 0.7)",
        "{0} - {0}.floor()",
        "{0}.round() * {0}",
        "{0}.sign() * {0}.sqrt().nan_to_num()",
        "{0}.fmod(0.7)",
        "torch.where({0} > 0.1, {0}, {0}.cos())",
        "{0}.masked_fill({0} < 0, 0.5)",
        "F.dropout({0}, 0.3)",
        "torch.rand_like({0}) * {0}",
        # reductions and normalisations
        "{0}.sum()",
        "{0}.sum({d})",
        "{0}.mean({d}, keepdim=True)",
        "{0}.amax({d})",
        "{0}.max({d})",
        "{0}.min()",
        "{0}.var({d})",
        "{0}.norm(dim={d})",
        "{0}.norm()",
        "{0}.prod({d})",
        "{0}.logsumexp({d})",
        "{0}.softmax({d})",
        "{0}.log_softmax({d})",
        "{0}.cumsum({d})",
        "{0}.cumprod({d})",
        "{0}.cummax({d})",
        "{0}.sort({d})",
        "{0}.topk(min(2, {n}), {d})",
        "{0}.median({d})",
        "torch.std_mean({0}, {d})",
        "F.layer_norm({0}, {0}.shape[-1:])",
        "F.rms_norm({0}, {0}.shape[-1:])",
        "F.batch_norm({0}, None, None, training=True)",
        "F.group_norm({0}, 2)",
        "F.normalize({0}, dim={d})",
        "F.max_pool1d({0}, 2)",
        "F.max_pool1d({0}, 3, 2, 1)",
        "F.max_pool2d({0}, 3, 2, 1)",
        "F.avg_pool1d({0}, 2)",
        "F.adaptive_max_pool2d({0}, 2)",
        "F.glu({0}, {d})",
        # views and layouts
        "{0}.transpose({d}, {e})",
        "{0}.unsqueeze({d})",
        "{0}.squeeze()",
        "{0}.reshape(-1)",
        "{0}.view(-1)",
        "{0}[1:]",
        "{0}[::2]",
        "{0}[..., 0]",
        "{0}[:0]",
        "{0}.narrow({d}, 0, {k})",
        "{0}.select({d}, {k})",
        "{0}.expand(3, *{0}.shape)",
        "{0}.diagonal()",
        "{0}.unfold({d}, 2, 1)",
        "{0}.flip({d})",
        "{0}.roll(1, {d})",
        "{0}.chunk(2, {d})",
        "{0}.unbind({d})[:2]",
        "{0}.repeat_interleave(2, {d})",
        "{0}.as_strided((2, 3), (1, 2))",
        "F.pad({0}, (1, 2))",
        "F.pad({0}, (1, 1), mode='reflect')",
        "{0}.tril()",
        "{0}.clone()",
        "{0}.contiguous()",
        "{0}.detach()",
        # other dtypes
        "{0}.to(torch.bfloat16)",
        "{0}.half()",
        "{0}.double()",
        "{0}.float()",
        "torch.complex({0}, {0}.sin())",
        "torch.fft.rfft({0})",
        "{0} > 0.2",
        "{0}.isfinite()",
        "{0}.argmax({d})",
        "{0}.argsort({d})",
        "({0} * 4).to(torch.int64)",
        "torch.bucketize({0}.detach(), torch.tensor([-1.0, 0.0, 1.0]))",
        # in place
        "{0}.mul_(1.5)",
        "{0}.relu_()",
        "{0}.sigmoid_()",
        "{0}.clamp_(max=0.4)",
        "{0}.transpose({d}, {e}).mul_(0.5)",
        "{0}[1:].zero_()",
        "{0}.select({d}, {k}).fill_(0.3)",
        # a region of its own
        "checkpoint(region, {0}, use_reentrant=False)",
    ),
    "ff": (
        "{0} + {1}",
        "{0} * {1}",
        "{0} - {1}",
        "{0} / ({1}.abs() + 0.5)",
        "{0} @ {1}",
        "{0} @ {1}.mT",
        "F.linear({0}, {1})",
        "torch.maximum({0}, {1})",
        "torch.where({0} > {1}, {0}, {1})",
        "torch.where({0} > 0, {1}, 0.5)",
        "torch.hypot({0}, {1})",
        "torch.atan2({0}, {1})",
        "{0}.lerp({1}, 0.3)",
        "{0} > {1}",
        "torch.cat([{0}, {1}], {d})",
        "torch.stack([{0}, {1}])",
        "torch.addcmul({0}, {0}, {1})",
        "torch.outer({0}.reshape(-1)[:9], {1}.reshape(-1)[:7])",
        "F.mse_loss({0}, {1})",
        "F.smooth_l1_loss({0}, {1})",
        "F.cosine_similarity({0}, {1}, {d})",
        "F.prelu({0}, {1}.reshape(-1)[:1])",
        "F.conv1d({0}, {1}[:, :, :3])",
        "F.scaled_dot_product_attention({0}, {1}, {1})",
        "F.scaled_dot_product_attention({1}, {1}, {0}, is_causal=True)",
        "torch.cdist({0}, {1})",
        "Kept.apply({0}, {1})",
        "{0}.add_({1})",
        "{0}.mul_({1})",
        "{0}.copy_({1})",
        "{0}.expand_as({1})",
        "{0}.view_as({1})",
    ),
    "fi": (
        "{0}[{1}.remainder({0}.shape[0])]",
        "{0}.index_select({d}, {1}.reshape(-1).remainder({n}))",
        "{0}.gather({d}, {1}.remainder({n}))",
        "{0} * {1}",
        "F.embedding({1}.remainder({0}.shape[0]), {0})",
        "{0}.take({1}.remainder({0}.numel()))",
        "{0}.scatter({d}, {1}.remainder({n}), 0.5)",
        "F.cross_entropy({0}, {1}.remainder({0}.shape[1]))",
        "{0}.index_fill({d}, {1}.reshape(-1).remainder({n}), 0.5)",
    ),
    "fif": (
        "{0}.scatter_add({d}, {1}.remainder({n}), {2})",
        "{0}.scatter({d}, {1}.remainder({n}), {2})",
        "{0}.scatter_reduce({d}, {1}.remainder({n}), {2}, 'amax')",
        "{0}.index_add({d}, {1}.reshape(-1).remainder({n}), {2})",
        "{0}.index_put(({1}.remainder({0}.shape[0]),), {2}, accumulate=True)",
        "{0}.index_add_({d}, {1}.reshape(-1).remainder({n}), {2})",
        "{0}.scatter_add_({d}, {1}.remainder({n}), {2})",
    ),
    "fb": (
        "{0}.masked_fill({1}, 0.3)",
        "{0} * {1}",
        "{0}.masked_fill_({1}, 0.3)",
        "torch.where({1}, {0}, {0}.sin())",
    ),
    "bff": ("torch.where({0}, {1}, {2})",),
    "i": (
        "{0} + 1",
        "{0}.remainder(5)",
        "{0}.float()",
        "{0}.cumsum({d})",
        "{0} > 1",
        "{0}.reshape(-1)",
        "{0}.transpose({d}, {e})",
        "{0}.amax({d})",
        "F.one_hot({0}.remainder(5), 5)",
        "{0}.to(torch.int32)",
        "{0}.to(torch.uint8)",
        "torch.arange({n})",
    ),
    "ii": ("{0} + {1}", "{0} * {1}", "{0} == {1}"),
    "b": ("~{0}", "{0}.float()", "{0}.long()", "{0}.any({d})", "{0}[1:]"),
    "bb": ("{0} & {1}", "{0} ^ {1}"),
    "c": (
        "{0}.abs()",
        "{0}.real",
        "{0}.imag",
        "{0}.conj()",
        "{0}.angle()",
        "{0} * {0}.conj()",
        "({0} * 0.1).exp()",
        "torch.view_as_real({0})",
        "torch.fft.irfft({0})",
        "torch.fft.fft({0})",
        "{0}.reshape(-1)",
    ),
    "cf": ("{0} * {1}",),
    "cc": ("{0} + {1}", "{0} * {1}", "{0} @ {1}.mT"),
}
# Makes a value of a kind, where there is none.
ANY = {"i": "({0} * 4).to(torch.int64)", "b": "{0} > 0.2", "c": "torch.complex({0}, {0}.sin())"}
TABLE = [(kinds, text) for kinds, texts in EXPRESSIONS.items() for text in texts]

SHAPES = ((16, 24), (24,), (24, 24), (24, 16), (16, 1), (2, 16, 24), (2, 4, 8, 8), (), (0, 24))
SOURCES = (  # of inputs; {s} is a shape
    "torch.randn({s}).requires_grad_()",
    "torch.randn({s})",
    "torch.randn({s})",
    "torch.randint(0, 7, {s})",
    "torch.randn({s}).unsqueeze(0).movedim(-1, 0).clone().movedim(0, -1)[0].requires_grad_()",
    "torch.randn({s}, dtype=torch.bfloat16).requires_grad_()",
    "torch.randn({s}, dtype=torch.float64).requires_grad_()",
    "torch.randn({s}) > 0",
    "torch.randn({s}, dtype=torch.complex64).requires_grad_()",
)


@dataclass(frozen=True)
class Step:
    """One line: row of the table, operands, and numbers for its dimensions."""

    row: int
    operands: tuple[int, int, int]
    numbers: tuple[int, int]


@dataclass(frozen=True)
class Program:
    """Source text; ``inputs`` make the arguments, the first of which always wants a gradient."""

    inputs: tuple[str, ...]
    lines: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def source(self) -> str:
        names = [f"x{i}" for i in range(len(self.inputs))]
        made = [f"# {n} = {text}" for n, text in zip(names, self.inputs, strict=True)]
        body = [f"    {line}" for line in (*self.lines, f"return {', '.join(self.outputs)},")]
        return "\n".join([*made, f"def program({', '.join(names)}):", *body])

    def __repr__(self) -> str:
        return f"\n{self.source}\n"

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        found: dict[str, Any] = dict(NAMES)
        exec(self.source, found)
        function: Callable[..., tuple[Tensor, ...]] = found["program"]
        return function

    def arguments(self) -> list[Tensor]:
        torch.manual_seed(1)
        return [eval(text, dict(NAMES)) for text in self.inputs]


def programs(most_steps: int = 20) -> st.SearchStrategy[Program]:
    number = st.integers(0, 11)
    step = st.builds(
        Step,
        st.integers(0, len(TABLE) - 1),
        st.tuples(number, number, number),
        st.tuples(number, number),
    )
    source = st.tuples(st.sampled_from(SOURCES), st.sampled_from(SHAPES))
    return st.builds(
        write,
        st.lists(source, max_size=3),
        st.integers(1, most_steps).flatmap(lambda n: st.lists(step, min_size=n, max_size=n)),
        st.lists(number, max_size=3),
    )


def write(
    sources: Sequence[tuple[str, tuple[int, ...]]], steps: Sequence[Step], kept: Sequence[int]
) -> Program:
    """The program of these steps; those that PyTorch refuses are left out.

    Args:
        sources: of inputs, with their shapes; a float matrix comes before them.
        steps: in order.
        kept: values to return, counted from the end, beside those that nothing reads.
    """
    first = (SOURCES[0], SHAPES[0])
    inputs = tuple(text.format(s=shape) for text, shape in (first, *sources))
    torch.manual_seed(1)
    live = {f"x{i}": eval(text, dict(NAMES)) for i, text in enumerate(inputs)}
    lines: list[str] = []
    for step in steps:
        lines.extend(_lines(step, live))
    names = list(live)
    trained = [n for n in names if live[n].requires_grad and live[n].grad_fn is not None]
    if not trained:
        lines.append("y = x0.sin()")
        trained = ["y"]
    read = set(re.findall(r"\w+", " ".join(line.partition(" = ")[2] or line for line in lines)))
    unread = [n for n in trained if n not in read]
    outputs = dict.fromkeys(
        [*(unread or trained[-1:]), *(names[-1 - k % len(names)] for k in kept)]
    )
    return Program(inputs, tuple(lines), tuple(outputs))


def _lines(step: Step, live: dict[str, Tensor]) -> list[str]:
    """The step as Python; its values join the live ones. Empty if PyTorch refuses it.

    Operands are those picked, or the next ones that fit.
    """
    kinds, text = TABLE[step.row]
    made = [line for kind in kinds for line in _missing(kind, live)]
    pools = []
    for kind, pick in zip(kinds, step.operands, strict=False):
        pool = [n for n in reversed(live) if _kind(live[n]) == kind]
        pools.append(pool[pick % len(pool) :] + pool[: pick % len(pool)])
    for names in islice(product(*pools), TRIES):
        line = _line(text, names, step.numbers, live)
        if line is not None:
            return [*made, line]
    return made


def _missing(kind: str, live: dict[str, Tensor]) -> list[str]:
    """A line that makes a value of this kind, if there is none."""
    if any(_kind(v) == kind for v in live.values()):
        return []
    return [_line(ANY[kind], ("x0",), (0, 0), live) or ""]


def _line(
    text: str, names: Sequence[str], numbers: tuple[int, int], live: dict[str, Tensor]
) -> str | None:
    value = live[names[0]]
    d, e = (n % max(value.dim(), 1) for n in numbers)
    size = value.shape[d] if value.dim() else 1
    text = text.format(*names, d=d, e=e, n=size, k=numbers[1] % max(size, 1))
    if "_(" in text:
        return None if _is_split(value, live) else _in_place(text, live)
    try:
        made = eval(text, dict(NAMES), dict(live))
    except _REFUSALS:
        return None
    values = list(made) if isinstance(made, tuple) else [made]
    if not values or not all(map(_is_tame, values)):
        return None
    targets = [f"v{len(live) + i}" for i in range(len(values))]
    live.update(zip(targets, values, strict=True))
    comma = "," if isinstance(made, tuple) and len(made) == 1 else ""
    return f"{', '.join(targets)}{comma} = {text}"


def _is_split(value: Tensor, live: dict[str, Tensor]) -> bool:
    """`chunk` or `unbind` made views of this memory: autograd forbids to write to it.

    It says so when it is next asked how such a view came about, not when it is written.
    """
    storage = value.untyped_storage().data_ptr()
    views = [v for v in live.values() if v.untyped_storage().data_ptr() == storage]
    return any(type(v.grad_fn).__name__ in {"SplitBackward0", "UnbindBackward0"} for v in views)


def _in_place(text: str, live: dict[str, Tensor]) -> str | None:
    before = {n: v.detach().clone() for n, v in live.items()}
    try:
        eval(text, dict(NAMES), dict(live))
    except _REFUSALS:
        return None
    if all(map(_is_tame, live.values())):
        return text
    with torch.no_grad():
        for name, value in before.items():
            live[name].copy_(value)
    return None


def _kind(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "b"
    if value.is_complex():
        return "c"
    return "f" if value.is_floating_point() else "i"


def _is_tame(value: Any) -> bool:
    """Small and finite: what follows would otherwise be NaN on either side."""
    if not isinstance(value, Tensor) or value.numel() > LARGEST:
        return False
    with torch.no_grad():
        kind = _kind(value)
        return kind == "b" or value.numel() == 0 or bool((value.abs() < STEEPEST).all())
