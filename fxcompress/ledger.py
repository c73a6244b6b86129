"""Ledger: one budget for all graphs of a model.

While a graph's backward runs, what other graphs of the same model saved is still in memory. One
compile of a piece of user code (a Dynamo frame) may give several graphs: DistributedDataParallel
has it cut at the ends of its buckets. Compiling the piece again, for new shapes, replaces them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from fxcompress import report, torch_private
from fxcompress.errors import FxCompressError

log = logging.getLogger("fxcompress")


@dataclass
class Ledger:
    """Bytes saved by each graph compiled so far.

    Attributes:
        saved: by (frame, compile of the frame, plan key, number); by plan key where only that is
            known.
        plans: keys of the plans already counted.
        plain: what plain Inductor would save in each.
        repeats: how often each graph runs before its backwards do.
    """

    saved: dict[object, int] = field(default_factory=dict)
    plans: set[str] = field(default_factory=set)
    plain: dict[object, int] = field(default_factory=dict)
    repeats: int = 1

    def reserved(self) -> int:
        """Bytes that graphs other than the one now compiled keep saved."""
        return _others(self.saved)

    def reserved_plain(self) -> int:
        """The same if those graphs were left to plain Inductor."""
        return _others(self.plain)

    def record(self, plan_key: str) -> None:
        """Count the graph now compiled, in place of earlier compiles of the same frame."""
        self._count(plan_key, torch_private.compile_id())

    def learn(self, plan_key: str, place: tuple[object, object] | None = None) -> None:
        """Count a graph that runs without having been compiled here: from the on-disk cache."""
        if plan_key in self.plans:
            return
        try:
            self._count(plan_key, place)
        except FxCompressError as error:  # in mid-training: no reason to stop it
            self.plans.add(plan_key)
            log.warning("other graphs do not know what this one saves: %s", error)

    def forget(self, plan_key: str) -> None:
        """The graph is about to be planned anew, within the same compile."""
        self.plans.discard(plan_key)
        lines = [n for n in self.saved if n == plan_key or (isinstance(n, tuple) and plan_key in n)]
        for line in lines[:1]:
            del self.saved[line], self.plain[line]

    def _count(self, plan_key: str, place: tuple[object, object] | None) -> None:
        plan = report.read(plan_key)
        self.plans.add(plan_key)
        line: object = plan_key
        if place is not None:
            for old in [n for n in self.saved if _is_outdated(n, place)]:
                del self.saved[old], self.plain[old]
            line = (*place, plan_key, len(self.saved))
        self.saved[line] = plan.saved_bytes * self.repeats
        self.plain[line] = plan.saved_bytes_before * self.repeats

    def key(self) -> str:
        """What the ledger adds to a cache key: what other graphs withhold from the next plan."""
        return f"reserved={self.reserved()},{self.reserved_plain()}"


def _others(sizes: dict[object, int]) -> int:
    """Of all graphs that will be there beside the one now compiled."""
    current = torch_private.compile_id()
    return sum(
        size for line, size in sizes.items() if current is None or not _is_outdated(line, current)
    )


def _is_outdated(line: object, current: tuple[object, object]) -> bool:
    """Of another compile of the same frame."""
    return isinstance(line, tuple) and line[0] == current[0] and line[1] != current[1]
