"""What each process of tests/test_distributed.py runs; prints one line of JSON."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fxcompress
from fxcompress.tools import memory

WIDTH, ROWS = 256, 64  # a block has two buckets of a megabyte


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Not an `nn.Sequential`, whose forward Dynamo does not compile as one under DDP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def net(width: int = WIDTH) -> Net:
    torch.manual_seed(0)
    return Net(width)


def rows_of(rank: int, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 + rank))


def loss_of(out: Tensor) -> Tensor:
    return out.square().sum() / ROWS


def backend(policy: str, **settings: Any) -> Any:
    torch._dynamo.reset()
    return fxcompress.backend(policy=policy, inner="aot_eager", min_bytes=0, **settings)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gap(model: nn.Module, exact: list[Tensor]) -> float:
    """Largest relative difference of any gradient."""
    found = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    pairs = zip(found, exact, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def digest(made: Any) -> str:
    """Of a plan's choices."""
    rows = [(t.name, t.representation) for t in made.plan().tensors]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def expected(world: int) -> list[Tensor]:
    """Mean over ranks of the gradients of plain PyTorch, in one process."""
    model = net()
    for rank in range(world):
        (loss_of(model(rows_of(rank))) / world).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def data_parallel(rank: int, exact: list[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for policy in ("lossless", "uniform4"):
        made = backend(policy)
        model = DistributedDataParallel(net(), bucket_cap_mb=1)
        compiled = torch.compile(model, backend=made)
        loss_of(compiled(rows_of(rank))).backward()
        found[policy] = gap(model, exact)
        plan = made.plan()
        found["graphs"] = plan.graphs
        ledger = made.partitioner.ledger
        found["counted"] = [sum(ledger.saved.values()), plan.saved_bytes]
    return found


def planned(rank: int) -> str:
    """By measurements on each rank's own first batch."""
    made = backend("auto", ratio_saved=6.0)
    with torch._dynamo.config.patch(optimize_ddp=False):
        compiled = torch.compile(DistributedDataParallel(net()), backend=made)
        loss_of(compiled(rows_of(rank))).backward()
    assert made.plan().calibrated
    return digest(made)


def peak(rank: int) -> list[float]:
    """(measured, allowed, plain Inductor's planned) bytes of a step with generated code.

    Many rows and small weights: what DDP itself allocates goes by the weights.
    """
    torch._dynamo.reset()
    budget = 20.0
    made = fxcompress.backend(budget_mb=budget, min_bytes=0)
    x = rows_of(rank, 4096, 64)
    with torch._dynamo.config.patch(optimize_ddp=False):
        model = DistributedDataParallel(net(64))
        compiled = torch.compile(model, backend=made)

        def step() -> None:
            loss_of(compiled(x)).backward()

        step()
        measured = memory.measure_step(step, model.parameters()).peak_bytes
    plan = made.plan()
    return [measured, budget * 1e6, plan.plain_peak_bytes]


def noise(rank: int) -> str:
    """Of the gradients on the same batch on every rank: other noise on each."""
    made = backend("uniform2")
    model = net()
    fxcompress.manual_seed(7)
    loss_of(torch.compile(model, backend=made)(rows_of(0))).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return hashlib.sha256(grads.numpy().tobytes()).hexdigest()[:12]


def sharded(rank: int, exact: list[Tensor]) -> dict[str, Any]:
    """FSDP2, each block compiled, as torchtitan does."""
    found: dict[str, Any] = {}
    for policy in ("lossless", "uniform4"):
        made = backend(policy, repeats=3)
        model = net()
        for block in model.blocks:
            block.compile(backend=made)
            fully_shard(block)
        fully_shard(model)
        loss_of(model(rows_of(rank))).backward()
        found[policy] = gap(model, exact)
        found["plan"] = digest(made)
    return found


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    """Columns, then rows of the MLP on all ranks; every rank has the same batch."""
    reference, fresh = net().blocks[0], net().blocks[0]
    x = rows_of(0)
    loss_of(reference(x)).backward()
    exact = [p.grad for p in reference.parameters() if p.grad is not None]
    mesh = dist.init_device_mesh("cpu", (world,))
    found = {}
    for policy in ("lossless", "uniform8"):
        model = copy.deepcopy(fresh)
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        made = backend(policy)
        loss_of(torch.compile(model, backend=made)(x)).backward()
        found[policy] = gap(model, exact)
    return found


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    exact = expected(world)
    parts = {
        "ddp": lambda: data_parallel(rank, exact),
        "noise": lambda: noise(rank),
        "plan": lambda: planned(rank),
        "peak": lambda: peak(rank),
        "fsdp": lambda: sharded(rank, exact),
        "tp": lambda: tensor_parallel(rank, world),
    }
    result = {name: parts[name]() for name in sys.argv[1].split(",")}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, result)
    if rank == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
