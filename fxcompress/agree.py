"""Agree: what one process of a distributed job measured holds for all of them.

Ranks see other batches and other clocks. From their own measurements each would plan for itself,
and the slowest or the largest plan would decide for all. So the first process to have measured
something publishes it in the job's key–value store, under the name of the graph, and the others
take that. No collective is involved: ranks that compile other graphs (pipeline stages), compile at
other times or find theirs in a cache hold nobody up.
"""

from __future__ import annotations

from fxcompress import torch_private


def agreed(name: str, mine: str) -> str:
    """What the first process of the job published under ``name``; ``mine``, if that is this one.

    Waits, at most for the store's timeout, for a process that is just publishing.
    """
    store = torch_private.job_store()
    if store is None:
        return mine
    key = f"fxcompress/{name}"
    if store.add(f"{key}/taken", 1) == 1:
        store.set(key, mine)
    return store.get(key).decode()
