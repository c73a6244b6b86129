"""The command as users meet it: help, exit codes, errors, pipes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fxcompress import torch_private
from fxcompress.errors import FxCompressError
from fxcompress.kernels import cpu
from fxcompress.plan import Plan
from fxcompress.tools import cli, doctor, model_names

FACTORY = """
import torch
from torch import nn

def factory(batch, size):
    layers = [nn.Sequential(nn.Linear(size, size), nn.GELU()) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(size, 1))
    return model, (torch.randn(batch, size),), lambda output: output.square().mean()
"""
COMMANDS = [
    *("demo", "plan", "dump", "viz", "doctor", "study", "pareto", "max-batch"),
    *("bench step", "bench noise", "bench kernels", "bench accuracy", "bench codecs"),
]


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "made.py"
    path.write_text(FACTORY)
    return f"{path}:factory"


def test_plan_of_a_model(factory: str, tmp_path: Path, capsys):
    out = tmp_path / "plan.json"
    # Small ones are rebuilt: to call a codec takes longer. So few bytes leave none as it is.
    arguments = ["plan", factory, "--batch", "8192", "--size", "64", "--ratio-saved", "8"]
    assert cli.main([*arguments, "-o", str(out)]) == 0
    assert "policy auto" in capsys.readouterr().out
    plan = Plan.load(out)
    assert plan.calibrated
    assert plan.saved_bytes <= plan.saved_bytes_before / 8
    assert 0 < plan.predicted_variance < 1
    assert {t.module for t in plan.tensors} >= {"0.0", "1.0", "2.0"}


def test_bounds_of_a_plan(factory: str, tmp_path: Path):
    out = tmp_path / "plan.json"
    plan = ["plan", factory, "--batch", "256", "--size", "64", "-o", str(out)]
    assert cli.main([*plan, "--max-grad-error", "0.1"]) == 0
    assert 0 < Plan.load(out).predicted_variance <= 0.01
    assert cli.main([*plan, "--ratio", "1.5"]) == 0
    assert Plan.load(out).planned_peak_bytes <= Plan.load(out).plain_peak_bytes / 1.5
    assert cli.main([*plan, "--ratio", "1.5", "--budget-mb", "4"]) == 2


def test_plan_with_what_was_measured(factory: str, tmp_path: Path):
    out = tmp_path / "plan.json"
    arguments = ["plan", factory, "--batch", "256", "--size", "64", "--policy", "uniform4"]
    assert cli.main([*arguments, "--measure", "-o", str(out)]) == 0
    plan = Plan.load(out)
    assert plan.measured_saved_bytes == pytest.approx(plan.saved_bytes, rel=0.05)
    assert plan.measured_peak_bytes == pytest.approx(plan.planned_peak_bytes, rel=0.3)


def test_a_budget_out_of_reach_names_the_smallest(factory: str, capsys):
    arguments = ["plan", factory, "--batch", "256", "--size", "64", "--budget-mb", "0.001"]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert "smallest" in captured.err
    assert captured.out == ""


def test_output_into_a_missing_folder(factory: str, tmp_path: Path, capsys):
    out = str(tmp_path / "missing" / "plan.json")
    arguments = ["plan", factory, "--batch", "256", "--size", "64", "--policy", "lossless"]
    assert cli.main([*arguments, "-o", out]) == 2
    assert f"cannot write {out}" in capsys.readouterr().err


def test_debug_shows_the_traceback():
    assert cli.main(["plan", "nothing"]) == 2
    with pytest.raises(FxCompressError):
        cli.main(["plan", "nothing", "--debug"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("torchvision:resnet81", "torchvision:resnet18"),
        ("torchvison:resnet18", "torchvision:resnet18"),
        ("gpt:smal", "gpt:small"),
        ("MADE:factori", "made.py:factory"),
    ],
)
def test_a_bad_name_lists_near_ones(name: str, hint: str, factory: str, capsys):
    pytest.importorskip("torchvision")
    made = factory.rpartition(":")[0]
    assert cli.main(["plan", name.replace("MADE", made)]) == 2
    assert hint in capsys.readouterr().err


def test_near_names_of_transformers():
    pytest.importorskip("transformers")
    assert "hf:gpt2" in model_names.suggestion("hf:gtp2")


def test_nothing_is_near_to_nonsense():
    assert model_names.suggestion("qqqqqqqqqq") == ""


def test_an_error_in_the_users_file(tmp_path: Path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("def make(batch, size):\n    return 1 / 0\n")
    assert cli.main(["plan", f"{path}:make"]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("fxcompress: ZeroDivisionError: division by zero")
    assert "Traceback" not in captured.err
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", f"{path}:make", "--debug"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module",
    [cli.plan_command, cli.dump, cli.viz_command, cli.doctor, cli.study, cli.pareto_command],
)
def test_examples_in_the_help_parse(module):
    lines = [line.strip() for line in module.EXAMPLES.splitlines() if "fxcompress" in line]
    assert lines
    for line in lines:
        words = re.split("[|>#]", line)[0].split()
        cli._parser().parse_args(words[1:])


def test_a_closed_pipe_is_no_error(tmp_path: Path):
    path = tmp_path / "plan.json"
    plan = Plan("auto", None, (), 0, 0)
    path.write_text(plan.to_json())
    script = f"{sys.executable} -m fxcompress.tools.cli dump {path} --format json | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True)
    assert done.returncode == 0
    assert done.stderr == b""


def test_json_output_is_only_json(tmp_path: Path, capsys):
    path = tmp_path / "plan.json"
    Plan("auto", None, (), 0, 0, note="nothing to gain").save(path)
    assert cli.main(["dump", str(path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == []


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("fxcompress du", {"dump"}),
        ("fxcompress dump plan.json --fo", {"--format"}),
        ("fxcompress bench st", {"step"}),
        ("fxcompress bench step gpt:small --pol", {"--policies"}),
        ("fxcompress viz plan.json --bat", {"--batch"}),
    ],
)
def test_completion_in_bash(typed: str, expected: set[str], tmp_path: Path, capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    assert cli.main(["completion", "bash"]) == 0
    words = typed.split()
    quoted = " ".join(f"'{word}'" for word in words)
    asked = (
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _fxcompress; echo ${{COMPREPLY[@]}}"
    )
    script = tmp_path / "complete.sh"
    script.write_text(capsys.readouterr().out + asked)
    done = subprocess.run([bash, str(script)], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_is_content_here(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = {f["subject"]: f for f in json.loads(capsys.readouterr().out)}
    assert found["C++ compiler"]["state"] == "ok"
    assert found["affine on cpu"]["found"] == "a C++ kernel"
    assert "forward unchanged" in found["self-test on cpu"]["found"]
    assert all(f["remedy"] == "" for f in found.values() if f["state"] == "ok")


def test_doctor_names_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FXCOMPRESS_BUDGET_MB", "plenty")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(blocked / "cache"))
    assert cli.main(["doctor", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "FXCOMPRESS_BUDGET_MB='plenty'" in out
    assert "set TORCHINDUCTOR_CACHE_DIR" in out


def test_doctor_sees_a_kernel_that_disagrees(monkeypatch):
    true = cpu.affine_encode

    def wrong(x, payload, *rest):
        true(x, payload, *rest)
        payload[0] ^= 1

    monkeypatch.setattr(cpu, "affine_encode", wrong)
    states = {f.subject: f.state for f in doctor.lowerings("cpu")}
    assert states["affine on cpu"] == "problem"
    assert states["bits on cpu"] == "ok"


@pytest.mark.parametrize(("version", "state"), [("2.10.0", "problem"), ("2.14.1+cpu", "ok")])
def test_doctor_knows_the_versions(version: str, state: str):
    assert doctor.pytorch(version).state == state


def test_doctor_asks_for_the_versions_that_are_declared():
    declared = next(r for r in metadata.requires("fxcompress") if r.startswith("torch<"))
    for major, minor in torch_private.SUPPORTED:
        assert f"{major}.{minor}" in declared
