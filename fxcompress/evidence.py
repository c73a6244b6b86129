"""Evidence: what calibration learned about each saved tensor, as data that can be saved."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from fxcompress import files, schema
from fxcompress.codecs import states
from fxcompress.errors import FxCompressError
from fxcompress.passes.capture import Cut, output_args

FORMAT = 3
LARGEST_FILE = 1 << 30  # bytes; a calibration of a thousand tensors takes some tens of MB
_STATE = re.compile(r"(?:basis|rates)=(\w+)")


@dataclass(frozen=True)
class Price:
    """Squared error that a codec adds to the parameter gradients, over their squared norm.

    Attributes:
        passing: by how much more of the variance than `TensorEvidence.through` says passes through
            rebuilt tensors. A transform codec leaves its noise where the tensor's own readers do
            not see it, others may.
    """

    variance: float
    bias: float = 0.0
    passing: float = 1.0


@dataclass(frozen=True)
class TensorEvidence:
    """One saved tensor on real data.

    Attributes:
        prices: by codec spec.
        transforms: by bits an element, the spec of the transform codec fitted to this tensor.
        norm_price: price of affine 1 bit in groups of 128, of the gradients' norms alone (ALAM).
        sample_ranges: for each sample, Σ (max − min)² over its groups of 256.
        grad_square: mean over samples of the squared norm of the gradient that multiplies it in
            its convolution or matrix product; 0 where there is none.
        elements: of the tensor, in the batch that was measured.
        through: by first tensor of a buffer that is rebuilt from this one, what noise in this one
            does besides, over what it does by itself (see fxcompress/passing.py).
    """

    prices: Mapping[str, Price] = field(default_factory=dict)
    transforms: Mapping[float, str] = field(default_factory=dict)
    norm_price: float = 0.0
    sample_ranges: tuple[float, ...] = ()
    grad_square: float = 0.0
    elements: int = 0
    through: Mapping[str, float] = field(default_factory=dict)

    def again(self, rebuilt: Collection[str], spec: str) -> float:
        """What a codec's noise in this tensor does through tensors that are rebuilt, over what it
        does by itself."""
        shares = sum(share for name, share in self.through.items() if name in rebuilt)
        return self.prices[spec].passing * shares


@dataclass(frozen=True)
class GraphEvidence:
    """Evidence of one compiled graph; ``signature`` finds the graph again."""

    signature: str
    tensors: Mapping[str, TensorEvidence]


@dataclass(frozen=True)
class Calibration:
    """Evidence of all graphs of a model.

    Attributes:
        graphs: one entry a graph.
        weighting: how errors of different parameters were weighed.
        batches: how many batches were averaged over.
        scatter: variance of a batch's gradient between batches, over its squared norm, in the same
            weighting as prices are; None of one batch.
    """

    graphs: tuple[GraphEvidence, ...]
    weighting: str = "plain"
    batches: int = 1
    scatter: float | None = None

    def __hash__(self) -> int:
        return hash(self.key())

    def of(self, signature: str) -> Mapping[str, TensorEvidence] | None:
        """Evidence of the graph with this signature; None if it was not calibrated."""
        return next((g.tensors for g in self.graphs if g.signature == signature), None)

    def corrected(self, signature: str, tensors: Mapping[str, TensorEvidence]) -> Calibration:
        """With this evidence of one graph in place of what is known of it."""
        graphs = (
            replace(g, tensors=tensors) if g.signature == signature else g for g in self.graphs
        )
        return replace(self, graphs=tuple(graphs))

    def to_json(self, *, whole: bool = True) -> str:
        """All of it as text.

        A state that was renewed (states.py) is written under the name of what it holds now.

        Args:
            whole: with the states that transform codecs name, which a machine keeps by themselves
                as well: of a large model, a thousand files.
        """
        if not whole:
            return json.dumps({"format": FORMAT, **asdict(self), "states": {}})
        names = {n: states.current_name(n) for n in self._states()}
        held = {now: base64.b64encode(states.dump(n)).decode() for n, now in names.items()}
        text = json.dumps({"format": FORMAT, **asdict(self), "states": held})
        # In one pass: there are thousands of names, and the text is long.
        renewed = {n: now for n, now in names.items() if n != now}
        if not renewed:
            return text
        return re.sub("|".join(renewed), lambda found: renewed[found[0]], text)

    @property
    def is_at_hand(self) -> bool:
        """The states it names are kept on this machine, or in memory."""
        return all(map(states.is_kept, self._states()))

    def _states(self) -> list[str]:
        specs = {s for g in self.graphs for t in g.tensors.values() for s in t.transforms.values()}
        return sorted({name for spec in specs for name in _STATE.findall(spec)})

    @staticmethod
    def from_json(text: str) -> Calibration:
        """Read what :meth:`to_json` wrote.

        Raises:
            FxCompressError: not a calibration, or one of another format version.
        """
        try:
            return _calibration(files.parse_json(text))
        except ValueError as error:
            raise FxCompressError(f"not a calibration file: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it for :meth:`load`: whole or not at all."""
        files.write(Path(path), self.to_json())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            FxCompressError: the file is missing or no calibration.
        """
        if not Path(path).is_file():
            raise FxCompressError(
                f"there is no calibration at {path}: make one with "
                "fxcompress.calibrate(model, batch).save(path)"
            )
        try:
            return _calibration(files.read_json(Path(path), LARGEST_FILE))
        except ValueError as error:
            raise FxCompressError(f"not a calibration file: {error}") from error

    def key(self) -> str:
        """Content hash, part of the key of every graph planned from it."""
        return self._key

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:24]


def signature(cut: Cut) -> str:
    """Name of a model's graph, equal for other batch sizes: what its outputs are made by, and which
    inputs get a gradient. At another size PyTorch may save other tensors, but computes the same.
    """
    made: set[fx.Node] = set()
    pending = [n for n in cut.outputs if isinstance(n, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in made:
            made.add(node)
            pending.extend(node.all_input_nodes)
    lines = [f"{n.op} {n.name} {n.target}" for n in cut.forward.graph.nodes if n in made]
    trained = [n is not None for n in output_args(cut.backward)]
    return hashlib.sha256("\n".join([*lines, str(trained)]).encode()).hexdigest()[:24]


def _calibration(data: Any) -> Calibration:
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError("no format is named")
    if data.pop("format") != FORMAT:
        raise FxCompressError(
            "this calibration was written by another version of fxcompress; make it again "
            "with fxcompress.calibrate(model, batch).save(path)"
        )
    held = schema.value(Mapping[str, str], data.pop("states", None), "states")
    found = schema.build(Calibration, data)
    for text in held.values():
        states.restore(base64.b64decode(text, validate=True))
    return found
