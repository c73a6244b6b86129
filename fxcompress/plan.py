"""The plan as data: what happens to each saved tensor, and why. Printed, saved, compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fxcompress import files, schema
from fxcompress.errors import FxCompressError

FORMAT = 2
LARGEST_FILE = 64 << 20  # bytes; a plan of a thousand tensors takes some 2 MB


@dataclass(frozen=True)
class Alternative:
    """Another representation that the planner weighed.

    Attributes:
        representation: a codec's spec or "keep".
        bytes: saved under it, hoisted masks apart.
        noise: what the planner took it to add (see TensorPlan.predicted_variance), bias weighed in.
    """

    representation: str
    bytes: int
    noise: float


@dataclass(frozen=True)
class Moment:
    """Modelled bytes alive at one node of the step, plain and planned.

    Attributes:
        phase: "forward" or "backward".
        module: path of the module that the node belongs to; "" where unknown.
    """

    node: str
    phase: str
    plain_bytes: int
    planned_bytes: int
    module: str = ""


@dataclass(frozen=True)
class TensorPlan:
    """One saved tensor.

    Attributes:
        name: node name in the joint graph.
        module: path of the module that made it, as the user wrote it ("layer1.0.relu").
        source: "file.py:line" of the user's code.
        op: the operator that produced it.
        shape, dtype: as saved by plain Inductor.
        storage_bytes: bytes of the storage it keeps alive; 0 where another entry counts it.
        smooth_readers, exact_readers: backward ops that read it; the second sort (comparisons,
            pooling indices, …) never see a decoded value.
        recompute: ops that would rebuild it from other saved tensors; empty if none would.
        representation: a codec's spec, "keep", "masks" (only what its exact readers need is
            saved), "shape" (no reader looks at the values), "recompute" (the backward rebuilds it
            from other saved tensors) or "offload" (it waits in host memory as it is).
        bytes_after: bytes saved for it now on its device, its share of hoisted masks included.
        reason: why it was left alone, or why it has this representation.
        predicted_variance: squared error that the representation adds to the parameter gradients,
            over their squared norm; 0 where it is exact, None where nobody weighed it. Measured if
            the plan was calibrated, a guess otherwise.
        alternatives: what else it could have been, from the least noise on.
        alive: the first and the last moment of the plan's timeline at which it is held; None where
            it is not saved.
        biased: its codec is off on average, by nature: over many steps noise averages out, this
            does not.
        predicted_bias: squared bias that the representation adds to the parameter gradients, over
            their squared norm; 0 where it is unbiased, None where nobody measured it.
        lowering: by what its payload is decoded: "triton", "cpu", "aten" or "inductor" (see
            fxcompress/lowering.py); empty where it has none.
    """

    name: str
    module: str
    source: str
    op: str
    shape: tuple[int | str, ...]
    dtype: str
    storage_bytes: int
    smooth_readers: tuple[str, ...]
    exact_readers: tuple[str, ...]
    recompute: tuple[str, ...]
    representation: str
    bytes_after: int
    reason: str
    predicted_variance: float | None = 0.0
    alternatives: tuple[Alternative, ...] = ()
    alive: tuple[int, int] | None = None
    biased: bool = False
    predicted_bias: float | None = 0.0
    lowering: str = ""

    @property
    def numel(self) -> int:
        """Elements; symbolic sizes count as 1."""
        return math.prod(size for size in self.shape if isinstance(size, int))

    @property
    def bits(self) -> float:
        """Bits saved for each element."""
        return 8 * self.bytes_after / max(self.numel, 1)


@dataclass(frozen=True)
class Plan:
    """What was decided for one compiled graph, or for all graphs of a model together.

    Attributes:
        policy, budget_mb: as asked.
        tensors: one entry a saved tensor.
        plain_peak_bytes, planned_peak_bytes: modelled peak of activation memory over a step, of
            plain Inductor and of this plan. What graphs return counts to the end of the step.
        released_peak_bytes: the plan's if the caller lets go of what the graph returned before the
            backward begins (fxcompress/returned.py); None: not asked.
        note: why nothing was changed, where nothing was.
        graphs: how many compiled graphs the plan covers.
        calibrated: variances were measured on this model, not guessed.
        timeline: the modelled memory of the step, thinned out to some hundred moments.
        measured_saved_bytes, measured_peak_bytes: what a compiled step took, where one was run to
            see (`fxcompress plan --measure`).
        measured: bytes alive at each moment of the timeline, measured on that step: its forward and
            its backward each stretched to as many moments, by time. A node's exact place in it is
            not known, for a compiled graph is no list of nodes.
        slowdown: estimated time that encoding and decoding add to a step, over that of the plain
            step (see fxcompress/costs.py); of several graphs, the largest. None if nobody asked.
        gap: how far, relatively, the plan may be from the best one; None where no solver chose, or
            it had no time to find a plan.
        tried_variance: squared error of the gradients that the plan gave on a part of the first
            batch, over their squared norm (fxcompress/trial.py); None: not tried.
    """

    policy: str
    budget_mb: float | None
    tensors: tuple[TensorPlan, ...]
    plain_peak_bytes: int
    planned_peak_bytes: int
    note: str = ""
    graphs: int = 1
    calibrated: bool = False
    timeline: tuple[Moment, ...] = ()
    released_peak_bytes: int | None = None
    measured_saved_bytes: int | None = None
    measured_peak_bytes: int | None = None
    measured: tuple[int, ...] = ()
    gap: float | None = None
    slowdown: float | None = None
    tried_variance: float | None = None

    @property
    def predicted_variance(self) -> float:
        """Squared error of the whole gradient over its squared norm: the tensors' noise summed."""
        return sum(t.predicted_variance or 0.0 for t in self.tensors)

    @property
    def bias(self) -> str:
        """Which of its codecs are biased, and by how much; empty if none is."""
        found = [t for t in self.tensors if t.biased]
        if not found:
            return ""
        families = Counter(t.representation.partition("(")[0] for t in found)
        names = ", ".join(f"{name} ×{count}" for name, count in families.items())
        known = sum(t.predicted_bias or 0.0 for t in found)
        unknown = sum(t.predicted_bias is None for t in found)
        size = (
            f"by {known:.2g} of the gradient's squared norm"
            if not unknown
            else f"by how much was not measured for {unknown}: fxcompress.check(model, batch) does"
        )
        return f"biased by nature: {names}; {size}"

    @property
    def remarks(self) -> str:
        """What its reader has to know: why graphs were left alone, which codecs are biased, and
        what came of trying the plan."""
        tried = self.tried_variance
        trial = (
            ""
            if tried is None
            else f"on a part of the first batch gradients were off by {tried:.2g} of their squared "
            f"norm, predicted {self.predicted_variance:.2g}"
        )
        return "; ".join(text for text in (self.note, self.bias, trial) if text)

    @property
    def saved_bytes_before(self) -> int:
        """Bytes of saved activations under plain Inductor, each storage counted once."""
        return sum(t.storage_bytes for t in self.tensors)

    @property
    def saved_bytes(self) -> int:
        """Bytes of saved activations under this plan."""
        return sum(t.bytes_after for t in self.tensors)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            FxCompressError: not a plan, or one of another format version.
        """
        try:
            return _plan(files.parse_json(text))
        except ValueError as error:
            raise FxCompressError(f"not a plan file: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it for :meth:`load`: whole or not at all."""
        files.write(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what :meth:`save` wrote, wherever it comes from: it is data, and checked as such.

        Raises:
            FileNotFoundError. FxCompressError: see :meth:`from_json`; or far too large.
        """
        try:
            return _plan(files.read_json(Path(path), LARGEST_FILE))
        except ValueError as error:
            raise FxCompressError(f"not a plan file: {error}") from error

    def key(self) -> str:
        """Content hash: what a compiled graph carries to name the plan it was built from.

        The planned peak apart, which falls once a caller was seen to let go of what is returned.
        """
        lasting = replace(self, planned_peak_bytes=0)
        return hashlib.sha256(lasting.to_json().encode()).hexdigest()[:24]

    def __str__(self) -> str:
        console = Console(width=150, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich__(self) -> Table:
        budget = "none" if self.budget_mb is None else f"{self.budget_mb:g} MB"
        title = (
            f"policy {self.policy}, budget {budget}: saved {_mb(self.saved_bytes_before)} → "
            f"{_mb(self.saved_bytes)} MB, planned peak {_mb(self.plain_peak_bytes)} → "
            f"{_mb(self.planned_peak_bytes)} MB"
        )
        table = Table(title=title, caption=self.remarks or None)
        for column in ("tensor", "module", "shape", "dtype", "representation"):
            table.add_column(column, overflow="fold")
        table.add_column("MB before", justify="right")
        table.add_column("after", justify="right")
        table.add_column("reason", overflow="fold")
        for t in self.tensors:
            shape = "×".join(map(str, t.shape)) or "scalar"
            table.add_row(
                t.name,
                t.module,
                shape,
                t.dtype.removeprefix("torch."),
                t.representation,
                _mb(t.storage_bytes),
                _mb(t.bytes_after),
                t.reason,
            )
        return table


def merge(plans: Iterable[Plan]) -> Plan:
    """One plan for all graphs of a model: tensors together, the higher of the peaks.

    The peak of several graphs is that of the worst one on top of what the others keep saved;
    each graph's own plan has that already counted in (see :mod:`fxcompress.ledger`).
    """
    plans = list(plans)
    if not plans:
        raise FxCompressError(
            "no plan yet: plans are made when the first training step compiles the model; run one "
            "forward and backward pass first"
        )
    first = plans[0]
    if len(plans) == 1:
        return first
    worst = max(plans, key=lambda p: p.planned_peak_bytes)
    tried = [p.tried_variance for p in plans if p.tried_variance is not None]
    return replace(
        first,
        tensors=tuple(
            t if p is worst else replace(t, alive=None) for p in plans for t in p.tensors
        ),
        plain_peak_bytes=max(p.plain_peak_bytes for p in plans),
        planned_peak_bytes=max(p.planned_peak_bytes for p in plans),
        note="; ".join(dict.fromkeys(p.note for p in plans if p.note)),
        graphs=len(plans),
        calibrated=all(p.calibrated for p in plans),
        timeline=worst.timeline,
        gap=max((p.gap for p in plans if p.gap is not None), default=None),
        slowdown=max((p.slowdown for p in plans if p.slowdown is not None), default=None),
        tried_variance=sum(tried) if tried else None,
    )


def _plan(data: Any) -> Plan:
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError("no format is named")
    if data.pop("format") != FORMAT:
        raise FxCompressError(
            "this plan file was written by another version of fxcompress; make it again "
            "with fxcompress.explain(model).save(path)"
        )
    return schema.build(Plan, data)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
