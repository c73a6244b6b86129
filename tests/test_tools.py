"""Memory by hand-computable cases, models by name, and the command line."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress.tools import cli, data, memory, models

FACTORY = """
import torch
from torch import nn

def factory(batch, size):
    wide = 4 * size
    model = nn.Sequential(nn.Linear(size, wide), nn.ReLU(), nn.Linear(wide, wide), nn.GELU(),
                          nn.Linear(wide, 1))
    return model, (torch.randn(batch, size),), lambda output: output.square().mean()

def wrong(batch, size):
    return nn.Linear(size, size)
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "made.py"
    path.write_text(FACTORY)
    return f"{path}:factory"


# --- memory -------------------------------------------------------------------------------------


def test_replay_leaves_gradients_out():
    # Pointer 1 is reused: first for 100 transient bytes, then for a gradient of 60 (and 4 over).
    events = [(1, 100), (2, 50), (1, -100), (3, 30), (1, 64), (2, -50), (9, -7)]
    alive = memory.replay(events, {1: 60})
    assert alive == [100, 150, 50, 80, 84, 34, 34]


def test_peak_of_a_sum():
    w = torch.randn(1000, requires_grad=True)
    # w*w and exp(w*w) are alive together, 4000 bytes each; w*w is dead when the sum is made.
    found = memory.measure_step(lambda: (w * w).exp().sum(), [w])
    assert found.peak_bytes == 8000
    assert found.gradient_bytes == 0


def test_the_curve_of_a_step_in_two_parts():
    w = torch.randn(1000, requires_grad=True)

    def step():
        with memory.mark(0):
            loss = (w * w).exp().sum()
        with memory.mark(1):
            loss.backward()

    step()
    found = memory.measure_step(step, [w])
    curves = [found.sampled(part, 50) for part in range(2)]
    assert max(map(max, curves)) == found.peak_bytes
    assert curves[0][0] < 8000 == max(curves[0])
    assert curves[0][-1] >= 4000  # exp's output is saved
    assert curves[1][-1] < curves[1][0]  # and freed when its reader is done
    assert found.spans[0][1] <= found.spans[1][0]


def test_peak_of_linear_relu_linear():
    batch, inner = 512, 256
    model = nn.Sequential(nn.Linear(8, inner), nn.ReLU(inplace=True), nn.Linear(inner, 4))
    x = torch.randn(batch, 8)

    def step():
        model(x).sum().backward()

    step()
    found = memory.measure_step(step, model.parameters())
    assert found.gradient_bytes == sum(p.nbytes for p in model.parameters())
    assert found.left_bytes == 0
    # relu's output, its gradient, and the gradient of relu's input; beside them the output (freed
    # or not) and its expanded gradient, each batch x 4, and a few scalars.
    hidden = batch * inner * 4
    assert 3 * hidden <= found.peak_bytes <= 3 * hidden + 2 * batch * 4 * 4 + 64


def test_saved_bytes_eager():
    x, w = torch.randn(10, 20), torch.randn(20, 30, requires_grad=True)
    hidden = (x @ w).exp()
    loss = (hidden * hidden.view(10, 30)).sum()
    # exp's output (10 x 30 floats), saved three times, one of them a view; x is excluded.
    assert memory.saved_bytes(loss, [x, w]) == 10 * 30 * 4
    assert memory.saved_bytes(loss) == 10 * 30 * 4 + 10 * 20 * 4


def test_saved_bytes_compiled():
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 8))
    x = torch.randn(32, 64)
    output = torch.compile(model, backend="aot_eager")(x)
    held = [x, *model.parameters()]
    assert memory.saved_bytes(output, held) == 32 * 64 * 4


def test_copies_of_weights_stand_apart():
    class Copies(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(w.clone(memory_format=torch.channels_last), x.sin())
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g, None

    x, w = torch.randn(50, requires_grad=True), torch.randn(2, 3, 4, 5)
    saved = memory.measure_saved(Copies.apply(x, w), [x, w])
    assert saved == memory.SavedMemory(activation_bytes=50 * 4, copy_bytes=w.nbytes)


def test_peak_of_a_compiled_step_has_no_gradients():
    model = nn.Linear(2000, 1000)  # 8 MB of weight, so that its gradient would show
    x = torch.randn(4, 2000)
    compiled = torch.compile(model, backend="inductor")

    def step():
        compiled(x).sum().backward()

    step()
    found = memory.measure_step(step, model.parameters())
    assert found.gradient_bytes == (2000 + 1) * 1000 * 4
    assert found.peak_bytes < 100_000


# --- data and models ----------------------------------------------------------------------------


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    from PIL import Image

    for label, grey in (("cat", 0), ("dog", 255)):
        folder = tmp_path / "images" / "train" / label
        folder.mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (20, 16), (grey, grey, grey)).save(folder / f"{index}.jpg")
    return tmp_path / "images"


def test_jpeg_folder_and_archive(jpegs: Path, tmp_path: Path):
    archive = tmp_path / "images.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(jpegs / "train", "train")
    for path in (jpegs, archive):
        images = data.load(path, size=8, count=4)
        assert images.pixels.shape == (4, 3, 8, 8)
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert images.pixels[0].max() < 5
        assert images.pixels[3].min() > 250


def test_data_errors(tmp_path: Path):
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"no archive")
    for path in (tmp_path / "missing", broken, tmp_path):
        with pytest.raises(data.DataError, match="folder"):
            data.load(path, 8)


def test_digits():
    images = data.load(None, 16)
    assert images.pixels.shape == (1797, 3, 16, 16)
    pixels, labels = images.batch(5, torch.Generator().manual_seed(0))
    assert pixels.dtype == torch.float32
    assert labels.shape == (5,)


def test_gpt_trains():
    torch.manual_seed(0)
    task = models.load("gpt:small", 2, 16)
    before = task.forward().item()
    assert before == pytest.approx(4.17, abs=0.3)  # log(65)
    models.warm(task, 30, lr=0.1)
    assert task.forward().item() < before


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("nothing", "FILE.py:FUNCTION"),
        ("other:thing", "FILE.py:FUNCTION"),
        ("torchvision:nothing", "list_models"),
        ("gpt:large", "gpt:small"),
        ("missing.py:f", "is not a file"),
        ("MADE:absent", "no function 'absent'"),
        ("MADE:wrong", "must return"),
    ],
)
def test_model_errors(spec: str, remedy: str, factory: str):
    made = factory.partition(":")[0]
    with pytest.raises(models.ModelError, match=remedy):
        models.load(spec.replace("MADE", made), 2, 8)


def test_batch_must_be_positive(factory: str):
    with pytest.raises(models.ModelError, match="--batch 0"):
        models.load(factory, 0, 8)


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "step", "nothing"], "is not understood"),
        (["bench", "step", "gpt:small", "--policies", "uniform9"], "uniform9"),
        (["bench", "step", "gpt:small", "--steps", "0"], "--steps"),
        (["demo", "--policy", "nothing"], "unknown policy"),
        (["bench", "step", "gpt:tiny", "--policies", "inductor@2"], "a share from 0 to 1"),
        (["bench", "step", "gpt:tiny", "--policies", "auto@much"], "auto@12 or auto@100MB"),
        (["demo", "--budget-mb", "-1"], "budget_mb=-1"),
        (["demo", "--data", "/missing"], "cannot read /missing|no train"),
    ],
)
def test_errors_name_the_cause(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert re.search(message, captured.err)


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("fxcompress ")


def test_bench_step_json(factory: str, tmp_path: Path, capsys, monkeypatch):
    arguments = ["bench", "step", factory, "--batch", "256", "--size", "32", "--steps", "2"]
    arguments += ["--policies", "uniform4,inductor@0", "--json"]
    arguments += ["--output", str(tmp_path / "kept.json")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda *args, **options: 1 / 0)
    assert cli.main(arguments) == 0  # all is kept: nothing is compiled
    assert capsys.readouterr().out == printed
    result = json.loads(printed.splitlines()[-1])
    assert list(result["policies"]) == ["inductor", "uniform4", "inductor@0"]
    plain, ours, again = result["policies"].values()
    keys = {"saved_mb", "peak_mb", "planned_peak_mb", "step_s", "step_ratio", "cold_s", "warm_s"}
    assert keys | {"grad_error"} <= plain.keys() == ours.keys()
    assert plain["planned_peak_mb"] is None
    assert plain["step_ratio"] == 1
    assert again["saved_mb"] < plain["saved_mb"]
    assert again["grad_error"] < 1e-6
    assert plain["grad_error"] < 1e-6
    assert 0 < ours["grad_error"] < 0.5
    assert ours["saved_mb"] < plain["saved_mb"] / 3
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.slow  # four compiles of a GPT
def test_bench_batch_json(tmp_path: Path, capsys):
    """Batches that were run stay within the budget; the next larger one tried does not."""
    arguments = ["bench", "batch", "gpt:tiny", "--size", "32", "--budget-mb", "6", "--json"]
    arguments += ["--policies", "uniform2", "--tries", "2", "--output", str(tmp_path / "kept.json")]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, ours = result["policies"]["inductor"], result["policies"]["uniform2"]
    assert 0 < plain["batch"] < ours["batch"]
    for row in (plain, ours):
        assert row["peak_mb"] <= 6
        assert row["too_large"] is None or row["too_large"] > row["batch"]
