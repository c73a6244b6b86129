"""The backend as users meet it: ways in, ways of training, budgets, errors, determinism."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from train_small import no_leftovers, saved_storages

import fxcompress
from fxcompress import report, torch_private
from fxcompress.codecs import codec

PLAIN = "aot_eager_decomp_partition"
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graphs, seeds or settings from elsewhere: tests see these very sources compile."""
    for name in ("BUDGET_MB", "POLICY", "SEED", "RATIO_SAVED", "INNER", "GROUP", "MIN_BYTES"):
        monkeypatch.delenv(f"FXCOMPRESS_{name}", raising=False)
    monkeypatch.setattr(report, "_executed", {})  # what explain() without a model speaks of
    with no_leftovers():
        yield


class Net(nn.Module):
    """Linear, GELU, dropout, ReLU: a lossy tensor, a mask, random numbers."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 8)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.first(x)), self.dropout, self.training)
        return self.head(F.relu(self.norm(self.second(x))))


def batch(rows: int = 48, seed: int = 2) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def backend(**settings: Any) -> Any:
    """Quick to compile, and nothing is too small."""
    return fxcompress.backend(**{"inner": "aot_eager", "min_bytes": 0, **settings})


def step(model: Callable[..., Any], x: Tensor, seed: int = 3) -> Tensor:
    """Forward and backward of a loss that weighs outputs differently; the output."""
    torch.manual_seed(seed)
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)).sum().backward()
    return out.detach()


def gradients(model: nn.Module) -> Gradients:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def plain(model: nn.Module, x: Tensor, seed: int = 3, backend: str = PLAIN) -> Gradients:
    """Gradients of plain PyTorch; leaves the model as it was."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    step(torch.compile(model, backend=backend), x, seed)
    result = gradients(model)
    model.zero_grad()
    model.load_state_dict(state)
    torch._dynamo.reset()
    return result


def error(found: Gradients, exact: Gradients) -> float:
    assert found.keys() == exact.keys()
    difference = sum(float((found[k] - exact[k]).double().square().sum()) for k in exact)
    return (difference / sum(float(exact[k].double().square().sum()) for k in exact)) ** 0.5


def equal(found: Gradients, exact: Gradients) -> bool:
    assert found.keys() == exact.keys()
    return all(torch.equal(found[k], exact[k]) for k in exact)


def representations(compiled: Any) -> set[str]:
    return {t.representation for t in fxcompress.explain(compiled).tensors}


CODED = "affine(bits=4)"


# --- ways in ------------------------------------------------------------------------------------


def test_entry_point_with_options() -> None:
    options = {"policy": "uniform4", "inner": "aot_eager", "min_bytes": 0}
    model, x = Net(), batch()
    exact = plain(model, x)
    compiled = torch.compile(model, backend="fxcompress", options=options)
    step(compiled, x)
    assert 0 < error(gradients(model), exact) < 0.2
    assert CODED in representations(None)


def test_options_of_inductor_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def compile_with(module: Any, inputs: Any, partitioner: Any, patches: Any) -> Any:
        seen.update(patches)
        return torch_private.compile_with_aot_eager(module, inputs, partitioner)

    monkeypatch.setattr(torch_private, "compile_with_inductor", compile_with)
    options = {"policy": "lossless", "min_bytes": 0, "epilogue_fusion": False}
    step(torch.compile(Net(), backend="fxcompress", options=options), batch())
    assert seen == {"epilogue_fusion": False, "allow_buffer_reuse": False}


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXCOMPRESS_POLICY", "uniform4")
    monkeypatch.setenv("FXCOMPRESS_MIN_BYTES", "0")
    monkeypatch.setenv("FXCOMPRESS_INNER", "aot_eager")
    made = fxcompress.backend()
    compiled = torch.compile(Net(), backend=made)
    step(compiled, batch())
    assert CODED in representations(compiled)
    over = fxcompress.backend(policy="uniform8")
    assert (over.settings.policy, over.settings.min_bytes) == ("uniform8", 0)
    torch._dynamo.reset()
    step(torch.compile(Net(), backend="fxcompress"), batch())
    assert fxcompress.explain().policy == "uniform4"


def saved_bytes(out: Tensor) -> int:
    """Bytes of distinct storages that the graph of ``out`` holds, of parameters too."""
    return sum(saved_storages(out).values())


def test_enabled_under_plain_inductor() -> None:
    """The global switch: compresses inside, leaves no trace outside."""
    model, x = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 8)), batch(512)
    compiled = torch.compile(model, backend="inductor")
    out = compiled(x)
    before = saved_bytes(out)
    out.sum().backward()
    exact = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    with fxcompress.enabled(policy="uniform4"):
        out = compiled(x)
        inside = saved_bytes(out)
        out.sum().backward()
    plan = fxcompress.explain(compiled)
    assert CODED in {t.representation for t in plan.tensors}
    assert plan.saved_bytes < plan.saved_bytes_before / 6
    assert before - inside == pytest.approx(plan.saved_bytes_before - plan.saved_bytes, abs=64)
    assert 0 < error(gradients(model), exact) < 0.2
    assert torch._inductor.config.custom_partitioner_fn is None
    with pytest.raises(ZeroDivisionError), fxcompress.enabled(policy="uniform4"):
        raise ZeroDivisionError
    assert torch._inductor.config.custom_partitioner_fn is None


def test_enabled_nests() -> None:
    config = torch._inductor.config
    with fxcompress.enabled(policy="uniform4"):
        outer = config.custom_partitioner_fn
        assert outer is not None
        with fxcompress.enabled(policy="uniform8"):
            assert config.custom_partitioner_fn is not outer
        assert config.custom_partitioner_fn is outer
    assert config.custom_partitioner_fn is None
    for policy in ("lossless", "uniform4"):
        fxcompress.enable(policy=policy)
        assert config.custom_partitioner_fn is not None
    fxcompress.disable()
    assert config.custom_partitioner_fn is None


def test_policy_inductor_changes_nothing() -> None:
    model, x = Net(), batch()
    exact = plain(model, x)
    compiled = torch.compile(model, backend=backend(policy="inductor"))
    step(compiled, x)
    assert equal(gradients(model), exact)
    assert "as plain Inductor has it" in fxcompress.explain(compiled).note


def test_explain_before_the_first_step() -> None:
    compiled = torch.compile(Net(), backend=backend())
    with pytest.raises(fxcompress.FxCompressError, match="run one forward and backward"):
        fxcompress.explain(compiled)


# --- ways of using a model ----------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_inference(inner: str) -> None:
    """Without gradients there is nothing to save: the plain graph, equal outputs, no plan."""
    model, x = Net().eval(), batch()
    plain_backend = PLAIN if inner == "aot_eager" else "inductor"
    with torch.no_grad():
        expected = torch.compile(model, backend=plain_backend)(x)
        torch._dynamo.reset()
        made = backend(policy="uniform2", inner=inner)
        assert torch.equal(torch.compile(model, backend=made)(x), expected)
    assert not made.plans


def test_switching_between_train_and_eval() -> None:
    model, x = Net(), batch()
    exact = plain(model, x)
    expected = model.eval()(x).detach()
    compiled = torch.compile(model, backend=backend(policy="uniform8"))
    for _ in range(2):
        model.train()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.zero_grad()
        step(compiled, x)
        assert 0 < error(gradients(model), exact) < 0.02
        model.load_state_dict(state)  # batch norm moved on
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
        compiled(x).sum().backward()  # gradients in eval mode: a graph of its own


def test_second_backward_sees_the_same_noise() -> None:
    model, x = Net(), batch()
    compiled = torch.compile(model, backend=backend(policy="uniform2"))
    loss = compiled(x).square().sum()
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    compiled(x)  # another forward draws another key meanwhile
    loss.backward()
    assert equal(gradients(model), first)


def test_two_live_forwards() -> None:
    """Each backward decodes its own forward's payload with its own key."""
    model, x, y = Net(dropout=0.0).eval(), batch(seed=4), batch(seed=5)
    exact_x, exact_y = plain(model, x), plain(model, y)
    compiled = torch.compile(model, backend=backend(policy="uniform8"))
    weights = torch.linspace(-1, 1, 48 * 8).view(48, 8)
    first, second = (compiled(x) * weights).sum(), (compiled(y) * weights).sum()
    first.backward()
    assert 0 < error(gradients(model), exact_x) < 0.02
    model.zero_grad()
    second.backward()
    assert 0 < error(gradients(model), exact_y) < 0.02


def test_gradients_accumulate() -> None:
    model, x, y = Net(dropout=0.0).eval(), batch(seed=4), batch(seed=5)
    exact_x, exact_y = plain(model, x), plain(model, y)
    compiled = torch.compile(model, backend=backend(policy="uniform8"))
    step(compiled, x)
    step(compiled, y)
    both = {k: exact_x[k] + exact_y[k] for k in exact_x}
    assert 0 < error(gradients(model), both) < 0.02


def test_frozen_parameters() -> None:
    model, x = Net(), batch()
    model.first.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    exact = plain(model, x)
    assert "first.weight" not in exact
    compiled = torch.compile(model, backend=backend(policy="uniform8"))
    step(compiled, x)
    assert 0 < error(gradients(model), exact) < 0.02
    torch._dynamo.reset()
    model.requires_grad_(False)  # nothing needs a gradient
    made = backend(policy="uniform8")
    assert not torch.compile(model, backend=made)(x).requires_grad
    assert not made.plans


def test_graph_break() -> None:
    """Both graphs are compressed, and one plan speaks of both."""

    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.first(x))
            torch._dynamo.graph_break()
            return self.head(F.silu(self.second(x)))

    model, x = Broken(), batch()
    exact = plain(model, x)
    compiled = torch.compile(model, backend=backend(policy="uniform8"))
    step(compiled, x)
    assert 0 < error(gradients(model), exact) < 0.02
    plan = fxcompress.explain(compiled)
    assert plan.graphs == 2
    assert {"first", "second"} <= {t.module for t in plan.tensors}
    coded = {t.module for t in plan.tensors if t.representation.startswith("affine")}
    assert {"first", "second"} <= coded


def test_both_graphs_of_a_model_share_the_budget() -> None:
    """What the first graph keeps saved is there while the second one runs."""

    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.first(x))
            torch._dynamo.graph_break()
            return self.head(F.silu(self.second(x)))

    x = batch(512)
    whole = torch.compile(Broken(), backend=backend(policy="lossless"))
    step(whole, x)
    plan = fxcompress.explain(whole)
    saved = plan.tensors[0].storage_bytes
    assert saved >= 512 * 64 * 4
    torch._dynamo.reset()
    made = backend(budget_mb=plan.plain_peak_bytes * 0.9 / 1e6)
    step(torch.compile(Broken(), backend=made), x)
    assert made.plan().planned_peak_bytes <= 0.9 * plan.plain_peak_bytes
    # The second graph by itself would have fitted without any change.
    alone = backend(budget_mb=plan.plain_peak_bytes * 0.9 / 1e6)
    tail = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8))
    torch._dynamo.reset()
    step(torch.compile(tail, backend=alone), torch.randn(512, 64))
    assert "within the budget" in alone.plan().note


@pytest.mark.parametrize("mark", [True, False], ids=["marked", "second size"])
def test_dynamic_batch(mark: bool) -> None:
    model = Net()
    exact = {n: plain(model, batch(n)) for n in (48, 36, 61)}
    made = backend(policy="uniform8")
    compiled = torch.compile(model, backend=made)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for rows, expected in exact.items():
        x = batch(rows)
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
        model.zero_grad()
        model.load_state_dict(state)
        step(compiled, x)
        assert 0 < error(gradients(model), expected) < 0.02, rows
    last = report.read(list(made.plans)[-1])
    symbolic = [t for t in last.tensors if any(isinstance(s, str) for s in t.shape)]
    assert [t for t in symbolic if t.representation.startswith("affine(bits=8")]
    assert len(made.plans) == (1 if mark else 2)


def test_dynamic_batch_on_inductor() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8), nn.ReLU())
    exact = {n: plain(model, batch(n), backend=PLAIN) for n in (48, 61)}
    compiled = torch.compile(model, backend=backend(policy="uniform8", inner="inductor"))
    for rows, expected in exact.items():
        x = batch(rows)
        torch._dynamo.mark_dynamic(x, 0)
        model.zero_grad()
        step(compiled, x)
        assert 1e-4 < error(gradients(model), expected) < 0.02, rows


def test_float64_falls_back() -> None:
    model, x = Net(dropout=0.0).double(), batch().double()
    exact = plain(model, x)
    compiled = torch.compile(model, backend=backend(policy="uniform2"))
    step(compiled, x)
    assert equal(gradients(model), exact)
    rows = [t for t in fxcompress.explain(compiled).tensors if t.dtype == "torch.float64"]
    assert rows
    assert {t.reason for t in rows} == {"dtype float64 has no codec"}


def test_complex_falls_back() -> None:
    weight = torch.randn(16, 16, dtype=torch.complex64, requires_grad=True)

    def transform(x: Tensor) -> Tensor:
        y = torch.fft.fft(x) @ weight
        return (y * y).real

    x = batch()[:, :16]
    transform(x).sum().backward()
    assert weight.grad is not None
    exact, weight.grad = weight.grad.clone(), None
    compiled = torch.compile(transform, backend=backend(policy="uniform2"))
    compiled(x).sum().backward()
    torch.testing.assert_close(weight.grad, exact)
    reasons = {t.reason for t in fxcompress.explain(compiled).tensors if "complex" in t.dtype}
    assert reasons == {"dtype complex64 has no codec"}


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 model"])
def test_bfloat16(autocast: bool) -> None:
    model = Net(dropout=0.0) if autocast else Net(dropout=0.0).bfloat16()
    x = batch() if autocast else batch().bfloat16()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        exact = plain(model, x)
        compiled = torch.compile(model, backend=backend(policy="uniform8"))
        step(compiled, x)
    assert 0 < error(gradients(model), exact) < 0.03
    rows = fxcompress.explain(compiled).tensors
    assert [
        t for t in rows if t.dtype == "torch.bfloat16" and t.representation.startswith("affine")
    ]


# --- randomness ---------------------------------------------------------------------------------


def test_noise_follows_its_seed() -> None:
    model, x = Net(), batch()
    compiled = torch.compile(model, backend=backend(policy="uniform2"))
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def one() -> Gradients:
        model.load_state_dict(state)
        model.zero_grad()
        step(compiled, x)
        return gradients(model)

    fxcompress.manual_seed(7)
    first, second = one(), one()
    fxcompress.manual_seed(7)
    assert equal(one(), first)
    assert equal(one(), second)
    assert not equal(first, second)  # the same dropout, another step's noise
    fxcompress.manual_seed(8)
    assert not equal(one(), first)


def test_seed_setting() -> None:
    def one(seed: int) -> Gradients:
        torch._dynamo.reset()
        model = Net()
        step(torch.compile(model, backend=backend(policy="uniform2", seed=seed)), batch())
        return gradients(model)

    first = one(3)
    assert equal(one(3), first)
    assert not equal(one(4), first)


def test_random_stream_of_the_model_is_unchanged() -> None:
    model, x = Net(dropout=0.5), batch()
    ends, outputs = [], []
    for made in (PLAIN, backend(policy="uniform2")):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=made)
        step(compiled, x)
        outputs.append(compiled(x).detach())  # the second draw of the stream
        ends.append(torch.get_rng_state())
    assert torch.equal(*outputs)
    assert torch.equal(*ends)


# --- budgets ------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Eight layers, so that saved tensors outweigh transients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            *(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU()))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


ROWS = 2048


def deep_batch() -> Tensor:
    return torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def peaks() -> tuple[int, float]:
    """Plain peak in bytes and the smallest feasible budget in MB, as the error names it."""
    torch._dynamo.reset()
    compiled = torch.compile(Deep(), backend=backend(policy="lossless"))
    step(compiled, deep_batch())
    plain_peak = fxcompress.explain(compiled).plain_peak_bytes
    torch._dynamo.reset()
    with pytest.raises(fxcompress.BudgetError) as caught:
        step(torch.compile(Deep(), backend=backend(budget_mb=0.01)), deep_batch())
    found = re.search(r"smallest feasible budget is ([\d.]+) MB", str(caught.value))
    assert found
    return plain_peak, float(found[1])


def test_generous_budget_changes_nothing(peaks: tuple[int, float]) -> None:
    model, x = Deep(), deep_batch()
    exact = plain(model, x)
    compiled = torch.compile(model, backend=backend(budget_mb=1.2 * peaks[0] / 1e6))
    step(compiled, x)
    assert equal(gradients(model), exact)
    plan = fxcompress.explain(compiled)
    assert "within the budget" in plan.note
    assert {t.representation for t in plan.tensors} == {"keep"}
    assert plan.planned_peak_bytes == plan.plain_peak_bytes == peaks[0]


def test_tight_budget_is_met_with_little_noise(peaks: tuple[int, float]) -> None:
    model, x = Deep(), deep_batch()
    exact = plain(model, x)
    errors, peaks_planned = [], []
    for share in (0.9, 0.7, 0.5):
        torch._dynamo.reset()
        budget = share * peaks[0] / 1e6
        compiled = torch.compile(model, backend=backend(budget_mb=budget, time_price=0))
        model.zero_grad()
        step(compiled, x)
        plan = fxcompress.explain(compiled)
        assert plan.planned_peak_bytes <= budget * 1e6
        assert plan.plain_peak_bytes == peaks[0]
        errors.append(error(gradients(model), exact))
        peaks_planned.append(plan.planned_peak_bytes)
    assert errors[0] == 0.0  # exact recomputation is enough, so no noise is added
    assert max(errors) < 0.1
    assert peaks_planned == sorted(peaks_planned, reverse=True)


def test_smallest_feasible_budget_is_feasible(peaks: tuple[int, float]) -> None:
    plain_peak, smallest = peaks
    assert 0 < smallest < 0.6 * plain_peak / 1e6
    compiled = torch.compile(Deep(), backend=backend(budget_mb=smallest))
    step(compiled, deep_batch())
    assert fxcompress.explain(compiled).planned_peak_bytes <= smallest * 1e6
    torch._dynamo.reset()
    compiled = torch.compile(Deep(), backend=backend(budget_mb=0.9 * smallest))
    with pytest.raises(fxcompress.BudgetError):
        step(compiled, deep_batch())


def test_infeasible_budget_names_what_holds_it_up() -> None:
    """The user's own type reaches the user, not Dynamo's BackendCompilerFailed."""
    compiled = torch.compile(Deep(), backend=backend(budget_mb=0.02))
    with pytest.raises(fxcompress.BudgetError) as caught:
        compiled(deep_batch())
    text = str(caught.value)
    assert "budget_mb=0.02" in text
    assert re.search(r"smallest feasible budget is [\d.]+ MB", text)
    assert re.search(r"\(layers\.\d+, [\d.]+ MB\)", text), "no tensor of the model is named"
    assert "make the batch smaller" in text


def test_infeasible_budget_of_a_fixed_policy(peaks: tuple[int, float]) -> None:
    """uniform8 cannot reach what auto can; the message says so."""
    made = backend(policy="uniform8", budget_mb=peaks[1])
    with pytest.raises(fxcompress.BudgetError, match=r"policy='uniform8'.*policy='auto'"):
        step(torch.compile(Deep(), backend=made), deep_batch())


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_budget_error_under_either_compiler(inner: str) -> None:
    compiled = torch.compile(Deep(), backend=backend(budget_mb=0.02, inner=inner))
    with pytest.raises(fxcompress.BudgetError):
        compiled(deep_batch())


def test_budget_error_under_enabled() -> None:
    """Dynamo wraps what plain Inductor raises; the block gives it back as it was."""
    feasible = pytest.raises(fxcompress.BudgetError, match="feasible")
    with feasible, fxcompress.enabled(budget_mb=0.02):
        torch.compile(Deep(), backend="inductor")(deep_batch())


def test_budget_error_by_name() -> None:
    options = {"budget_mb": 0.02, "inner": "aot_eager"}
    with pytest.raises(fxcompress.BudgetError):
        torch.compile(Deep(), backend="fxcompress", options=options)(deep_batch())


@pytest.mark.parametrize("ratio", [2.0, 6.0])
def test_ratio_saved(ratio: float) -> None:
    compiled = torch.compile(Deep(), backend=backend(ratio_saved=ratio))
    step(compiled, deep_batch())
    plan = fxcompress.explain(compiled)
    assert plan.saved_bytes <= plan.saved_bytes_before / ratio
    assert plan.saved_bytes > plan.saved_bytes_before / ratio / 2, "far more than was asked for"


def test_ratio_out_of_reach() -> None:
    rules = [{"match": "*", "bits": 1}]  # nothing rebuilt, which takes no bytes
    compiled = torch.compile(Deep(), backend=backend(ratio_saved=1000, overrides=rules))
    with pytest.raises(fxcompress.BudgetError, match=r"shrink by [\d.]+ at most"):
        compiled(deep_batch())


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"budget_mb": -1}, "budget_mb=4000"),
        ({"budget_mb": 0}, "budget_mb=4000"),
        ({"budget_mb": float("nan")}, "budget_mb=4000"),
        ({"budget_mb": "much"}, "budget_mb='much'"),
        ({"group": 64.5}, "group=64.5"),
        ({"seed": "x"}, "seed='x'"),
        ({"policy": "best"}, "choose one of: inductor, lossless"),
        ({"policy": "uniform9"}, "widths are 1 to 8 bits"),
        ({"bits": 4}, "known: budget_mb, policy"),
        ({"ratio_saved": 0.5}, "1 or more"),
        ({"ratio_saved": 4, "budget_mb": 4}, "not both"),
        ({"ratio_saved": 4, "policy": "uniform2"}, 'policy="auto"'),
        ({"inner": "eager"}, "inductor, aot_eager"),
        ({"group": 100}, "multiple of 8"),
        ({"min_bytes": -1}, "0 or more"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(fxcompress.SettingsError) as caught:
        fxcompress.backend(**settings)
    assert remedy in str(caught.value)
    with pytest.raises(fxcompress.SettingsError):
        fxcompress.enable(**settings)
    assert torch._inductor.config.custom_partitioner_fn is None


@pytest.mark.parametrize("name", ["BUDGET_MB", "SEED", "GROUP"])
def test_bad_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FXCOMPRESS_{name}", "plenty")
    with pytest.raises(fxcompress.SettingsError, match=f"FXCOMPRESS_{name}='plenty'"):
        fxcompress.backend()


@pytest.mark.parametrize("made", ["fxcompress", fxcompress.backend()], ids=["name", "instance"])
def test_bad_options(made: Any) -> None:
    """Known only once Dynamo calls the backend; not wrapped by it."""
    compiled = torch.compile(Net(), backend=made, options={"policy": "best"})
    with pytest.raises(fxcompress.SettingsError, match="choose one of"):
        compiled(batch())


def test_codec_refuses_a_dtype() -> None:
    key = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(fxcompress.CodecError, match="float64"):
        codec("affine(bits=4)").encode(torch.zeros(8, dtype=torch.float64), key, 0)
    with pytest.raises(fxcompress.CodecError, match="float32"):
        codec("bits(bits=1)").encode(torch.zeros(8), None, 0)
