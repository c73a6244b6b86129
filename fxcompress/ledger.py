"""Ledger: one budget for all graphs of a model.

While a graph's backward runs, what other graphs of the same model saved is still in memory. Each
piece of user code (one Dynamo frame) has one line; recompiling it for new shapes replaces the line.
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
        saved: by Dynamo frame, or by plan key where only the plan is known.
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
        """Count the graph now compiled, in place of an earlier compile of the same frame."""
        self._count(plan_key, torch_private.frame_id())

    def learn(self, plan_key: str, frame: object = None) -> None:
        """Count a graph that runs without having been compiled here: from the on-disk cache."""
        if plan_key in self.plans:
            return
        try:
            self._count(plan_key, plan_key if frame is None else frame)
        except FxCompressError as error:  # in mid-training: no reason to stop it
            self.plans.add(plan_key)
            log.warning("other graphs do not know what this one saves: %s", error)

    def _count(self, plan_key: str, frame: object) -> None:
        plan = report.read(plan_key)
        self.plans.add(plan_key)
        self.saved[frame] = plan.saved_bytes * self.repeats
        self.plain[frame] = plan.saved_bytes_before * self.repeats

    def key(self) -> str:
        """What the ledger adds to a cache key: what other graphs withhold from the next plan."""
        return f"reserved={self.reserved()},{self.reserved_plain()}"


def _others(sizes: dict[object, int]) -> int:
    """Of the frames other than the one now compiled, together."""
    current = torch_private.frame_id()
    return sum(size for frame, size in sizes.items() if frame != current)
