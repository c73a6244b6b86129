"""Ledger: one budget for all graphs of a model.

While a graph's backward runs, what other graphs of the same model saved is still in memory. Each
piece of user code (one Dynamo frame) has one line; recompiling it for new shapes replaces the line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fxcompress import report, torch_private


@dataclass
class Ledger:
    """Bytes saved by each graph compiled so far.

    Attributes:
        saved: by Dynamo frame, or by plan key where only the plan is known.
        plans: keys of the plans already counted.
    """

    saved: dict[object, int] = field(default_factory=dict)
    plans: set[str] = field(default_factory=set)

    def reserved(self) -> int:
        """Bytes that graphs other than the one now compiled keep saved."""
        current = torch_private.frame_id()
        return sum(size for frame, size in self.saved.items() if frame != current)

    def record(self, plan_key: str) -> None:
        """Count the graph now compiled, in place of an earlier compile of the same frame."""
        self.plans.add(plan_key)
        self.saved[torch_private.frame_id()] = report.read(plan_key).saved_bytes

    def learn(self, plan_key: str, frame: object = None) -> None:
        """Count a graph that runs without having been compiled here: from the on-disk cache."""
        if plan_key not in self.plans:
            self.plans.add(plan_key)
            self.saved[plan_key if frame is None else frame] = report.read(plan_key).saved_bytes

    def key(self) -> str:
        """What the ledger adds to a cache key: the bytes it withholds from the next plan."""
        return f"reserved={self.reserved()}"
