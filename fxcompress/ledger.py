"""Ledger: one budget for all graphs of a model.

While a graph's backward runs, what other graphs of the same model saved is still in memory. Each
piece of user code (one Dynamo frame) has one line; recompiling it for new shapes replaces the line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fxcompress import torch_private


@dataclass
class Ledger:
    """Bytes saved by each graph compiled so far, by Dynamo frame."""

    saved: dict[object, int] = field(default_factory=dict)

    def reserved(self) -> int:
        """Bytes that graphs other than the one now compiled keep saved."""
        current = torch_private.frame_id()
        return sum(size for frame, size in self.saved.items() if frame != current)

    def record(self, size: int) -> None:
        """Note the saved bytes of the graph now compiled."""
        self.saved[torch_private.frame_id()] = size

    def key(self) -> str:
        """What the ledger adds to a cache key: the bytes it withholds from the next plan."""
        return f"reserved={self.reserved()}"
