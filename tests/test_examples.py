"""The examples run: two steps of each, small, without code generation; and training resumes."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ["--inner", "aot_eager", "--steps", "2", "--batch", "4", "--device", "cpu"]
CASES = {
    "cifar": ["--model", "resnet20", "--size", "16", "--policy", "uniform4"],
    "gpt": ["--block", "16", "--policy", "uniform8", "--amp", "bf16"],
    "bert_text_classification": ["--layers", "1", "--width", "64", "--length", "8"],
    "unet": ["--size", "16", "--width", "16", "--policy", "uniform4", "--accumulate", "2"],
    "lora": ["--block", "16", "--policy", "uniform8"],
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(name: str, arguments: list[str]) -> Any:
    module = importlib.import_module(name)
    assert module.main([*QUICK, *arguments]) == 0
    return module


@pytest.mark.parametrize("name", CASES)
def test_example(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "bert_text_classification":
        pytest.importorskip("transformers")
    log = tmp_path / "log.csv"
    run(name, [*CASES[name], "--csv", str(log)])
    rows = list(csv.DictReader(log.open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert "saved for the backward" in capsys.readouterr().out


def test_image_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / "one.jpg")
    small = ["--model", "squeezenet1_1", "--size", "32", "--workers", "0", "--policy", "uniform8"]
    run("imagenet", ["--data", str(tmp_path), *small])
    assert "accuracy on val" in capsys.readouterr().out


def test_every_example_is_tried() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*CASES, "imagenet", "training", "resnet"}


def test_models_for_small_images() -> None:
    cifar = importlib.import_module("cifar")
    x = torch.randn(2, 3, 32, 32)
    for name in ("resnet164", "resnet18", "densenet121", "efficientnet_v2_s"):
        assert cifar.make(name, 7).eval()(x).shape == (2, 7)
    with torch.device("meta"):
        wide = cifar.make("wrn28-10", 7)
    assert 36e6 < sum(p.numel() for p in wide.parameters()) < 37e6


def test_a_run_resumes_where_it_was(tmp_path: Path) -> None:
    """Two steps and two more: dropout, noise, data and optimizer go on as without the break."""

    def losses(steps: int, name: str) -> list[float]:
        torch._dynamo.reset()
        log = tmp_path / f"{name}.csv"
        given = ["--csv", str(log), "--checkpoint", str(tmp_path / f"{name}.pt")]
        given += ["--block", "16", "--policy", "uniform4", "--steps", str(steps)]
        run("gpt", given)
        return [float(row["loss"]) for row in csv.DictReader(log.open())]

    whole = losses(4, "whole")
    losses(2, "broken")
    assert losses(4, "broken") == pytest.approx(whole, abs=2e-5)


def test_data_sets_that_are_stored_as_torchvision_does(tmp_path: Path) -> None:
    """A folder with CIFAR in it is found."""
    import pickle

    cifar = importlib.import_module("cifar")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sys.modules.pop("cifar")
    batch = {"data": np.zeros((10, 3072), dtype=np.uint8), "labels": list(range(10))}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    dataset = cifar.STORED["cifar-10-batches-py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_check_integrity", lambda self: True)
        patch.setattr(
            "torchvision.datasets.cifar.check_integrity", lambda *args: True, raising=False
        )
        train, held_out = cifar.load(tmp_path, 32, 100)
    assert train.pixels.shape == (50, 3, 32, 32)
    assert held_out.labels.tolist() == list(range(10))
