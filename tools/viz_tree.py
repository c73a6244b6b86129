"""Tree: a plan's tensors by the module that made them, like layers folded into one.

A plan lists tensors, each with the path of the module that made it; the paths are a tree. Down to a
depth every module is a row, and what lies below belongs to it. Neighbours that differ only by their
number (``layers.3`` to ``layers.59``) and hold the same tensors, kept or coded alike, in however
many bits, are one row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fxcompress.plan import Plan, TensorPlan

ROWS = 48  # of the default view: what can be read without searching


@dataclass(frozen=True)
class Kind:
    """A class of representations: its colour in every view, and what it means."""

    colour: str
    meaning: str


_WIDTHS = ("#d73027", "#f46d43", "#fc9a4f", "#e8b93c", "#a9c24a", "#63b35f", "#4a9fc9", "#2f6fb5")
KINDS: dict[str, Kind] = {
    "keep": Kind("#9aa0a6", "kept as it is"),
    "exact": Kind("#12a9b5", "masks and small integers, packed without loss"),
    "16 bit": Kind("#1d3f78", "a 16-bit floating-point format"),
    **{f"{b} bit": Kind(_WIDTHS[b - 1], f"{b} bits an element") for b in range(8, 0, -1)},
    "below 1 bit": Kind("#7b3294", "fewer than one bit an element"),
    "averaged": Kind("#9c5a1c", "averages or low frequencies"),
    "recompute": Kind("#47597a", "rebuilt from another saved tensor"),
    "offload": Kind("#6b4a8f", "as it is, in host memory"),
    "shape": Kind("#cfd3d8", "nothing saved: only its sizes are read"),
}
UNCODED = {"keep", "recompute", "offload", "shape"}  # kinds that are representations themselves

_SPEC = re.compile(r"(\w+)(?:\((.*)\))?")
_BITS = re.compile(r"\bbits=([\d.]+)")
_NUMBERED = re.compile(r"(.*?)(\d+)")


def kind_of(representation: str, bits: float) -> str:
    """The class of a representation that takes ``bits`` an element."""
    if representation in UNCODED:
        return representation
    family = match[1] if (match := _SPEC.match(representation)) else representation
    if family in {"masks", "bits"}:
        return "exact"
    if family in {"average", "frequency"}:
        return "averaged"
    named = _BITS.search(representation)
    width = float(named[1]) if named else bits
    if width < 1:
        return "below 1 bit"
    return "16 bit" if width > 9 else f"{min(round(width), 8)} bit"


def tensor_kind(tensor: TensorPlan) -> str:
    return kind_of(tensor.representation, tensor.bits)


# --- the tree of modules ------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """A module, or several alike as one.

    Attributes:
        path, label: ``layers.3.norm`` and ``norm``; ``layers.3–59`` and ``3–59`` of folded ones.
        tensors: positions in the plan of what it made itself.
        children: modules in it.
        members: the modules folded into this one; empty if it is one.
    """

    path: str
    label: str
    tensors: tuple[int, ...] = ()
    children: tuple[Module, ...] = ()
    members: tuple[Module, ...] = ()

    def all_tensors(self) -> tuple[int, ...]:
        return (*self.tensors, *(i for child in self.children for i in child.all_tensors()))


def module_tree(plan: Plan) -> Module:
    """The modules that made the plan's tensors, in the order of their first one, folded."""
    own: dict[tuple[str, ...], list[int]] = {(): []}
    for i, tensor in enumerate(plan.tensors):
        path = tuple(tensor.module.split(".")) if tensor.module else ()
        for end in range(len(path) + 1):
            own.setdefault(path[:end], [])
        own[path].append(i)
    inside: dict[tuple[str, ...], list[tuple[str, ...]]] = {path: [] for path in own}
    for path in own:
        if path:
            inside[path[:-1]].append(path)

    def made(path: tuple[str, ...]) -> Module:
        children = [made(child) for child in inside[path]]
        folded = _fold(children, plan.tensors)
        return Module(".".join(path), path[-1] if path else "", tuple(own[path]), folded)

    return made(())


def rows(root: Module, depth: int) -> Iterator[tuple[Module, tuple[int, ...]]]:
    """Modules down to ``depth`` with the tensors each stands for."""
    if depth == 0 or not root.children:
        yield root, root.all_tensors()
        return
    if root.tensors:
        yield root, root.tensors
    for child in root.children:
        yield from rows(child, depth - 1)


def readable_depth(root: Module) -> int:
    """The deepest view of at most `ROWS` rows; 1 at least."""
    sizes = [len(list(rows(root, depth))) for depth in range(1, height(root) + 1)]
    return max((d for d, size in enumerate(sizes, 1) if size <= ROWS), default=1)


def height(module: Module) -> int:
    """Levels of modules, its own included."""
    return 1 + max(map(height, module.children), default=0)


def _fold(modules: Sequence[Module], tensors: Sequence[TensorPlan]) -> tuple[Module, ...]:
    runs = _runs(modules, tensors)
    return tuple(run[0] if len(run) == 1 else _merged(run) for run in runs)


def _runs(modules: Sequence[Module], tensors: Sequence[TensorPlan]) -> Iterator[list[Module]]:
    """Neighbours numbered one after the other and alike in all else."""
    run: list[Module] = []
    for module in modules:
        if run and not (
            _follows(run[-1].label, module.label)
            and _likeness(run[-1], tensors) == _likeness(module, tensors)
        ):
            yield run
            run = []
        run.append(module)
    if run:
        yield run


def _follows(first: str, second: str) -> bool:
    a, b = _NUMBERED.fullmatch(first), _NUMBERED.fullmatch(second)
    return bool(a and b and a[1] == b[1] and int(b[2]) == int(a[2]) + 1)


def _likeness(module: Module, tensors: Sequence[TensorPlan]) -> object:
    """Equal for modules that save the same: operators, shapes and what is coded, recursively."""
    own = sorted(
        (t.op, str(t.shape), t.dtype, _coarse(tensor_kind(t)), t.reason)
        for t in (tensors[i] for i in module.tensors)
    )
    return own, [(child.label, _likeness(child, tensors)) for child in module.children]


def _coarse(kind: str) -> str:
    """Whether it is coded, not in how many bits."""
    return kind if kind in {*UNCODED, "exact"} else "coded"


def _merged(run: Sequence[Module]) -> Module:
    """Several alike as one, their children merged likewise; the run itself as its members."""
    first, last = run[0], run[-1]
    span = f"{first.label}–{_NUMBERED.fullmatch(last.label)[2]}"  # type: ignore[index]
    path = f"{first.path.removesuffix(first.label)}{span}"
    return replace(_overlaid(run, path, span), members=tuple(run))


def _overlaid(run: Sequence[Module], path: str, label: str) -> Module:
    children = tuple(
        _overlaid(alike, f"{path}.{alike[0].label}", alike[0].label)
        for alike in zip(*(module.children for module in run), strict=True)
    )
    return Module(path, label, tuple(i for module in run for i in module.tensors), children)
