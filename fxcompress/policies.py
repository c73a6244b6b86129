"""Named policies: which representation each saved tensor gets before any budget is looked at."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fxcompress.errors import SettingsError


@dataclass(frozen=True)
class Policy:
    """What a policy name means to the planner.

    Attributes:
        name: as the user writes it.
        enabled: False leaves every graph as plain Inductor compiles it.
        bits: fixed width for every float saved tensor; None where there is none.
        choose: the planner picks a width a tensor, under the budget.
        doc: one line for ``fxcompress policies``.
    """

    name: str
    enabled: bool
    bits: int | None
    choose: bool
    doc: str


_POLICIES = {
    p.name: p
    for p in (
        Policy("inductor", False, None, False, "plain Inductor, nothing changed"),
        Policy("lossless", True, None, False, "masks and small integers packed; gradients exact"),
        *(
            Policy(f"uniform{b}", True, b, False, f"every float saved tensor at {b} bits")
            for b in range(1, 9)
        ),
        Policy("auto", True, None, True, "a width for each tensor, chosen under the budget"),
    )
}


def policies() -> list[str]:
    """Names accepted by ``fxcompress.backend(policy=…)``."""
    return list(_POLICIES)


def check_policy(name: str) -> None:
    """Raise SettingsError unless ``name`` is a policy."""
    policy(name)


def policy(name: str) -> Policy:
    """The policy called ``name``.

    Raises:
        SettingsError: unknown name; the message lists the known ones.
    """
    found = _POLICIES.get(name)
    if found is None:
        hint = ""
        if re.fullmatch(r"uniform\d+", name):
            hint = " (widths are 1 to 8 bits)"
        raise SettingsError(f"unknown policy {name!r}{hint}; choose one of: {', '.join(_POLICIES)}")
    return found
