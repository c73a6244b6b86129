"""Gradients of small modules: exact where nothing is rounded, close and unbiased where it is.

Most run on AOTAutograd's graphs op by op (``inner="aot_eager"``), where every kernel is the same as
without compression, so that "exact" is ``torch.equal``. A few combined models run on Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from train_small import no_leftovers

import fxcompress

PLAIN_EAGER = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs from earlier runs: every test sees the passes of these very sources."""
    with no_leftovers():
        yield


# --- modules ------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.mix(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class SoftmaxAttention(Attention):
    """The same written out: its softmax is saved, or computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.mix(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Tied(nn.Module):
    """Embedding and output projection share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.table(tokens))))


class Shared(nn.Module):
    """One layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(F.silu(self.layer(x))))


class Several(nn.Module):
    """Three outputs, one of them saved as well, because another is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = F.relu(self.first(F.silu(self.stem(x))))
        b = self.second(a)
        return a, b.sigmoid(), b.mean()


class ReturnsItsInput(nn.Module):
    """The input is saved for the backward and handed back; so is an inner tensor's view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(x)
        return x, y.view(-1, 4), self.second(F.gelu(y)) * x


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False
    error: float = 0.01  # of the whole gradient at 8 bits
    lossy: bool = True  # something is saved that 8 bits change


IMAGE, ROWS, TEXT = (4, 3, 12, 12), (32, 16), (2, 12, 16)
CASES = [
    Case("conv", lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, stride=2)), IMAGE),
    Case("linear", lambda: nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 7)), ROWS),
    Case("batch_norm", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), IMAGE),
    Case("layer_norm", lambda: nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32)), ROWS),
    Case("group_norm", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), IMAGE),
    Case(
        "relu",
        lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU()),
        ROWS,
    ),
    Case("gelu", lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 7)), ROWS),
    Case("silu", lambda: nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 7)), ROWS),
    Case(
        "max_pool",
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(3, 2, 1)),
        IMAGE,
        lossy=False,
    ),
    Case(
        "adaptive_max_pool",
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveMaxPool2d(3)),
        IMAGE,
        lossy=False,
    ),
    Case(
        "avg_pool",
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.AvgPool2d(2),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        IMAGE,
    ),
    Case(
        "dropout",
        lambda: nn.Sequential(
            nn.Linear(16, 24), nn.Dropout(0.3), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 7)
        ),
        ROWS,
    ),
    Case("attention", Attention, TEXT),
    Case("softmax_attention", SoftmaxAttention, TEXT),
    Case("embedding_tied", Tied, (3, 11), tokens=True),
    Case(
        "residual",
        lambda: Residual(
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding=1),
        ),
        IMAGE,
    ),
    Case("shared_weights", Shared, ROWS),
    Case("several_outputs", Several, ROWS),
    Case("input_is_output", ReturnsItsInput, ROWS),
    Case(
        "conv_stem",
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ),
        IMAGE,
    ),
]

# --- running them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    random_state: Tensor  # of torch's own generator after the step

    def equals(self, other: Result) -> None:
        assert len(self.outputs) == len(other.outputs)
        for mine, theirs in zip(self.outputs, other.outputs, strict=True):
            assert torch.equal(mine, theirs)
        assert self.gradients.keys() == other.gradients.keys()
        for name, mine in self.gradients.items():
            assert torch.equal(mine, other.gradients[name]), name
        assert torch.equal(self.random_state, other.random_state)

    def flat(self) -> Tensor:
        return torch.cat([g.flatten().double() for g in self.gradients.values()])

    def error(self, exact: Result) -> float:
        return float((self.flat() - exact.flat()).norm() / exact.flat().norm())


class Run:
    """One module with one batch, compiled by one backend; each step starts from the same state."""

    def __init__(self, case: Case, backend: Any) -> None:
        torch.manual_seed(11)
        self.model = case.make()
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.is_float = not case.tokens
        self.batch = torch.randn(case.shape) if self.is_float else torch.randint(23, case.shape)
        self.backend = backend
        self.compiled = torch.compile(self.model, backend=backend)

    def step(self, seed: int = 5) -> Result:
        self.model.load_state_dict(self.state)  # batch norm's running statistics
        self.model.zero_grad()
        x = self.batch.clone().requires_grad_() if self.is_float else self.batch
        torch.manual_seed(seed)
        outputs = self.compiled(x)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        generator = torch.Generator().manual_seed(3)
        tangents = [torch.randn(o.shape, generator=generator) for o in outputs]
        torch.autograd.backward(outputs, tangents)
        gradients = {
            k: p.grad.clone() for k, p in self.model.named_parameters() if p.grad is not None
        }
        if x.grad is not None:
            gradients["(input)"] = x.grad
        values = [o.detach().clone() for o in outputs]
        return Result(values, gradients, torch.get_rng_state())


def eager(policy: str, **settings: Any) -> Any:
    return fxcompress.backend(policy=policy, inner="aot_eager", min_bytes=0, **settings)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_lossless_is_exact_and_8_bits_are_close(case: Case) -> None:
    plain = Run(case, PLAIN_EAGER).step()
    torch._dynamo.reset()
    Run(case, eager("lossless")).step().equals(plain)
    torch._dynamo.reset()
    run = Run(case, eager("uniform8"))
    coded = run.step()
    for mine, theirs in zip(coded.outputs, plain.outputs, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(coded.random_state, plain.random_state)
    used = [t.representation for t in fxcompress.explain(run.compiled).tensors]
    assert any(r.startswith("affine(bits=8") for r in used) == case.lossy, used
    assert (coded.error(plain) > 0) == case.lossy
    assert coded.error(plain) < case.error
    torch.testing.assert_close(
        coded.flat(), plain.flat(), rtol=0, atol=0.05 * float(plain.flat().abs().max())
    )


@pytest.mark.parametrize("name", ["conv", "linear", "dropout"])
def test_noise_averages_out(name: str) -> None:
    """Parameters whose gradient is linear in the saved tensors: the mean over steps is exact."""
    case = next(c for c in CASES if c.name == name)
    exact = Run(case, PLAIN_EAGER).step().gradients
    torch._dynamo.reset()
    run = Run(case, eager("uniform3"))
    fxcompress.manual_seed(0)
    steps = [run.step().gradients for _ in range(64)]
    noisy_weights = 0
    for key in (k for k in exact if k.endswith("weight")):
        draws = torch.stack([s[key].double() for s in steps])
        noisy = draws.std(0) > 1e-6 * exact[key].abs().max()
        if not bool(noisy.any()):
            continue
        noisy_weights += 1
        z = (draws.mean(0) - exact[key])[noisy] / (draws.std(0)[noisy] / len(steps) ** 0.5)
        # Mean square of standard normals; elements of one weight are correlated, hence the slack.
        assert float(z.square().mean()) < 2.0, key
        assert abs(float(z.mean())) < 0.5, key
    assert noisy_weights


def test_masks_are_those_of_the_exact_values() -> None:
    """ReLU, max pooling, dropout and clamps pass gradients on by comparison alone.

    So the input's gradient does not depend on rounded values at all: exact even at 1 bit, where a
    comparison of decoded values would be wrong for a large part of the elements.
    """

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.2),
            nn.Conv2d(8, 8, 3),
            nn.Hardtanh(-0.3, 0.4),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 16),
            nn.ReLU6(),
            nn.Linear(16, 5),
        )

    case = Case("masks", make, (4, 3, 16, 16))
    plain = Run(case, PLAIN_EAGER).step()
    torch._dynamo.reset()
    coded = Run(case, eager("uniform1")).step()
    assert coded.error(plain) > 0.05  # the weights' gradients do see 1-bit values
    assert torch.equal(coded.gradients["(input)"], plain.gradients["(input)"])
    for name in ("12.bias", "10.bias", "6.bias", "3.bias", "0.bias"):
        assert torch.equal(coded.gradients[name], plain.gradients[name]), name


def test_dropout_draws_the_same_mask() -> None:
    case = next(c for c in CASES if c.name == "dropout")
    plain, coded = Run(case, PLAIN_EAGER), Run(case, eager("uniform2"))
    seeds = [plain.step(seed).outputs[0] for seed in (1, 2)]
    assert not torch.equal(*seeds)
    for seed, expected in zip((1, 2), seeds, strict=True):
        result = coded.step(seed)
        assert torch.equal(result.outputs[0], expected)


# --- on Inductor --------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Stem, residual block and classifier of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.block = Residual(
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class Transformer(nn.Module):
    """Tied embedding, causal attention, layer norm, GELU, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.Dropout(0.2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.table(tokens), 0.1)
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return x @ self.table.weight.T


INDUCTOR_CASES = [
    Case("conv_net", ConvNet, (4, 3, 16, 16)),
    Case("transformer", Transformer, (2, 12), tokens=True),
]


@pytest.mark.parametrize("case", INDUCTOR_CASES, ids=lambda c: c.name)
def test_inductor(case: Case) -> None:
    """Lossless is bit for bit plain Inductor here too, although some loops fuse otherwise."""
    plain = Run(case, "inductor").step()
    torch._dynamo.reset()
    run = Run(case, fxcompress.backend(policy="lossless", min_bytes=0))
    run.step().equals(plain)
    plan = fxcompress.explain(run.compiled)
    assert plan.saved_bytes < plan.saved_bytes_before
    torch._dynamo.reset()
    run = Run(case, fxcompress.backend(policy="uniform8", min_bytes=0))
    coded = run.step()
    for mine, theirs in zip(coded.outputs, plain.outputs, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(coded.random_state, plain.random_state)
    assert 0 < coded.error(plain) < 0.01
    with pytest.raises(AssertionError):
        run.step().equals(coded)  # the next step draws new noise
