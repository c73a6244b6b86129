"""Choose: which representations each saved tensor may have, and what each costs in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from fxcompress import torch_private
from fxcompress.codecs import codec
from fxcompress.passes import properties as prop
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import (
    KEEP,
    MASKS,
    OFFLOAD,
    RECOMPUTE,
    SHAPE,
    Choice,
    hoisted_nodes,
    integer_spec,
)


def exact_choice(candidate: Candidate) -> Choice:
    """The representation with the fewest bytes among those that change no gradient."""
    if candidate.keep:
        return Choice(candidate, KEEP, candidate.keep)
    if candidate.fake.dtype in prop.INTEGERS:
        spec = integer_spec(candidate.integers)
        if spec is None:
            wide = (
                "integers too wide to pack" if candidate.integers else "integers of unknown range"
            )
            return Choice(candidate, KEEP, wide)
        if payload_bytes(candidate, spec) >= candidate.own_bytes:
            return Choice(candidate, KEEP, "already as narrow as its range")
        return Choice(candidate, spec, "")
    if not candidate.smooth:
        if not candidate.exact:
            return Choice(candidate, SHAPE, "readers look at its sizes only")
        return Choice(candidate, MASKS, "readers compare it only")
    return Choice(candidate, KEEP)


def is_codable(candidate: Candidate) -> bool:
    """A lossy codec may hold it: a float tensor that smooth readers read."""
    return (
        not candidate.keep and bool(candidate.smooth) and candidate.fake.dtype not in prop.INTEGERS
    )


def codable_choice(candidate: Candidate, spec: str) -> Choice:
    """``spec``, or more bits where its readers need them, or kept where that is no larger."""
    wanted = codec(spec)
    reason = ""
    width = getattr(wanted, "bits", None)
    if candidate.floor_bits > 1 and (width is None or width < candidate.floor_bits):
        wanted = codec(f"affine(bits={candidate.floor_bits})")
        reason = "an exponential reads it"
    choice = Choice(candidate, wanted.spec, reason)
    if bytes_of(choice, {}) >= candidate.own_bytes:
        return Choice(candidate, KEEP, "no smaller when coded")
    return choice


def recompute_choice(candidate: Candidate) -> Choice | None:
    """Rebuilt from other saved tensors; None where nothing rebuilds it."""
    recipe = candidate.recipe
    if recipe is None:
        return None
    heavy = list(dict.fromkeys(prop.op_name(n) for n in recipe.steps if prop.is_extern(n)))
    names = [n.name for n in recipe.roots] or ["inputs of the model"]
    sources = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    what = f"{len(recipe.steps)} steps" + (f" ({', '.join(heavy)})" if heavy else "")
    return Choice(candidate, RECOMPUTE, f"rebuilt by {what} from {sources}")


def why_not_offload(candidate: Candidate) -> str:
    """Why a tensor cannot wait in host memory; empty where it can."""
    if candidate.keep:
        return candidate.keep
    if candidate.fake.device.type == "cpu":
        return "it is there already"
    if torch_private.captures_cuda_graphs():
        return "a CUDA graph cannot be captured of copies to the host"
    return ""


def offload_choice(candidate: Candidate) -> Choice | None:
    """As it is, in host memory; None where it cannot go there."""
    if why_not_offload(candidate):
        return None
    size = candidate.own_bytes / 1e6
    return Choice(candidate, OFFLOAD, f"{size:.1f} MB wait in host memory")


def passes_noise(candidate: Candidate) -> bool:
    """It may be rebuilt from coded tensors: a small error of theirs is a small error of its own,
    which its readers bear."""
    recipe = candidate.recipe
    tame = is_codable(candidate) and candidate.floor_bits == 1
    return recipe is not None and recipe.is_smooth and tame


def payload_bytes(candidate: Candidate, spec: str) -> int:
    """Bytes of the tensor's own payload under ``spec``."""
    return codec(spec).payload_bytes(candidate.stored_shape, candidate.fake.dtype)


def workspace_bytes(candidate: Candidate, spec: str) -> int:
    """Bytes that encode or decode under ``spec`` needs while it runs."""
    return codec(spec).workspace_bytes(candidate.stored_shape, candidate.fake.dtype)


def mask_bytes(choices: Sequence[Choice]) -> dict[str, int]:
    """Bytes of hoisted nodes, by name of the candidate that pays for them."""
    paid: dict[str, int] = {}
    for node, choice in hoisted_nodes(choices).items():
        name = choice.candidate.name
        paid[name] = paid.get(name, 0) + hoisted_bytes(node)
    return paid


def hoisted_bytes(node: fx.Node) -> int:
    """Bytes saved for one hoisted boolean or integer node."""
    value = prop.value(node)
    shape = [torch_private.size_hint(size) for size in value.shape]
    spec = integer_spec(prop.integer_range(node))
    if spec is None:
        return math.prod(shape) * value.element_size()
    return codec(spec).payload_bytes(shape, value.dtype)


def bytes_of(choice: Choice, masks: dict[str, int]) -> int:
    """Bytes saved on the tensor's device under ``choice``, its share of ``mask_bytes`` included."""
    candidate = choice.candidate
    if choice.representation == KEEP:
        return candidate.storage_bytes
    if choice.representation == RECOMPUTE:
        return statistics_bytes(candidate) + masks.get(candidate.name, 0)
    if choice.representation == OFFLOAD:
        return 0
    own = 0 if choice.codec_spec is None else payload_bytes(candidate, choice.codec_spec)
    return own + masks.get(candidate.name, 0)


def statistics_bytes(candidate: Candidate) -> int:
    """Bytes of the statistics that are saved to rebuild the tensor (others may need them too)."""
    assert candidate.recipe is not None
    sizes = (prop.value(n).nbytes for n in candidate.recipe.statistics)
    return sum(torch_private.size_hint(size) for size in sizes)
