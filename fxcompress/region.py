"""Regions: another policy for part of a model, marked in its forward code.

    with fxcompress.policy("lossless"):
        gate = self.router(x)

holds for the gradients of what is computed inside: every saved tensor that their backward reads is
represented as that policy would. A tensor that an operator outside reads as well has the same
representation there.

In a graph the mark is metadata of nodes, which Dynamo and AOTAutograd pass on from the forward to
the gradients; and two calls of an operator that does nothing, because metadata is not part of the
keys under which compiled graphs are cached, and calls are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from fxcompress import ops, torch_private
from fxcompress.choose import bytes_of
from fxcompress.errors import SettingsError
from fxcompress.evidence import TensorEvidence
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.policies import Situation
from fxcompress.policies import policy as named

_MARK = "fxcompress_policy"


@contextmanager
def policy(name: str) -> Iterator[None]:
    """The policy for gradients of what is computed inside, in the forward code of a model.

    Regions nest; the innermost holds. ``"auto"`` inside gives way to what holds for the model.
    Rules of the ``overrides`` setting come before regions. Outside of a compile this does nothing.

    >>> import torch, fxcompress
    >>> with fxcompress.policy("lossless"):
    ...     y = torch.ones(2).exp()

    Args:
        name: one of :func:`fxcompress.policies`, or a codec's spec as ``rotate(bits=4)``.

    Raises:
        SettingsError: unknown; or, at the first step, one that needs a calibration and has none.
    """
    if torch.compiler.is_compiling():
        ops.region(name)
        with torch_private.annotated(_MARK, name):
            yield
        ops.region("")
    else:
        named(name)
        yield


def choices_of(
    candidates: Sequence[Candidate], evidence: Mapping[str, TensorEvidence], group: int
) -> dict[str, Choice]:
    """By name, what becomes of the tensors that belong to a region.

    Raises:
        SettingsError: a policy that is unknown, or needs a calibration.
    """
    members: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        for name in _policies_of(candidate):
            members.setdefault(name, []).append(candidate)
    chosen: dict[str, Choice] = {}
    for name, inside in members.items():
        if named(name).solves:
            continue
        for choice in _choices(name, inside, evidence, group):
            before = chosen.get(choice.candidate.name)
            if before is None or bytes_of(choice, {}) > bytes_of(before, {}):
                chosen[choice.candidate.name] = choice  # of several regions, the most exact
    return chosen


def _policies_of(candidate: Candidate) -> set[str]:
    """Of the regions whose gradients read the tensor's values."""
    marks = {torch_private.annotation(reader, _MARK) for reader in candidate.smooth}
    return {mark for mark in marks if isinstance(mark, str)}


def _choices(
    name: str, inside: Sequence[Candidate], evidence: Mapping[str, TensorEvidence], group: int
) -> list[Choice]:
    wanted = named(name)
    if not wanted.enabled:
        found: Sequence[Choice] = [Choice(c, KEEP) for c in inside]
    elif wanted.calibrated and not evidence:
        raise SettingsError(
            f"fxcompress.policy({name!r}) allocates bits by measurements: give the backend "
            "calibration=fxcompress.calibrate(model, batch), or use a policy that needs none"
        )
    else:
        assert wanted.choose is not None
        found = wanted.choose(Situation(inside, None, group, evidence))
    return [c if c.reason else replace(c, reason=f"in a region of {name}") for c in found]
