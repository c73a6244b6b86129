"""Dumps of a plan in every format, against their schema, and the difference of two plans."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

from fxcompress.plan import Alternative, Moment, Plan, TensorPlan
from fxcompress.tools import cli, dump

SCHEMA = json.loads(files("fxcompress.tools").joinpath("dump.schema.json").read_text())


def tensor(name: str, **given: object) -> TensorPlan:
    plain = TensorPlan(
        name=name,
        module="layers.0",
        source="model.py:3",
        op="mm",
        shape=(64, 16),
        dtype="torch.float32",
        storage_bytes=4096,
        smooth_readers=("mul", "mul"),
        exact_readers=(),
        recompute=(),
        representation="affine(bits=4)",
        bytes_after=512,
        reason="",
        predicted_variance=0.02,
        alternatives=(Alternative("keep", 4096, 0.0), Alternative("affine(bits=4)", 512, 0.02)),
    )
    return replace(plain, **given)


PLAN = Plan(
    policy="auto",
    budget_mb=10.0,
    tensors=(
        tensor("a"),
        tensor("b", predicted_variance=0.06, bytes_after=256, representation="affine(bits=2)"),
        tensor("c", shape=("s0", 4), exact_readers=("le",), predicted_variance=None),
        tensor("d", representation="keep", bytes_after=9000, storage_bytes=9000, reason="a | b"),
    ),
    plain_peak_bytes=20000,
    planned_peak_bytes=9000,
    calibrated=True,
    timeline=(Moment("a", "forward", 100, 50), Moment("b", "backward", 80, 40)),
)


MODEL = """
import torch
from torch import nn

def make(batch, size):
    model = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1))
    return model, (torch.randn(batch, size),), lambda output: output.square().mean()
"""


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["dump", *arguments]) == 0
    return capsys.readouterr().out


def test_json_fits_its_schema(saved, capsys):
    found = json.loads(run(capsys, saved, "--format", "json"))
    jsonschema.validate(found, SCHEMA)
    assert [t["tensor"] for t in found["tensors"]] == ["a", "b", "c", "d"]
    assert found["totals"]["saved_bytes"] == PLAN.saved_bytes
    a, b, c, _ = found["tensors"]
    assert a["bits"] == 4
    assert b["variance_share"] == pytest.approx(0.6)  # of 0.02 + 0.06 + 0.02
    assert c["bits"] is None
    assert c["readers"] == ["mul ×2", "le (exact)"]


def test_measured_errors_of_a_model(tmp_path: Path, capsys):
    (tmp_path / "made.py").write_text(MODEL)
    spec = [f"{tmp_path / 'made.py'}:make", "--batch", "256", "--size", "64"]
    arguments = [*spec, "--policy", "uniform4", "--values", "--format", "json"]
    found = json.loads(run(capsys, *arguments))
    jsonschema.validate(found, SCHEMA)
    errors = {t["representation"]: t["measured_error"] for t in found["tensors"]}
    # Groups of 256 normal values span about 5.6 standard deviations, so a step is 5.6 / 15; the
    # variance of stochastic rounding is a sixth of its square.
    assert errors["affine(bits=4)"] == pytest.approx(5.6 / 15 / 6**0.5, rel=0.1)
    assert errors["recompute"] is None


def test_values_need_a_model(saved, capsys):
    assert cli.main(["dump", saved, "--values"]) == 2
    assert "--values needs a MODEL" in capsys.readouterr().err


def test_schema_refuses_what_it_does_not_know(saved, capsys):
    found = json.loads(run(capsys, saved, "--format", "json"))
    found["tensors"][0]["bites"] = 4
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA)


def test_csv_and_markdown_have_a_line_a_tensor(saved, capsys):
    rows = list(csv.DictReader(io.StringIO(run(capsys, saved, "--format", "csv"))))
    assert [row["tensor"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[0]["shape"] == "64, 16"
    assert float(rows[1]["variance_share"]) == pytest.approx(0.6)
    lines = run(capsys, saved, "--format", "md").splitlines()
    assert len(lines) == 2 + 4
    assert "a \\| b" in lines[-1]


def test_table_is_whole_in_a_pipe(saved, capsys):
    out = run(capsys, saved, "--sort", "bytes")
    assert "\x1b" not in out
    order = [line.split()[0] for line in out.splitlines() if "model.py:3" in line]
    assert order == ["d", "a", "b", "c"]
    assert not any(line != line.rstrip() for line in out.splitlines())


def test_plans_survive_saving(saved):
    assert Plan.load(saved) == PLAN


def test_difference(saved, tmp_path, capsys):
    a, b, _, d = PLAN.tensors
    other = tmp_path / "other.json"
    replace(
        PLAN,
        tensors=(a, replace(b, representation="keep", bytes_after=4096), d, tensor("new")),
        measured_peak_bytes=8000,
    ).save(other)
    found = json.loads(run(capsys, "--diff", saved, str(other), "--format", "json"))
    jsonschema.validate(found, SCHEMA)
    changed = {row["tensor"]: row for row in found["tensors"]}
    assert set(changed) == {"b", "c", "new"}
    assert (changed["b"]["bytes_before"], changed["b"]["bytes_after"]) == (256, 4096)
    assert changed["c"]["representation_after"] is None
    assert changed["new"]["representation_before"] is None
    assert found["totals"]["after"]["measured_peak_bytes"] == 8000


def test_a_plan_does_not_differ_from_itself():
    twice = replace(PLAN, tensors=(*PLAN.tensors, *PLAN.tensors))  # a name in two graphs
    assert dump.differences(twice, twice) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "fxcompress plan MODEL -o"),
        ("{", "not a plan file"),
        ("[]", "not a plan file"),
        ('{"format": 1}', "another version"),
        ('{"format": 2, "policy": "auto"}', "not a plan file"),
    ],
)
def test_bad_files(text, message, tmp_path, capsys):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["dump", str(path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_one_source_or_two_to_compare(saved, capsys):
    assert cli.main(["dump"]) == 2
    assert cli.main(["dump", saved, "--diff", saved, saved]) == 2
    assert "--diff A.json B.json" in capsys.readouterr().err
