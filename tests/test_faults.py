"""What goes wrong around a training: it goes on in the next best way, or stops with a remedy."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from train_small import Net, backend, batch, error, gradients, loss, no_leftovers

import fxcompress
from fxcompress import Calibration, Plan, files, report, rng
from fxcompress.codecs import affine, codec, states
from fxcompress.kernels import cpu, triton


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and nothing remembered in memory."""
    for family in cpu.FAMILIES:  # compiled once, into the folder of the whole session
        cpu.available(family)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    forget(monkeypatch)
    with no_leftovers():
        yield


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process would not have in memory."""
    torch._dynamo.reset()
    monkeypatch.setattr(report, "_plans", {})
    monkeypatch.setattr(report, "_executed", {})
    monkeypatch.setattr(states, "_states", {})
    monkeypatch.setattr(states, "_on_device", {})
    monkeypatch.setattr(files, "_complained", set())


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "fxcompress").iterdir())


def train(policy: str, rows: int = 512, **options: Any) -> dict[str, Tensor]:
    """Gradients of one step with the noise of step 0."""
    fxcompress.manual_seed(0)
    model = Net()
    return gradients(model, torch.compile(model, backend=backend(policy, **options)), batch(rows))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[k], expected[k]) for k in expected)


def child(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FXCOMPRESS_", "TORCH"))}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={
            **keep,
            "TORCHINDUCTOR_CACHE_DIR": str(folder),
            "PYTHONPATH": str(Path(__file__).parent),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


# --- the cache folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["uniform4", "transform2"])
def test_no_folder_to_write_to(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where our folder should be: all stays in memory, with one warning."""
    expected = train(policy)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "fxcompress").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    forget(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="fxcompress"):
        assert same(train(policy), expected)
    said = [r.getMessage() for r in caplog.records if r.name == "fxcompress"]
    assert len(said) == 1
    assert "set TORCHINDUCTOR_CACHE_DIR" in said[0]
    assert report.executed()
    assert fxcompress.explain().tensors


FULL = """
import resource, signal, sys
import test_faults
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # no file grows beyond that: as on a full disk
found = test_faults.train("transform2")
print("RESULT", sum(float(g.double().sum()) for g in found.values()))
"""


@pytest.mark.slow
def test_full_disk(tmp_path: Path) -> None:
    expected = sum(float(g.double().sum()) for g in train("transform2").values())
    folder = tmp_path / "full"
    # Without a compiler, which would have no disk either.
    done = child(FULL, folder, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"RESULT {expected}" in done.stdout
    assert "set TORCHINDUCTOR_CACHE_DIR" in done.stderr
    left = list((folder / "fxcompress").iterdir())
    assert all(len(f.read_bytes()) <= 64 for f in left)
    assert not [f for f in left if f.name.startswith(".")], "half-written files are left behind"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    files.write(path, "old")
    for unwritable in (object(), "\ud800"):  # fails before, and while it is encoded
        with pytest.raises((TypeError, UnicodeEncodeError)):
            files.write(path, unwritable)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal
from pathlib import Path
import test_faults
import fxcompress.codecs.transform

replace, folder = Path.replace, os.environ["TORCHINDUCTOR_CACHE_DIR"]

def run(name, fatal):
    # Status of a process that trains in the folder of this name, and dies at one of its writes.
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{name}"
    count = 0
    def dying(self, target):
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)  # all is written, but not under its name
        return replace(self, target)
    Path.replace = dying
    found = test_faults.train("transform2")
    print(f"RESULT {count} {sum(float(g.double().sum()) for g in found.values())}", flush=True)
    os._exit(0)

assert run("whole", 0) == 0
made = sum(1 for f in Path(folder, "whole", "fxcompress").iterdir())
for fatal in sorted({1, 2, made // 4, made // 2, made - 1, made}):
    assert run(fatal, fatal) == signal.SIGKILL
    assert run(fatal, 0) == 0  # another process finds what is left
"""


@pytest.mark.slow
def test_killed_at_a_write(tmp_path: Path) -> None:
    """The first ones, some in the middle, the last: states, calibration, plan, list."""
    expected = sum(float(g.double().sum()) for g in train("transform2").values())
    done = child(KILLED, tmp_path / "killed", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr[-3000:]
    results = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 7
    assert {float(result) for _, _, result in results} == {expected}
    assert int(results[0][1]) >= 5


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(b ^ 0x5A for b in content),
    "other json": lambda content: b'[{"format": 2, "tensors": 3}, null]',
    "nested": lambda content: b"[" * 200_000,
    "pickle": lambda content: pickle.dumps({"format": 2}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an earlier process left, this one plans, and writes it anew."""
    expected = train("transform2")
    before = {path: path.read_bytes() for path in kept(tmp_path)}
    assert {p.name.partition("-")[0] for p in before} >= {"state", "calibration", "graph"}
    for path, content in before.items():
        path.write_bytes(DAMAGES[damage](content))
    forget(monkeypatch)
    assert same(train("transform2"), expected)
    assert {path: path.read_bytes() for path in kept(tmp_path)} == before


def test_damaged_plan_of_a_graph_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inductor's cache gives the graph back, so that nothing plans: training goes on all the same,
    and whoever asks for the plan is told what to do."""
    with (
        torch._inductor.config.patch(fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=True),
    ):
        expected = train("uniform4", inner="inductor")
        for path in kept(tmp_path):
            path.write_bytes(DAMAGES["cut off"](path.read_bytes()))
        forget(monkeypatch)
        with caplog.at_level(logging.WARNING, logger="fxcompress"):
            assert same(train("uniform4", inner="inductor"), expected)
    assert "is damaged" in caplog.text
    with pytest.raises(fxcompress.FxCompressError, match=r"damaged .*clear the cache"):
        fxcompress.explain()


def test_an_edited_plan_is_not_taken_for_the_one_that_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("uniform4")
    (key,) = report.executed()
    path = tmp_path / "cache" / "fxcompress" / f"{key}.json"
    path.write_text(path.read_text().replace("bits=4", "bits=8"))
    forget(monkeypatch)
    with pytest.raises(fxcompress.FxCompressError, match="was changed"):
        report.read(key)


# --- compilers ----------------------------------------------------------------------------------

NO_COMPILER = """
import test_faults
test_faults.train("uniform4", inner="inductor")
"""


@pytest.mark.slow
def test_no_compiler_at_all(tmp_path: Path) -> None:
    """Inductor itself cannot go on, and its message names the cause. (Under aot_eager training does
    go on: see test_determinism.)"""
    done = child(NO_COMPILER, tmp_path / "none", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "No working C++ compiler found" in done.stderr


WRAPPER = """#!/bin/sh
for file; do
    case "$file" in *.cpp) grep -q fxc_affine_encode "$file" && exit 1;; esac
done
exec g++ "$@"
"""
ONLY_OURS = """
import test_faults
from fxcompress.kernels import cpu
found = test_faults.train("uniform4", inner="inductor")
assert not cpu.available()
print("RESULT", sum(float(g.double().sum()) for g in found.values()))
"""


@pytest.mark.slow
def test_only_our_kernels_fail_to_build(tmp_path: Path) -> None:
    """The graph is Inductor's, codecs run as PyTorch operations, with the same bits."""
    compiler = tmp_path / "c++"
    compiler.write_text(WRAPPER)
    compiler.chmod(0o755)
    expected = sum(float(g.double().sum()) for g in train("uniform4").values())
    done = child(ONLY_OURS, tmp_path / "ours", CXX=str(compiler))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CPU kernels are off" in done.stderr
    result = float(done.stdout.split("RESULT")[1])
    assert result == pytest.approx(expected, rel=1e-4)


@dataclass(frozen=True)
class Unbuildable(affine.Affine):
    """Affine with a GPU kernel that does not compile, tried on any device."""

    name = "unbuildable"

    def encode_kernel(self, x: Tensor, payload: Tensor, key: Tensor | None, stream: int) -> bool:
        payload.fill_(7)  # what a first kernel may have written before a second one failed
        triton.run([triton.Launch(None, 1, 1, (x,), {})])
        return True


def test_gpu_kernel_that_fails_to_build(caplog: pytest.LogCaptureFixture) -> None:
    x, key = torch.randn(1000), rng.next_key(torch.device("cpu"))
    expected = affine.Affine(4).encode(x, key, 1)
    with caplog.at_level(logging.WARNING, logger="fxcompress"):
        for _ in range(2):
            assert torch.equal(Unbuildable(4).encode(x, key, 1), expected)
    assert len(caplog.records) == 1
    assert "fxcompress doctor" in caplog.text


KILLED_IN_COMPILE = """
import test_faults
found = test_faults.train("auto", inner="inductor", ratio_saved=8)
print("RESULT", sum(float(g.double().sum()) for g in found.values()))
"""


@pytest.mark.slow
def test_killed_in_mid_compile(tmp_path: Path) -> None:
    """At several moments of one compile, on one cache folder that all of them leave behind."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FXCOMPRESS_", "TORCH"))}
    environment = {
        **keep,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    for seconds in (6, 9, 12, 15, 20):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_IN_COMPILE],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it started, too
            process.wait()
    results = [child(KILLED_IN_COMPILE, tmp_path / "cache") for _ in range(2)]
    for done in results:
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (float(done.stdout.split("RESULT")[1]) for done in results)
    assert first == second


# --- memory -------------------------------------------------------------------------------------

_calls = {"hungry": 0, "fails": 0}


@torch.library.custom_op("fxcompress_tests::hungry", mutates_args=())
def hungry(x: Tensor) -> Tensor:
    """The identity; out of memory for the first calls."""
    _calls["hungry"] += 1
    if _calls["hungry"] <= _calls["fails"]:
        raise torch.OutOfMemoryError("tried to allocate 1024 GiB")
    return x.clone()


hungry.register_fake(torch.empty_like)
hungry.register_autograd(lambda ctx, gradient: gradient)


class Hungry(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(hungry(x))


@pytest.mark.parametrize("policy", ["auto", "transform2"])
def test_out_of_memory_while_calibrating(
    policy: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that can do without measurements does; one that cannot says what to do."""
    model = Hungry()
    exact = gradients(model, model, batch(512))
    monkeypatch.setattr(sys.modules[__name__], "_calls", _calls)
    _calls.update(hungry=0, fails=1)
    bound = {"ratio_saved": 4} if policy == "auto" else {}
    compiled = torch.compile(model, backend=backend(policy, **bound))
    with caplog.at_level(logging.WARNING, logger="fxcompress"):
        if policy == "auto":
            assert 0 < error(gradients(model, compiled, batch(512)), exact) < 0.5
        else:
            with pytest.raises(fxcompress.FxCompressError, match=r"calibration=fxcompress\.cali"):
                compiled(batch(512))
    assert "no calibration on the first batch" in caplog.text
    assert "1024 GiB" in caplog.text


# --- numbers ------------------------------------------------------------------------------------

POLICIES = (
    *("uniform1", "uniform4", "dither3", "rotate2", "subsample(rate=0.25)", "transform2"),
    *("actnn-l2", "gact-l1", "division", "thesis-det", "thesis-affine", "thesis-stoch", "fp8"),
    *("average(beta=0.5)", "aq-1.5"),
)


class Cnn(nn.Module):
    """Inputs of convolutions, which all policies code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("policy", POLICIES)
def test_nan_and_inf_in_activations(policy: str) -> None:
    """A bad batch is as bad as it is without compression, and gone with the next batch."""
    model = Cnn()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend=backend(policy))
    exact = gradients(model, model, images)
    clean = error(gradients(model, compiled, images), exact)
    for value in (torch.nan, torch.inf):
        bad = images.clone()
        bad[3, 1, 4, 5] = value
        plain = gradients(model, model, bad)
        found = gradients(model, compiled, bad)
        for name, gradient in plain.items():
            lost = ~gradient.isfinite() & found[name].isfinite()
            assert not bool(lost.any()), (name, value)
    again = gradients(model, compiled, images)
    assert all(bool(g.isfinite().all()) for g in again.values())
    assert error(again, exact) < 3 * clean + 1e-6


def test_overflow_under_a_gradient_scaler() -> None:
    """Steps with Inf are found and left out exactly as without compression."""

    def run(compiled_by: Any) -> tuple[list[float], list[bool]]:
        torch._dynamo.reset()
        model = Net()
        call = model if compiled_by is None else torch.compile(model, backend=compiled_by)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
        scales, moved = [], []
        for step in range(10):
            before = model.head.weight.detach().clone()
            optimizer.zero_grad()
            out = call(batch(seed=step))
            scaler.scale(1000 * F.mse_loss(out, torch.zeros_like(out))).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append(not torch.equal(before, model.head.weight))
            assert bool(model.head.weight.isfinite().all())
        return scales, moved

    scales, moved = run(None)
    assert not moved[0]
    assert any(moved)
    assert run(backend("uniform4")) == (scales, moved)


# --- files from elsewhere -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> tuple[str, str]:
    """A real plan and a real calibration, as text."""
    with no_leftovers():
        model = Net()
        calibration = fxcompress.calibrate(model, batch(256), loss=loss, min_bytes=0)
        made = backend("transform2", calibration=calibration)
        gradients(model, torch.compile(model, backend=made), batch(256))
        return made.plan().to_json(), calibration.to_json()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def _places(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    pairs = (
        list(data.items())
        if isinstance(data, dict)
        else list(enumerate(data))
        if isinstance(data, list)
        else []
    )
    return [*((data, k) for k, _ in pairs), *(p for _, inner in pairs for p in _places(inner))]


@settings(max_examples=300)
@given(st.data())
def test_any_plan_file_is_read_or_refused(documents: tuple[str, str], data: st.DataObject) -> None:
    """One value replaced by any other: a plan of the right types, or an error of ours."""
    document = json.loads(documents[0])
    container, key = data.draw(st.sampled_from(_places(document)))
    container[key] = data.draw(JSON)
    try:
        found = Plan.from_json(json.dumps(document))
    except fxcompress.FxCompressError:
        return
    str(found)
    assert Plan.from_json(found.to_json()).to_json() == found.to_json()


@settings(max_examples=200)
@given(st.data())
def test_any_calibration_file_is_read_or_refused(
    documents: tuple[str, str], data: st.DataObject
) -> None:
    document = json.loads(documents[1])
    container, key = data.draw(st.sampled_from(_places(document)))
    container[key] = data.draw(JSON)
    try:
        found = Calibration.from_json(json.dumps(document))
    except fxcompress.FxCompressError:
        return
    assert found.key()


@pytest.mark.parametrize("kind", [Plan, Calibration])
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_none(kind: Any, damage: str, documents: Any, tmp_path: Path) -> None:
    text = documents[0] if kind is Plan else documents[1]
    (tmp_path / "file").write_bytes(DAMAGES[damage](text.encode()))
    with pytest.raises(fxcompress.FxCompressError, match=r"not a \w+ file"):
        kind.load(tmp_path / "file")


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FXCOMPRESS_TEST_MARK"],)


def test_no_file_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: tuple[str, str]
) -> None:
    monkeypatch.setenv("FXCOMPRESS_TEST_MARK", str(tmp_path / "mark"))
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb()))
    for load in (Plan.load, Calibration.load):
        with pytest.raises(fxcompress.FxCompressError):
            load(tmp_path / "bomb")
    with pytest.raises(fxcompress.CodecError):
        states.restore(pickle.dumps(Bomb()))
    assert not (tmp_path / "mark").exists()


def test_a_huge_plan_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    for load in (Plan.load, Calibration.load):
        with pytest.raises(fxcompress.FxCompressError, match="MB are more than"):
            load(path)


@pytest.mark.parametrize(
    "spec",
    [
        "affine(bits=99)",
        "affine(bits=4,group=0)",
        "transform(basis=../../../etc/passwd,rates=x)",
        "keep()",
        "__import__('os')",
        "",
    ],
)
def test_a_plan_cannot_ask_for_just_anything(spec: str, documents: tuple[str, str]) -> None:
    plan = Plan.from_json(documents[0])
    tensors = tuple(
        replace(t, representation=spec) if "(" in t.representation else t for t in plan.tensors
    )
    compiled = torch.compile(
        Net(), backend=backend("auto", plan=replace(plan, tensors=tensors, graphs=1))
    )
    with pytest.raises(fxcompress.FxCompressError):
        compiled(batch(256))


def test_state_names_are_no_paths() -> None:
    with pytest.raises(fxcompress.CodecError, match=r"no name of a"):
        codec("transform(basis=../../x,rates=../../x)").payload_bytes([64, 64], torch.float32)


def test_copies_of_plans_are_equal(documents: tuple[str, str]) -> None:
    plan = Plan.from_json(documents[0])
    assert copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan)) == plan
