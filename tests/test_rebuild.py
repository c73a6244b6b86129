"""Recompute as a choice of the planner: recipes, the rewritten graphs, exactness, budgets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_graphs import Recorder, payloads, record
from torch import Tensor, nn

import fxcompress
from fxcompress import rng
from fxcompress.calibrate import evidence_of
from fxcompress.choose import codable_choice, exact_choice, recompute_choice
from fxcompress.evidence import signature
from fxcompress.passes.analyse import analyse
from fxcompress.passes.properties import op_name, storage_root
from fxcompress.passes.rewrite import Choice, rewrite
from fxcompress.record import Recorder as StepRecorder
from fxcompress.record import Recording, gradients

RULE = {"representation": "recompute"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Conv(nn.Module):
    """Convolutions with norms: each follows from the one before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(3, 8), (8, 8), (8, 8), (8, 8)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in sizes)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return self.head(x.mean((2, 3))).square()


class Block(nn.Module):
    """A GPT block: q, k, v are views of one product, the MLP's product is four times as wide."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, 2, width // 2)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        x = F.dropout(x, self.dropout)
        return (x + self.down(F.gelu(self.up(self.norm2(x))))).square()


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (Conv, (4, 3, 16, 16)),
    (Block, (2, 64, 32)),
]


def ruled(model: nn.Module, x: Tensor, match: str = "*", **settings: Any) -> Recorder:
    rules = [{"match": match, **RULE}]
    return record(model, x, policy="lossless", overrides=rules, **settings)


def rebuilt(recorder: Recorder) -> set[str]:
    """Tensors rebuilt by a rule, not by passes/recompute.py."""
    return {t.name for t in recorder.plan.tensors if t.reason.startswith("rebuilt by")} - {
        t.name for t in recorder.plan.tensors if "from another saved tensor" in t.reason
    }


@pytest.mark.parametrize(("make", "shape"), CASES, ids=["conv", "gpt"])
def test_gradients_are_plain_ones(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    gradients, statistics = [], []
    for settings in (
        {"policy": "inductor"},
        {"policy": "lossless", "overrides": [{"match": "*", **RULE}]},
    ):
        torch._dynamo.reset()
        model = make()
        backend = fxcompress.backend(inner="aot_eager", min_bytes=0, **settings)
        compiled = torch.compile(model, backend=backend)
        for seed in (0, 1):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            compiled(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        statistics.append(list(model.buffers()))
    assert [t.representation for t in fxcompress.explain(compiled).tensors].count("recompute") > 2
    for found, plain in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    for one, other in zip(*statistics, strict=True):  # running ones are updated once a step
        assert torch.equal(one, other)


def test_a_convolution_is_repeated_before_its_first_reader() -> None:
    recorder = ruled(Conv(), torch.randn(4, 3, 16, 16), "convolutions.2")
    name = next(iter(rebuilt(recorder)))
    assert name not in [s.name for s in recorder.after.saved]
    nodes = list(recorder.after.backward.graph.nodes)
    again = [n for n in nodes if op_name(n) == "convolution"]
    assert len(again) == 1
    first = min(again[0].users)
    calls = {"convolution", "convolution_backward"}
    between = nodes[nodes.index(again[0]) + 1 : nodes.index(first)]
    assert not any(op_name(n) in calls for n in between)
    writing = {"copy_", "native_batch_norm", "_native_batch_norm_legit_functional"}
    assert not any(op_name(n) in writing for n in nodes)


def test_views_of_one_product_are_rebuilt_by_one_product() -> None:
    x = torch.randn(2, 64, 32)
    products = [
        sum(op_name(n) == "addmm" for n in r.after.backward.graph.nodes)
        for r in (record(Block(), x, policy="lossless"), ruled(Block(), x, "op:getitem"))
    ]
    assert products[1] == products[0] + 1
    assert len(rebuilt(ruled(Block(), x, "op:getitem"))) == 3


def test_no_tensor_is_rebuilt_from_a_rebuilt_one() -> None:
    """Under a rule for all, roots and rebuilt tensors take turns."""
    recorder = ruled(Conv(), torch.randn(4, 3, 16, 16))
    of = {t.name: t for t in recorder.plan.tensors}
    names = [f"convolution{i}" for i in ("", "_1", "_2", "_3")]
    kinds = [of[name].representation for name in names]
    assert kinds == ["recompute", "keep", "recompute", "keep"]
    assert "cannot be rebuilt without convolution" in of["convolution_1"].reason


def test_what_is_random_is_not_drawn_again() -> None:
    """The product after a dropout follows from what was kept of it, not through the draw."""
    plain = record(Block(dropout=0.5), torch.randn(2, 64, 32), policy="lossless")
    recorder = ruled(Block(dropout=0.5), torch.randn(2, 64, 32))
    assert rebuilt(recorder)

    def draws(recorder: Recorder) -> int:
        nodes = recorder.after.backward.graph.nodes
        return sum("rand" in op_name(n) or "dropout" in op_name(n) for n in nodes)

    assert draws(recorder) == draws(plain)


def test_an_exact_plan_within_a_budget() -> None:
    """Where rebuilding alone meets the budget at less cost, no noise is added."""
    x = torch.randn(16, 64, 32)

    def planned(**settings: Any) -> fxcompress.Plan:
        torch._dynamo.reset()
        backend = fxcompress.backend(inner="aot_eager", **settings)
        compiled = torch.compile(nn.Sequential(Block(), Block(), Block()), backend=backend)
        compiled(x).sum().backward()
        return fxcompress.explain(compiled)

    lossless = planned(policy="lossless")
    plan = planned(budget_mb=1.1 * 0.9 * lossless.planned_peak_bytes / 1e6)
    assert plan.planned_peak_bytes <= 0.9 * lossless.planned_peak_bytes
    assert plan.predicted_variance == 0
    assert any("addmm" in t.reason for t in plan.tensors if t.representation == "recompute")
    assert plan.slowdown is not None
    assert 0 < plan.slowdown < 0.5


def test_a_saved_plan_rebuilds_again(tmp_path: Any) -> None:
    x = torch.randn(2, 64, 32)
    first = ruled(Block(), x)
    first.plan.save(tmp_path / "plan.json")
    torch._dynamo.reset()
    again = record(Block(), x, plan=tmp_path / "plan.json")
    assert [(t.name, t.representation) for t in again.plan.tensors] == [
        (t.name, t.representation) for t in first.plan.tensors
    ]
    assert rebuilt(again) == rebuilt(first)


# --- coded roots ---------------------------------------------------------------------------------


def recorded(model: nn.Module, x: Tensor) -> Recording:
    recorder = StepRecorder(0)
    torch.compile(model, backend=recorder)(x).sum().backward()
    (found,) = recorder.recordings()
    return found


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def squared_error(
    recording: Recording, coded: str, spec: str, first: Collection[str], seeds: int = 24
) -> float:
    """Of the gradient, with one tensor coded and the buffers of others rebuilt."""
    exact = flat(gradients(recording, recording.cut))
    cut = recording.cut.copy()
    candidates = analyse(cut, 0, channels_last=recording.channels_last)
    buffers = {c.name: storage_root(c.saved.forward) for c in candidates}
    choices = []
    for candidate in candidates:
        choice: Choice | None = exact_choice(candidate)
        if buffers[candidate.name] in {buffers[name] for name in first}:
            choice = recompute_choice(candidate)
        elif candidate.name == coded:
            choice = codable_choice(candidate, spec)
        assert choice is not None
        choices.append(choice)
    rewritten = rewrite(cut, choices, "", channels_last=recording.channels_last)
    rng.manual_seed(1)
    errors = [flat(gradients(recording, rewritten)) - exact for _ in range(seeds)]
    rng.manual_seed(None)
    return sum(float(e.square().sum()) for e in errors) / seeds


@pytest.mark.parametrize(("make", "shape"), CASES, ids=["conv", "gpt"])
def test_noise_of_a_root_is_priced_through_what_is_rebuilt(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """As large as measured, for one buffer and for all of a root; for one of several at least."""
    torch.manual_seed(0)
    recording = recorded(make(), torch.randn(shape))
    evidence = evidence_of([recording], probes=4).of(signature(recording.cut))
    assert evidence is not None
    measured = partial(squared_error, recording, spec="rotate(bits=3)")
    ratios = []
    for name, known in evidence.items():
        alone = measured(name, first=())
        if len(known.through) > 1:
            ratio = measured(name, first=known.through) / alone
            assert 0.8 * ratio < 1 + sum(known.through.values()) < 1.6 * ratio, name
        for first, share in known.through.items():
            ratio = measured(name, first=[first]) / alone
            assert 1 + share > 0.8 * ratio, (name, first)
            if len(known.through) == 1:
                assert 1 + share < 1.3 * ratio, (name, first)
            ratios.append(ratio)
    assert len(ratios) > 2
    assert max(ratios) > 1.5, "what is rebuilt adds nothing here"


def test_noise_of_a_fitted_codec_is_priced_through_what_is_rebuilt() -> None:
    """It is where the tensor's own readers do not see it, and those of what is rebuilt may."""
    make, shape = CASES[1]
    torch.manual_seed(0)
    recording = recorded(make(), torch.randn(shape))
    evidence = evidence_of([recording], probes=16).of(signature(recording.cut))
    assert evidence is not None
    more = []
    for name, known in evidence.items():
        if known.through and 3.0 in known.transforms:
            spec = known.transforms[3.0]
            ratio = squared_error(recording, name, spec, known.through)
            ratio /= squared_error(recording, name, spec, ())
            assert 0.75 * ratio < 1 + known.again(known.through, spec) < 1.6 * ratio, name
            more.append(known.prices[spec].passing)
    assert max(more) > 1.5, "no codec's noise is shaped here"


def test_comparisons_of_what_is_rebuilt_from_noise_are_exact() -> None:
    """The second block's ReLU is decided in the forward, whatever its convolution becomes."""
    rules = [
        {"match": "convolutions.1", "bits": 4},
        {"match": "convolutions.2", **RULE},
    ]
    x = torch.randn(4, 3, 16, 16)
    recorder = record(Conv(), x, policy="lossless", overrides=rules)
    kinds = {t.module: t.representation for t in recorder.plan.tensors if "conv" in t.op}
    assert kinds["convolutions.2"] == "recompute"
    assert kinds["convolutions.1"].endswith("bits=4)") or "bits=4" in kinds["convolutions.1"]
    exact = [t for t in recorder.plan.tensors if t.module.startswith("convolutions.3")]
    assert [t.representation for t in exact] == ["keep"]
    # Two masks are saved: of the coded tensor and of the one rebuilt from it.
    specs = [spec for _, spec in payloads(recorder.after).values()]
    assert specs.count("bits(bits=1)") == 2
    decoded = {"decode", "decode_filled"}
    nodes = recorder.after.backward.graph.nodes
    compared = [n for n in nodes if op_name(n) in {"le", "gt"}]
    assert not [n for n in compared if _depends_on(n, decoded)]


def _depends_on(node: Any, names: set[str]) -> bool:
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if op_name(current) in names:
            return True
        pending += [n for n in current.all_input_nodes if n not in seen]
        seen.update(pending)
    return False


def test_tight_budgets_rebuild_from_coded_tensors() -> None:
    x = torch.randn(16, 64, 32)

    def planned(**settings: Any) -> fxcompress.Plan:
        torch._dynamo.reset()
        backend = fxcompress.backend(inner="aot_eager", **settings)
        compiled = torch.compile(nn.Sequential(Block(), Block(), Block()), backend=backend)
        compiled(x).sum().backward()
        return fxcompress.explain(compiled)

    before = planned(policy="lossless").saved_bytes_before
    plan = planned(ratio_saved=12)
    assert plan.saved_bytes <= before / 12
    again = [t for t in plan.tensors if t.representation == "recompute" and t.predicted_variance]
    assert again, "no tensor is rebuilt from a coded one"
    assert 0 < plan.predicted_variance < 1
