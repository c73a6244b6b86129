"""On-disk caches of compiled graphs: used, and never with a graph of another plan. Plan files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fxcompress
from fxcompress import Plan, TensorPlan
from fxcompress.ledger import Ledger
from fxcompress.pipeline import Partitioner
from fxcompress.settings import make

# A process of its own trains one step a job and prints what the caches did.
SCRIPT = """
import contextlib, json, sys
import torch
import fxcompress
from fxcompress.pipeline import Partitioner
from torch._dynamo.utils import counters

calls, partition = [], Partitioner.__call__

def counted(self, *args, **kwargs):
    calls.append(self.settings.policy)
    return partition(self, *args, **kwargs)

Partitioner.__call__ = counted
for job in json.loads(sys.argv[1]):
    way, settings = job["way"], {"min_bytes": 0, **job["settings"]}
    torch._dynamo.reset()
    torch.manual_seed(0)
    fxcompress.manual_seed(0)
    counters.clear()
    calls.clear()
    fxcompress.report._executed.clear()  # what explain() without a model speaks of
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    x, context = torch.randn(32, 16), contextlib.nullcontext()
    if way == "backend":
        compiled = torch.compile(model, backend=fxcompress.backend(**settings))
    elif way == "options":
        compiled = torch.compile(model, backend="fxcompress", options=settings)
    else:
        compiled = torch.compile(model, backend="inductor")
        context = fxcompress.enabled(**settings)
    with context:
        compiled(x).square().sum().backward()
    try:
        plan = fxcompress.explain(compiled if way == "backend" else None).to_json()
    except fxcompress.FxCompressError as error:
        plan = str(error)
    aot = counters["aot_autograd"]
    print("RESULT " + json.dumps({
        "hits": aot["autograd_cache_hit"], "misses": aot["autograd_cache_miss"],
        "calls": list(calls), "plan": plan,
        "gradients": [p.grad.double().sum().item() for p in model.parameters()],
    }), flush=True)
"""


def train(folder: Path, *jobs: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One process with ``folder`` as its cache; a result a job."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FXCOMPRESS_", "TORCH"))}
    arguments = json.dumps([{"way": way, "settings": settings} for way, settings in jobs])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        env={**keep, "TORCHINDUCTOR_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(jobs)
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def specs(result: dict[str, Any]) -> set[str]:
    return {t.representation for t in Plan.from_json(result["plan"]).tensors}


GENEROUS: tuple[str, dict[str, Any]] = ("backend", {"budget_mb": 1000.0})
FOUR: tuple[str, dict[str, Any]] = ("backend", {"policy": "uniform4"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(scope="module")
def first(folder: Path) -> list[dict[str, Any]]:
    """A process that finds the cache empty: 4 bits, then a budget that changes nothing."""
    return train(folder, FOUR, GENEROUS)


@pytest.fixture(scope="module")
def second(folder: Path, first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A process that asks for the same, then for other things."""
    return train(
        folder,
        FOUR,
        GENEROUS,
        ("backend", {"policy": "uniform8"}),
        ("backend", {"policy": "uniform4", "group": 64}),
        ("backend", {"policy": "uniform4", "seed": 5}),
    )


def test_first_process_compiles(first: list[dict[str, Any]]) -> None:
    for result in first:
        assert result["hits"] == 0
        assert result["misses"] >= 1
        assert len(result["calls"]) == 1
    assert "affine(bits=4)" in specs(first[0])
    assert specs(first[1]) == {"keep"}


def test_second_process_hits_with_the_right_plan(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    result = second[0]
    assert result["hits"] >= 1
    assert result["misses"] == 0
    assert result["calls"] == []
    assert Plan.from_json(result["plan"]) == Plan.from_json(first[0]["plan"])
    assert result["gradients"] == first[0]["gradients"]


def test_unchanged_graphs_are_explained_after_a_hit(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    assert second[1]["hits"] >= 1
    assert second[1]["calls"] == []
    assert second[1]["plan"] == first[1]["plan"]


@pytest.mark.parametrize(("place", "spec"), [(2, "affine(bits=8)"), (3, "affine(bits=4,group=64)")])
def test_other_settings_miss(second: list[dict[str, Any]], place: int, spec: str) -> None:
    result = second[place]
    assert result["hits"] == 0
    assert len(result["calls"]) == 1
    assert spec in specs(result)
    assert result["gradients"] != second[0]["gradients"]


def test_another_seed_has_the_same_plan(second: list[dict[str, Any]]) -> None:
    assert second[4]["plan"] == second[0]["plan"]
    assert second[4]["gradients"] != second[0]["gradients"]


def test_other_ways_in(folder: Path, first: list[dict[str, Any]]) -> None:
    """``enabled`` and ``options=``: a graph comes back, and never under another policy."""
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("enabled", {"policy": "uniform2"}),
        ("enabled", {"policy": "uniform3"}),
        ("options", {"policy": "uniform6"}),
        ("options", {"policy": "uniform7"}),
    ]
    made, again = train(folder, *jobs), train(folder, *jobs)
    for (_, settings), once, twice in zip(jobs, made, again, strict=True):
        bits = settings["policy"].removeprefix("uniform")
        assert f"affine(bits={bits})" in specs(once)
        assert (once["hits"], once["calls"]) == (0, [settings["policy"]])
        assert twice["hits"] >= 1
        assert twice["calls"] == []
        assert twice["plan"] == once["plan"]
        assert twice["gradients"] == once["gradients"]


# --- the key ------------------------------------------------------------------------------------


def test_the_key_covers_what_changes_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"policy": "auto", "budget_mb": 10.0}
    variants: list[dict[str, Any]] = [
        base,
        {**base, "budget_mb": 11.0},
        {"policy": "uniform4", "budget_mb": 10.0},
        {"ratio_saved": 2.0},
        {**base, "group": 64},
        {**base, "min_bytes": 1},
        {**base, "inner": "aot_eager"},
    ]
    keys = [Partitioner(make(**v)).uuid() for v in variants]
    assert len(set(keys)) == len(keys)
    assert Partitioner(make(**base, seed=3)).uuid() == keys[0]
    assert Partitioner(make(**base), Ledger({"another graph": 100})).uuid() not in keys
    monkeypatch.setattr("fxcompress.pipeline.__version__", "9.9")
    assert Partitioner(make(**base)).uuid() not in keys


# --- plan files ---------------------------------------------------------------------------------

ROW = TensorPlan(
    name="addmm",
    module="layers.0",
    source="model.py:12",
    op="addmm",
    shape=(4, "s0"),
    dtype="torch.float32",
    storage_bytes=4096,
    smooth_readers=("mul", "erf"),
    exact_readers=(),
    recompute=(),
    representation="affine(bits=4)",
    bytes_after=600,
    reason="",
)
PLAN = Plan("auto", 12.5, (ROW, replace(ROW, name="mul", reason="π ≤ 4")), 9000, 5000, "a note", 2)


def test_plan_round_trips(tmp_path: Path) -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert hash(PLAN) == hash(Plan.load(str(tmp_path / "plan.json")))
    assert Plan.from_json(replace(PLAN, budget_mb=None).to_json()).budget_mb is None


def test_plan_sums_and_prints() -> None:
    assert (PLAN.saved_bytes_before, PLAN.saved_bytes) == (8192, 1200)
    text = str(PLAN)
    assert "layers.0" in text
    assert "affine(bits=4)" in text
    assert "a note" in text


def test_plan_key_is_its_content() -> None:
    assert Plan.from_json(PLAN.to_json()).key() == PLAN.key()
    assert replace(PLAN, note="another").key() != PLAN.key()
    assert replace(PLAN, tensors=PLAN.tensors[:1]).key() != PLAN.key()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 99, "tensors": []}',
        PLAN.to_json().replace('"note"', '"remark"'),
        PLAN.to_json().replace('"dtype"', '"type"'),
        PLAN.to_json()[:-20],
    ],
    ids=str,
)
def test_bad_plan_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(fxcompress.FxCompressError, match=r"plan file"):
        Plan.load(tmp_path / "plan.json")


def test_binary_is_not_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(fxcompress.FxCompressError, match="not a plan file"):
        Plan.load(tmp_path / "plan.json")


def test_missing_plan_of_a_cached_graph_names_the_remedy() -> None:
    with pytest.raises(fxcompress.FxCompressError, match="clear the cache"):
        fxcompress.report.read("0" * 24)
