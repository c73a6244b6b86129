"""Fusion: loops that a call stands between stay apart where joining them would take memory.

Inductor joins loops that read the same tensor, be it the weight of a norm, and as far as 64 nodes
apart; the second of them then runs where the first does, and with it what its inputs come from. So
a norm's output, decoded for the weight behind it, would be there two matrix products before: four
more tensors at the peak of a GPT's step, 70.6 MB where 64.7 were planned. The planner counts a loop
where it stands in the graph (fxcompress/peak.py), so the second stays there unless what dies with
it makes up for what it writes, as where an activation is computed beside its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SMALLEST = 1 << 16  # bytes; less is not worth a pass over memory


@dataclass(frozen=True)
class Buffer:
    """A tensor that loops read.

    Attributes:
        size: in bytes.
        born: where in the schedule it is written, -1 if before; None: it is there throughout.
        readers: where it is read.
    """

    size: int
    born: int | None
    readers: frozenset[int]


@dataclass(frozen=True)
class Loops:
    """Loops that are one kernel, or may become one with others.

    Attributes:
        places: theirs in the schedule.
        writes: bytes of their results that are read elsewhere or later, by name.
        reads: what they read, by name.
    """

    places: frozenset[int]
    writes: Mapping[str, int]
    reads: Mapping[str, Buffer]

    @property
    def first(self) -> int:
        """Where they run, once they are one kernel."""
        return min(self.places)


def takes_memory(earlier: Loops, later: Loops) -> bool:
    """The later loops, run where the earlier ones are, leave more in memory than before."""
    written = sum(later.writes.values())
    for buffer in later.reads.values():
        outlives = bool(buffer.readers - earlier.places - later.places)
        born = buffer.born
        is_there = born is not None and (born <= earlier.first or born in earlier.places)
        if is_there and not outlives:
            written -= buffer.size
        elif born is not None and not is_there and outlives:
            written += buffer.size
    return written > SMALLEST
