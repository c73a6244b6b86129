"""ActNN (Chen et al., ICML 2021, arXiv 2104.14129), levels L1 to L5 of its reference code.

Compressed are the inputs of convolutions and linear layers and the raw inputs of batch norms, in
groups of 256 with stochastic rounding. L1: conv and linear inputs at 4 bits; L2: batch-norm inputs
too; L3: 2 bits on average over all conv and linear layers, 1 to 8 bits for each sample of each
layer, batch norm with the bits of the layer before it; L4 and L5: L3 with payloads in host memory.

L3's allocation minimises Σ C/(2^b − 1)² with C = K/(4·conv groups) · 256/P · Σ_g range² · S for
sample n of a layer, S the mean squared gradient norm of its output. Layers share out the average
once, at calibration (ActNN: after every step); within a layer the samples of each new batch share
the layer's bits anew, as in ActNN (`codecs/adaptive.py`).

Where we differ: masks are exact and shared, a tensor saved for two readers is coded once, metadata
is rounded before the codes are drawn, batch-norm inputs are coded in units of their channels, the
largest code cannot overflow, and the first steps use real sensitivities instead of zeros.
L4 and L5 need a device (untested on one so far); L5's defragmentation was a fork of PyTorch's
allocator: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.errors import SettingsError
from fxcompress.evidence import TensorEvidence
from fxcompress.passes.analyse import Candidate
from fxcompress.passes.rewrite import Choice
from fxcompress.passes.roles import BATCH_NORM, CONVOLUTION, LINEAR, product_of, roles
from fxcompress.policies.base import Policy, Situation

Chooser = Callable[[Situation], Sequence[Choice]]

LAYERS = frozenset({CONVOLUTION, LINEAR})
LADDER = tuple(float(bits) for bits in range(8, 0, -1))


@dataclass(frozen=True)
class Item:
    """Something that takes a width: objective ``cost/(2^b − 1)²`` and ``weight`` elements."""

    cost: float
    weight: float


def allocate(
    items: Sequence[Item], average: float, ladder: Sequence[float], rung_price: Sequence[float]
) -> list[float]:
    """Widths of the items under Σ weight·bits ≤ average·Σ weight.

    All start at ``ladder[0]``; the item that loses least for each bit it frees steps down, until
    the budget holds. ``rung_price[i]`` times an item's cost is its objective at ``ladder[i]``.
    """
    at = [0] * len(items)
    spent = sum(i.weight for i in items) * ladder[0]
    limit = sum(i.weight for i in items) * average
    heap: list[tuple[float, int]] = []

    def push(n: int) -> None:
        rung, item = at[n], items[n]
        if rung + 1 < len(ladder):
            loss = item.cost * (rung_price[rung + 1] - rung_price[rung])
            freed = item.weight * (ladder[rung] - ladder[rung + 1])
            heapq.heappush(heap, (loss / freed if freed else 0.0, -n))

    for n in range(len(items)):
        push(n)
    while heap and spent > limit:
        _, n = heapq.heappop(heap)
        n = -n
        spent -= items[n].weight * (ladder[at[n]] - ladder[at[n] + 1])
        at[n] += 1
        push(n)
    return [ladder[rung] for rung in at]


def prices_of(ladder: Sequence[float]) -> list[float]:
    """1/(2^b − 1)² by rung; 0 where the tensor is kept. A rung below 1 bit is priced as 1 bit, as
    in Average Quantization's allocators."""
    return [0.0 if bits >= 32 else 1 / (2 ** max(bits, 1) - 1) ** 2 for bits in ladder]


def layer_items(candidate: Candidate, evidence: TensorEvidence) -> list[Item]:
    """One item for each sample of a layer's input, with ActNN's cost."""
    found = product_of(candidate)
    if found is None:
        raise SettingsError(f"{candidate.name} is no layer input that ActNN would allocate")
    shape = candidate.stored_shape
    samples = max(len(evidence.sample_ranges), 1)
    elements = 1
    for size in shape:
        elements *= size
    per_sample = elements / samples
    positions = max(per_sample / shape[candidate.channels], 1)
    factor = found.kernel / (4 * found.groups) * 256 / positions * evidence.grad_square
    return [Item(factor * r, per_sample) for r in evidence.sample_ranges]


def fixed(bits: int, batch_norm: bool) -> Chooser:
    """L1 and L2: one width for all."""
    wanted = LAYERS | ({BATCH_NORM} if batch_norm else set())

    def choose(situation: Situation) -> list[Choice]:
        width = round(situation.level or bits)
        return [
            codable_choice(c, f"affine(bits={width})")
            if is_codable(c) and roles(c) & wanted
            else exact_choice(c)
            for c in situation.candidates
        ]

    return choose


def layer_averages(situation: Situation, average: float) -> dict[str, float]:
    """Average bits of each conv and linear input, by tensor name; see the module docstring."""
    layers = [
        c for c in situation.candidates if is_codable(c) and roles(c) & LAYERS and product_of(c)
    ]
    pooled: list[Item] = []
    owner: list[str] = []
    for candidate in layers:
        for item in layer_items(candidate, evidence_of(situation, candidate)):
            pooled.append(item)
            owner.append(candidate.name)
    widths = allocate(pooled, average, LADDER, prices_of(LADDER))
    totals: dict[str, list[float]] = {}
    for name, width in zip(owner, widths, strict=True):
        totals.setdefault(name, []).append(width)
    return {name: sum(found) / len(found) for name, found in totals.items()}


def with_batch_norms(
    candidates: Sequence[Candidate], layers: Mapping[str, float]
) -> dict[str, float]:
    """The bits of ``layers``, and each batch-norm input with those of the layer before it (8 where
    there is none)."""
    bits, before = dict(layers), 8.0
    for candidate in sorted(candidates, key=lambda c: c.saved.forward):
        if candidate.name in layers:
            before = layers[candidate.name]
        elif is_codable(candidate) and BATCH_NORM in roles(candidate):
            bits[candidate.name] = before
    return bits


def evidence_of(situation: Situation, candidate: Candidate) -> TensorEvidence:
    """Raises SettingsError where the tensor was not calibrated."""
    found = situation.evidence.get(candidate.name)
    if found is None or not found.sample_ranges:
        raise SettingsError(
            f"this policy allocates bits by measurements, and {candidate.name} has none: pass "
            "calibration=fxcompress.calibrate(model, batch)"
        )
    return found


def adaptive(average: float) -> Chooser:
    """L3: bits shared out over layers, and within a layer over its samples at every step."""

    def choose(situation: Situation) -> list[Choice]:
        averages = layer_averages(situation, situation.level or average)
        bits = with_batch_norms(situation.candidates, averages)
        return [
            codable_choice(c, f"adaptive(bits={bits[c.name]:.4f})")
            if c.name in bits
            else exact_choice(c)
            for c in situation.candidates
        ]

    return choose


def on_host(choose: Chooser) -> Chooser:
    """The same choices with their payloads in host memory.

    Raises:
        SettingsError: the graph's tensors are in host memory already.
    """

    def chosen(situation: Situation) -> list[Choice]:
        if all(c.fake.device.type == "cpu" for c in situation.candidates):
            raise SettingsError(
                "this policy moves payloads from the device to host memory, and the model is on "
                "the CPU: use actnn-l3, which has the same bits"
            )
        return [
            replace(c, host=True, reason=c.reason or "in host memory")
            if c.codec_spec and c.drops_values and c.candidate.fake.device.type != "cpu"
            else c
            for c in choose(situation)
        ]

    return chosen


def _swapped(name: str, doc: str) -> Policy:
    return replace(_L3, name=name, doc=doc, choose=on_host(adaptive(2.0)))


_L3 = Policy(
    "actnn-l3",
    "ActNN L3: 2 bits on average, shared out by range and gradient (arXiv 2104.14129)",
    adaptive(2.0),
    calibrated=True,
    levels=tuple(b / 4 for b in range(32, 3, -1)),
)

POLICIES = (
    Policy(
        "actnn-l1",
        "ActNN L1: conv and linear inputs at 4 bits (arXiv 2104.14129)",
        fixed(4, batch_norm=False),
        levels=tuple(range(8, 0, -1)),
    ),
    Policy(
        "actnn-l2",
        "ActNN L2: conv, linear and batch-norm inputs at 4 bits (arXiv 2104.14129)",
        fixed(4, batch_norm=True),
        levels=tuple(range(8, 0, -1)),
    ),
    _L3,
    _swapped("actnn-l4", "ActNN L4: L3 with payloads in host memory"),
    _swapped("actnn-l5", "ActNN L5: L4; its defragmentation is PyTorch's allocator's today"),
)
