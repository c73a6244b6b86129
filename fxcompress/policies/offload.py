"""offload: nothing coded; what is saved and large waits in host memory, as it is.

What `torch.autograd.graph.save_on_cpu` does, in the graph: exact masks and small integers are
packed and stay, each tensor leaves after its last forward reader and comes back before its backward
ones.
"""

from __future__ import annotations

from fxcompress.choose import exact_choice, offload_choice
from fxcompress.errors import SettingsError
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import KEEP, Choice
from fxcompress.policies.base import Policy, Situation


def choose(situation: Situation) -> list[Choice]:
    """In host memory what would be kept.

    Raises:
        SettingsError: the graph's tensors are in host memory already.
    """
    if all(map(_is_on_host, situation.candidates)):
        raise SettingsError(
            "policy='offload' moves saved tensors from the device to host memory, and the model is "
            "on the CPU: use lossless"
        )
    exact = [exact_choice(c) for c in situation.candidates]
    moved = [offload_choice(c) for c in situation.candidates]
    return [
        there if there is not None and here.representation == KEEP else here
        for here, there in zip(exact, moved, strict=True)
    ]


def _is_on_host(candidate: Candidate) -> bool:
    return candidate.fake.device.type == "cpu"


POLICIES = (Policy("offload", "saved tensors as they are, in host memory", choose),)
