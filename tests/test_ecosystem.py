"""Beside what people train with: trainers, mixed precision, checkpointing, averages, optimizers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from train_small import saved_storages

import fxcompress


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    fxcompress.manual_seed(0)
    yield
    torch._dynamo.reset()
    fxcompress.manual_seed(None)


def backend(policy: str = "uniform8", **settings: Any) -> Any:
    return fxcompress.backend(policy=policy, inner="aot_eager", min_bytes=0, **settings)


class Block(nn.Module):
    """The feed-forward part of a transformer block."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def classifier() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), Block(), Block(), nn.Linear(32, 4))


def batch(rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 16, generator=generator)
    return x, x[:, :4].argmax(1)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of two lists of gradients, relative."""
    assert len(found) == len(exact)
    assert found
    pairs = zip(found, exact, strict=True)
    difference = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return (difference / sum(float(b.double().square().sum()) for b in exact)) ** 0.5


def coded(made: Any) -> bool:
    return any(t.representation.startswith("affine") for t in made.plan().tensors)


# --- trainers -------------------------------------------------------------------------------------


def huggingface(tmp_path: Path, **arguments: Any) -> tuple[Any, Any]:
    """(a trainer of a tiny random BERT on random tokens, its model)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(64, (16, 16))
    rows = [
        {"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[0] % 2} for t in tokens
    ]
    given = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, **arguments,
    )  # fmt: skip
    return transformers.Trainer(model, given, train_dataset=rows), model


def test_huggingface_trainer(tmp_path: Path) -> None:
    """A model compiled in place: the trainer need not know; names in checkpoints stay."""
    trainer, model = huggingface(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5)
    names = list(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    made = backend()
    model.compile(backend=made)
    trainer.train()
    assert trainer.state.global_step == 2
    assert coded(made)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    trainer.save_model(str(tmp_path / "saved"))
    assert list(model.state_dict()) == names
    again = type(model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.state_dict(), model.state_dict())


@pytest.mark.slow
def test_huggingface_trainer_with_its_own_compile_flag(tmp_path: Path) -> None:
    trainer, _ = huggingface(tmp_path, torch_compile=True, torch_compile_backend="inductor")
    with fxcompress.enabled(policy="uniform8", min_bytes=0) as found:
        trainer.train()
    assert coded(found)


def test_accelerate() -> None:
    """Compiled before `prepare`; accumulation and clipping are Accelerate's own."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, made = classifier(), backend()
    model.compile(backend=made)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), batch_size=8)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(4):
        for x, y in data:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
    assert coded(made)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_lightning(tmp_path: Path) -> None:
    """Compiled in `configure_model`: after the strategy is set up, before weights are wrapped."""
    lightning = pytest.importorskip("pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    made = backend()

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()
            self.losses: list[float] = []

        def configure_model(self) -> None:
            self.net.compile(backend=made)

        def training_step(self, pair: list[Tensor], index: int) -> Tensor:
            loss = F.cross_entropy(self.net(pair[0]), pair[1])
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    module = Module()
    names = list(module.state_dict())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        accumulate_grad_batches=2, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    assert coded(made)
    assert module.losses[-1] < module.losses[0]
    assert list(module.state_dict()) == names


# --- block by block -------------------------------------------------------------------------------


def saved_of(out: Tensor, weights: nn.Module) -> int:
    """Bytes that the autograd graph of ``out`` holds besides the weights."""
    held = {p.untyped_storage().data_ptr() for p in weights.parameters()}
    return sum(size for place, size in saved_storages(out).items() if place not in held)


def test_a_block_that_runs_n_times_counts_n_times() -> None:
    """Blocks compiled one by one share a graph, compiled once; `repeats` tells the budget."""
    count, budget = 6, 1.6
    x = torch.randn(256, 32, requires_grad=True)

    def run(**settings: Any) -> tuple[int, Any]:
        torch._dynamo.reset()
        made = backend("auto", budget_mb=budget, **settings)
        model = nn.Sequential(*(Block() for _ in range(count)))
        for block in model:
            block.compile(backend=made)
        out = model(x)
        held = saved_of(out, model)
        out.sum().backward()
        assert made.plan().graphs == 1
        return held, made

    once, _ = run()
    held, made = run(repeats=count)
    assert once > budget * 1e6 > held
    plan = made.plan()
    # The residual stream passes from graph to graph as it is, and is counted as well.
    assert plan.planned_peak_bytes > count * plan.saved_bytes + (count - 1) * x.nbytes
    assert plan.planned_peak_bytes <= budget * 1e6
    with pytest.raises(fxcompress.BudgetError, match="smallest feasible budget"):
        run(repeats=100)


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_amp_trains(dtype: torch.dtype) -> None:
    """Autocast, and for fp16 a GradScaler, clipping after its `unscale_`."""
    model, made = classifier(), backend()
    model.compile(backend=made)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
    x, y = batch()
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert coded(made)
    assert any(str(dtype).endswith(t.dtype) for t in made.plan().tensors)
    assert losses[-1] < 0.6 * losses[0]


def test_a_step_that_overflows_is_skipped() -> None:
    model = classifier()
    model.compile(backend=backend())
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = model(batch()[0]).float().square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model.state_dict(), before)
    assert scaler.get_scale() < 2.0**120


# --- regions checkpointed by the user -------------------------------------------------------------


def _save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saves = op == torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(nn.Module):
    """The middle block is recomputed, whole or all but its products."""

    def __init__(self, selective: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        contexts = partial(create_selective_checkpoint_contexts, _save_products)
        self.options = {"context_fn": contexts} if selective else {}

    def forward(self, x: Tensor) -> Tensor:
        first, middle, last = self.blocks
        return last(checkpoint(middle, first(x), use_reentrant=False, **self.options))


@pytest.mark.parametrize("selective", [False, True])
def test_checkpoint_inside(selective: bool) -> None:
    x = torch.randn(64, 32)
    model = Checkpointed(selective)
    model(x).square().sum().backward()
    exact = gradients(model)
    for policy, low, high in (("lossless", 0.0, 1e-4), ("uniform8", 1e-5, 0.05)):
        torch._dynamo.reset()
        model.zero_grad()
        made = backend(policy)
        torch.compile(model, backend=made, fullgraph=True)(x).square().sum().backward()
        assert low <= distance(gradients(model), exact) < high
    middle = {t.module: t for t in made.plan().tensors if t.module.startswith("blocks.1.")}
    # Recomputed whole, nothing of it is saved; else what the policy says, as it is.
    assert set(middle) == ({"blocks.1.up", "blocks.1.down"} if selective else set()), middle
    assert all("checkpoint policy" in t.reason for t in middle.values())


# --- averages and optimizers ----------------------------------------------------------------------


def test_ema() -> None:
    model = classifier()
    model.compile(backend=backend())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = batch()
    expected = {k: v.detach().clone() for k, v in model.named_parameters()}
    for step in range(3):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        for name, p in model.named_parameters():
            expected[name] = p.detach().clone() if step == 0 else (expected[name] + p.detach()) / 2
    torch.testing.assert_close(dict(average.module.named_parameters()), expected)
    assert average(x).shape == (64, 4)


def eight_bit(name: str) -> Any:
    if name == "bitsandbytes":
        return pytest.importorskip("bitsandbytes").optim.AdamW8bit
    return pytest.importorskip("torchao.optim").AdamW8bit


OWN_COMPILE = pytest.param("torchao", marks=pytest.mark.slow)  # of the optimizer, by Inductor


@pytest.mark.parametrize("name", ["Adagrad", "Muon", "bitsandbytes", OWN_COMPILE])
def test_optimizers(name: str) -> None:
    """Those of PyTorch; 8-bit states where a package with them is installed."""
    model, made = classifier(), backend()
    model.compile(backend=made)
    if name == "Muon":
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("torch has no Muon yet")
        optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], 2e-2)
    else:
        kind = getattr(torch.optim, name, None) or eight_bit(name)
        optimizer = kind(model.parameters(), 1e-2)
    x, y = batch()
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert coded(made)
    assert losses[-1] < 0.8 * losses[0]
