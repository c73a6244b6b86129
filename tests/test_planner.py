"""The planner: saved plans are followed again, budgets of every kind are met, or refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import Plan
from fxcompress.decision import MARGIN
from fxcompress.ledger import Ledger
from fxcompress.pipeline import Partitioner
from fxcompress.settings import make
from fxcompress.solve import GAP


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.down(self.act(self.up(x))))


class Net(nn.Module):
    """Two layers; with ``broken``, a graph break after the first."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.layers[1](x).square().sum()


class Deep(nn.Module):
    """Eight layers, so that saved tensors outweigh transients."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            *(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.SiLU()))
        )
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[:8](x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.layers[8:](x).square().sum()


def batch(rows: int = 512) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))


def trained(
    model: nn.Module | None = None, x: Tensor | None = None, **settings: Any
) -> tuple[Plan, list[Tensor]]:
    """The plan of one step and its gradients."""
    model = Net() if model is None else model
    torch._dynamo.reset()
    fxcompress.manual_seed(3)
    compiled = torch.compile(model, backend=fxcompress.backend(inner="aot_eager", **settings))
    compiled(batch() if x is None else x).backward()
    fxcompress.manual_seed(None)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return fxcompress.explain(compiled), gradients


def representations(plan: Plan) -> list[tuple[str, str]]:
    return [(t.name, t.representation) for t in plan.tensors]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative L2 error of the whole gradient."""
    wrong = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return (wrong / sum(float(b.square().sum()) for b in exact)) ** 0.5


def edited(plan: Plan, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The plan as JSON with each of its rows edited."""
    data = json.loads(plan.to_json())
    for row in data["tensors"]:
        edit(row)
    path.write_text(json.dumps(data))
    return path


# --- a share of the saved bytes ------------------------------------------------------------------


def test_a_graph_of_small_tensors_refuses_no_ratio() -> None:
    """Behind a graph break, a loss saves labels and statistics, which stay as they are."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = Deep()

        def forward(self, x: Tensor) -> Tensor:
            labels = (x.sum(1) > 0).long()
            y = self.deep.layers(x)
            torch._dynamo.graph_break()
            return nn.functional.cross_entropy(y, labels)

    backend = fxcompress.backend(ratio_saved=8, inner="aot_eager")
    torch.compile(Broken(), backend=backend)(batch(2048)).backward()
    plan = backend.plan()
    assert plan.graphs == 2
    assert plan.saved_bytes_before > 7.5 * plan.saved_bytes


# --- time -----------------------------------------------------------------------------------------


def test_time_has_its_price() -> None:
    """The dearer it is, the faster and the noisier the plan."""
    plans = []
    for price in (0.0, 100.0):
        torch._dynamo.reset()
        backend = fxcompress.backend(ratio_saved=6, time_price=price, inner="aot_eager")
        torch.compile(Deep(), backend=backend)(torch.randn(512, 64)).backward()
        plans.append(backend.plan())
    free, dear = plans
    assert free.slowdown is not None
    assert dear.slowdown is not None
    assert dear.slowdown < free.slowdown
    assert dear.predicted_variance > free.predicted_variance


# --- saved plans --------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "two graphs"])
@pytest.mark.parametrize("settings", [{"ratio_saved": 5}, {"policy": "uniform4"}], ids=str)
def test_a_saved_plan_gives_the_same_step(
    broken: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    plan, gradients = trained(Net(broken), **settings)
    plan.save(tmp_path / "plan.json")
    again, same = trained(Net(broken), plan=str(tmp_path / "plan.json"))
    assert representations(again) == representations(plan)
    assert again.saved_bytes == plan.saved_bytes
    assert again.planned_peak_bytes == plan.planned_peak_bytes
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_a_plan_that_leaves_all_alone() -> None:
    plan, gradients = trained(budget_mb=1000)
    again, same = trained(plan=plan)
    assert {t.representation for t in again.tensors} == {"keep"}
    assert "given plan" in again.note
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_an_edited_plan(tmp_path: Path) -> None:
    plan, _ = trained(policy="lossless")

    def edit(row: dict[str, Any]) -> None:
        if row["module"] == "layers.1.up":
            row["representation"] = "rotate(bits=2, group=256)"

    again, _ = trained(plan=edited(plan, tmp_path / "plan.json", edit))
    changed = set(representations(again)) - set(representations(plan))
    assert {r for _, r in changed} == {"rotate(bits=2)"}
    assert len(changed) == 1


def test_a_plan_for_another_batch_size() -> None:
    plan, _ = trained(policy="uniform4")
    again, _ = trained(x=batch(768), plan=plan)
    assert representations(again) == representations(plan)
    assert again.saved_bytes > plan.saved_bytes


def test_overrides_go_before_the_plan() -> None:
    plan, _ = trained(policy="uniform4")
    again, _ = trained(plan=plan, overrides=[{"match": "layers.0.up", "keep": True}])
    changed = set(representations(again)) - set(representations(plan))
    assert {r for _, r in changed} == {"keep"}


def test_a_plan_over_the_budget() -> None:
    plan, _ = trained(policy="lossless")
    budget = plan.planned_peak_bytes / 1e6 * 0.9
    with pytest.raises(fxcompress.BudgetError, match="the given plan"):
        trained(plan=plan, budget_mb=budget)


def _set(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(row: dict[str, Any]) -> None:
        if row["module"] == "layers.1.up":
            row.update(changes)

    return edit


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"name": "another"}, "the plan has no tensor addmm"),
        ({"module": "layers.9"}, "comes from layers.9"),
        ({"op": "mm"}, "the plan is of another model"),
        ({"dtype": "torch.bfloat16"}, "dimensions of torch.bfloat16"),
        ({"shape": [512]}, "has 1 dimensions"),
        ({"representation": "zip"}, "unknown codec 'zip'"),
        ({"representation": "affine(bits=9)"}, "the plan's tensor addmm"),
        ({"representation": "masks"}, "cannot be 'masks'"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit(changes: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    plan, _ = trained(policy="lossless")
    with pytest.raises(fxcompress.SettingsError) as caught:
        trained(plan=edited(plan, tmp_path / "plan.json", _set(**changes)))
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("representation", "remedy"),
    [
        ("rotate(bits=2)", r"cannot be rotate\(bits=2\)"),
        ("recompute", "nothing rebuilds this tensor"),
    ],
)
def test_masks_are_packed_or_kept(representation: str, remedy: str, tmp_path: Path) -> None:
    def edit(row: dict[str, Any]) -> None:
        if row["dtype"] == "torch.bool":
            row["representation"] = representation

    plan, _ = trained(policy="lossless")
    with pytest.raises(fxcompress.SettingsError, match=remedy):
        trained(plan=edited(plan, tmp_path / "plan.json", edit))


def test_rebuilt_tensors_stay_rebuilt(tmp_path: Path) -> None:
    def edit(row: dict[str, Any]) -> None:
        if row["representation"] == "recompute":
            row["representation"] = "keep"

    def net() -> nn.Module:
        model = Net()
        model.layers[0].act = nn.GELU()
        return model

    plan, _ = trained(net(), policy="lossless")
    assert "recompute" in {t.representation for t in plan.tensors}
    with pytest.raises(fxcompress.SettingsError, match="leave it 'recompute'"):
        trained(net(), plan=edited(plan, tmp_path / "plan.json", edit))


def test_a_plan_with_tensors_of_another_model() -> None:
    plan, _ = trained(policy="lossless")
    more = replace(plan, tensors=(*plan.tensors, replace(plan.tensors[0], name="stranger")))
    with pytest.raises(fxcompress.SettingsError, match="does not save: stranger"):
        trained(plan=more)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"plan": "nowhere.json"}, "there is no plan at nowhere.json"),
        ({"plan": 3}, "fxcompress.explain"),
    ],
    ids=str,
)
def test_what_is_no_plan(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(fxcompress.SettingsError, match=remedy):
        fxcompress.backend(**settings)


def test_a_plan_has_no_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = Plan("auto", None, (), 0, 0)
    for others in ({"policy": "uniform4"}, {"ratio_saved": 2}):
        with pytest.raises(fxcompress.SettingsError, match="its own choices"):
            fxcompress.backend(plan=plan, **others)
    plan.save(tmp_path / "plan.json")
    monkeypatch.setenv("FXCOMPRESS_PLAN", str(tmp_path / "plan.json"))
    assert make().plan == plan


def test_the_key_covers_the_plan() -> None:
    plan = Plan("auto", None, (), 0, 0)
    other = replace(plan, note="other")
    keys = {Partitioner(make(plan=p)).uuid() for p in (None, plan, other)}
    assert len(keys) == 3


# --- bounds -------------------------------------------------------------------------------------


def test_bounds_exclude_each_other() -> None:
    bounds = {"budget_mb": 5, "ratio": 2, "ratio_saved": 2, "max_grad_error": 0.1}
    bounds["max_loss_increase"] = 0.1
    for first, second in itertools.combinations(bounds, 2):
        with pytest.raises(fxcompress.SettingsError, match=f"give {first} or {second}, not both"):
            fxcompress.backend(**{first: bounds[first], second: bounds[second]})


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"ratio": 0.5}, "ratio=8 asks for an eighth"),
        ({"ratio": "half"}, "ratio='half' is not a number"),
        ({"ratio": float("nan")}, "1 or more"),
        ({"max_grad_error": -0.1}, "0 or more"),
        ({"max_grad_error": float("inf")}, "0 or more"),
        ({"max_loss_increase": -0.1}, "0 or more"),
        ({"max_grad_error": 0.1, "policy": "uniform4"}, 'policy="auto"'),
        ({"max_grad_error": 0.1, "plan": Plan("auto", None, (), 0, 0)}, "its own choices"),
    ],
    ids=str,
)
def test_bad_bounds(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(fxcompress.SettingsError) as caught:
        fxcompress.backend(**settings)
    assert remedy in str(caught.value)


def test_ratio_is_a_share_of_the_plain_peak() -> None:
    calibration = fxcompress.calibrate(Deep(), batch(), loss=lambda loss: loss)
    plain, exact = trained(Deep(), ratio=1)
    assert "within the budget" in plain.note
    lowest = None
    for ratio in (1.3, 2.0):
        plan, gradients = trained(Deep(), ratio=ratio, calibration=calibration)
        assert plan.plain_peak_bytes == plain.plain_peak_bytes
        assert plan.planned_peak_bytes <= plain.plain_peak_bytes / ratio
        assert lowest is None or plan.planned_peak_bytes < lowest
        lowest = plan.planned_peak_bytes
        assert error(gradients, exact) < 0.1
    budget = plain.plain_peak_bytes / 2 / 1e6
    same, _ = trained(Deep(), budget_mb=budget, calibration=calibration)
    assert representations(same) == representations(plan)
    with pytest.raises(fxcompress.BudgetError, match=r"ratio=100 \(a budget of .* smallest feasib"):
        trained(Deep(), ratio=100)


def test_ratio_counts_what_plain_graphs_would_save() -> None:
    """The second graph's bound is a share of a step in which the first was plain, too."""
    plain, _ = trained(Deep(broken=True), ratio=1)
    plan, _ = trained(Deep(broken=True), ratio=1.5)
    assert plan.graphs == 2
    assert plan.plain_peak_bytes == plain.plain_peak_bytes
    assert plan.planned_peak_bytes <= plain.plain_peak_bytes / 1.5


def test_max_grad_error_is_a_ceiling_on_noise() -> None:
    _, exact = trained(Deep(), ratio=1)
    calibration = fxcompress.calibrate(Deep(), batch(), loss=lambda loss: loss)
    peaks, errors = [], []
    for ceiling in (0.0, 0.01, 0.1, 0.5):
        plan, gradients = trained(Deep(), max_grad_error=ceiling, calibration=calibration)
        assert plan.predicted_variance <= ceiling**2 * 1.001
        assert plan.calibrated
        assert plan.gap is not None
        peaks.append(plan.planned_peak_bytes)
        errors.append(error(gradients, exact))
        assert errors[-1] <= 1.5 * ceiling + 1e-6  # one draw of the noise
    assert errors[0] < 1e-6
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.7 * peaks[0]


def test_max_grad_error_and_budget_are_duals() -> None:
    """What a ceiling reaches, a budget of that size reaches with no more noise."""
    calibration = fxcompress.calibrate(Deep(), batch(), loss=lambda loss: loss)
    plan, _ = trained(Deep(), max_grad_error=0.1, calibration=calibration)
    budget = plan.planned_peak_bytes * MARGIN / 1e6 * 1.001
    dual, _ = trained(Deep(), budget_mb=budget, calibration=calibration)
    assert dual.predicted_variance <= plan.predicted_variance * 1.01
    assert dual.predicted_variance <= 0.01


def test_max_grad_error_measures_the_first_batch() -> None:
    plan, _ = trained(Deep(), max_grad_error=0.1)
    assert plan.calibrated
    assert 0 < plan.predicted_variance <= 0.01 * 1.001


def test_max_grad_error_out_of_reach_of_overrides() -> None:
    calibration = fxcompress.calibrate(Deep(), batch(), loss=lambda loss: loss)
    with pytest.raises(fxcompress.BudgetError, match="the overrides alone add"):
        trained(
            Deep(),
            max_grad_error=1e-3,
            calibration=calibration,
            overrides=[{"match": "*", "codec": "rotate(bits=1)"}],
        )


def batches(count: int) -> list[Tensor]:
    return [torch.randn(512, 64, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_scatter_is_the_variance_between_batches() -> None:
    """Of gradients that autograd computes without us."""
    model, given = Net(), batches(4)
    calibration = fxcompress.calibrate(model, *given, loss=lambda loss: loss)
    found = []
    for each in given:
        model.zero_grad()
        model(each).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([g.flatten().double() for g in gradients]))
    stacked = torch.stack(found)
    expected = stacked.var(0).sum() / stacked.square().sum(1).mean()
    assert calibration.scatter == pytest.approx(float(expected), rel=1e-4)
    restored = fxcompress.Calibration.from_json(calibration.to_json())
    assert restored.scatter == calibration.scatter


def test_max_loss_increase_is_a_share_of_the_scatter() -> None:
    given = batches(2)
    calibration = fxcompress.calibrate(Net(), *given, loss=lambda loss: loss)
    assert calibration.scatter is not None
    peaks = []
    for share in (0.0, 0.01, 0.2):
        plan, _ = trained(Net(), max_loss_increase=share, calibration=calibration)
        assert plan.predicted_variance <= share * calibration.scatter * 1.001
        same, _ = trained(
            Net(), max_grad_error=(share * calibration.scatter) ** 0.5, calibration=calibration
        )
        assert same.tensors == plan.tensors
        peaks.append(plan.planned_peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


def test_max_loss_increase_needs_two_batches() -> None:
    one = fxcompress.calibrate(Net(), batch(), loss=lambda loss: loss)
    assert one.scatter is None
    for calibration in (None, one):
        with pytest.raises(fxcompress.SettingsError, match="batch1, batch2"):
            fxcompress.backend(max_loss_increase=0.1, calibration=calibration)


def test_max_loss_increase_out_of_reach_of_overrides() -> None:
    calibration = fxcompress.calibrate(Net(), *batches(2), loss=lambda loss: loss)
    with pytest.raises(fxcompress.BudgetError, match="max_loss_increase=0 is out of reach"):
        trained(
            Net(),
            max_loss_increase=0.0,
            calibration=calibration,
            overrides=[{"match": "*", "codec": "rotate(bits=1)"}],
        )


def test_the_gap_is_in_the_plan() -> None:
    plan, _ = trained(Deep(), ratio=2)
    assert plan.gap is not None
    assert 0 <= plan.gap <= GAP
    fixed, _ = trained(Deep(), policy="uniform4")
    assert fixed.gap is None


def test_the_key_covers_bounds() -> None:
    bounds = [{}, {"ratio": 2}, {"ratio": 3}, {"max_grad_error": 0.1}, {"max_grad_error": 0.2}]
    keys = {Partitioner(make(**b)).uuid() for b in bounds}
    assert len(keys) == len(bounds)
    plain = {"another graph": 50}
    with_plain = Partitioner(make(ratio=2), Ledger({"another graph": 10}, plain=plain)).uuid()
    assert with_plain != Partitioner(make(ratio=2), Ledger({"another graph": 10})).uuid()
