"""The planner: saved plans are followed again, budgets of every kind are met, or refused."""

from __future__ import annotations

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
from fxcompress.pipeline import Partitioner
from fxcompress.settings import make


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
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.broken and i == 0:
                torch._dynamo.graph_break()
        return x.square().sum()


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


def edited(plan: Plan, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The plan as JSON with each of its rows edited."""
    data = json.loads(plan.to_json())
    for row in data["tensors"]:
        edit(row)
    path.write_text(json.dumps(data))
    return path


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
        ({"representation": "recompute"}, "nothing rebuilds this tensor"),
    ],
    ids=str,
)
def test_plans_that_do_not_fit(changes: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    plan, _ = trained(policy="lossless")
    with pytest.raises(fxcompress.SettingsError) as caught:
        trained(plan=edited(plan, tmp_path / "plan.json", _set(**changes)))
    assert remedy in str(caught.value)


def test_masks_cannot_be_coded(tmp_path: Path) -> None:
    def edit(row: dict[str, Any]) -> None:
        if row["dtype"] == "torch.bool":
            row["representation"] = "rotate(bits=2)"

    plan, _ = trained(policy="lossless")
    with pytest.raises(fxcompress.SettingsError, match=r"cannot be rotate\(bits=2\)"):
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
