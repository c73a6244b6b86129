"""Decodes: one for several readers, where that keeps the peak.

A tensor is decoded before each cluster of its readers (passes/insert.py): between them stand calls
that need the memory. Where the step is far from its peak they do not, and one decode will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fxcompress.passes.rewrite import Choice, coded_roots
from fxcompress.peak import Timeline


def joined(choices: Sequence[Choice], memory: Timeline) -> tuple[Choice, ...]:
    """The same choices, with one decode for all readers of each tensor that can have it, the
    largest first. The modelled peak is what it was.

    Roots of what is rebuilt are left alone: where they are read the model does not say.
    """
    total = memory.total(choices)
    peak = total.max(initial=0.0)
    roots = {root.candidate.name for _, root in coded_roots(choices)}
    found = {c.candidate.name: c for c in choices}
    for choice in sorted(choices, key=lambda c: c.candidate.own_bytes, reverse=True):
        name = choice.candidate.name
        if choice.codec_spec is None or choice.host or name in roots:
            continue
        between = memory.between[name]
        if between.any() and (total + between).max() <= peak:
            total += between
            found[name] = replace(choice, joined=True)
    return tuple(found[c.candidate.name] for c in choices)
