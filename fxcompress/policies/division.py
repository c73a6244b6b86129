"""DIVISION (Wang et al., ICML 2023, arXiv 2208.04187): low and high frequencies apart.

Inputs of convolutions and batch norms as block averages in bf16 plus a residual at Q bits
(`codecs/frequency.py`); linear layers are left alone, as in the published package. Nothing is
allocated: that is its point. Where we differ: ragged edges have blocks of their own, planes that
are too small to gain by it are kept, and a tensor read by a convolution and a batch norm is coded
once. `faithful=True` leaves ragged edges out of the averages, as the published code does.
"""

from __future__ import annotations

from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.codecs import codec
from fxcompress.passes.rewrite import Choice
from fxcompress.passes.roles import BATCH_NORM, CONVOLUTION, roles
from fxcompress.policies.base import Policy, Situation


def division(b: int = 8, q: int = 2, faithful: bool = False) -> Policy:
    """The policy ``division(b=…,q=…)``: blocks of b by b, residual at q bits.

    Args:
        faithful: average as the published code does at ragged edges.
    """
    edges = ",edges=stretched" if faithful else ""
    codec(f"frequency(block={b},bits={q}{edges})")  # raises now, not amid a compile

    def choose(situation: Situation) -> list[Choice]:
        bits = round(situation.level or q)
        return [
            codable_choice(c, f"frequency(block={b},bits={bits},channels={c.channels}{edges})")
            if is_codable(c) and roles(c) & {CONVOLUTION, BATCH_NORM}
            else exact_choice(c)
            for c in situation.candidates
        ]

    return Policy(
        "division",
        f"DIVISION: {b} by {b} block averages and a residual at {q} bits (arXiv 2208.04187)",
        choose,
        levels=(8, 4, 2, 1),
    )
