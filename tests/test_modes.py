"""Ways of training that PyTorch offers: they work under compression, or say that they do not."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from train_small import PLAIN, Net, backend, batch, coded, error, gradients, loss, no_leftovers

import fxcompress
from fxcompress import torch_private


@pytest.fixture(autouse=True)
def fresh(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Each test compiles anew, and no pass gives up in any of them."""
    with no_leftovers(), caplog.at_level(logging.ERROR, logger="fxcompress"):
        yield
    assert not [r for r in caplog.records if r.name == "fxcompress" and r.levelno >= logging.ERROR]


def check(model: nn.Module, *inputs: Tensor, exact: Any = None, **options: Any) -> fxcompress.Plan:
    """The model's gradients at 8 bits are near the exact ones; its plan, which codes something."""
    exact = exact or gradients(model, model, *inputs)
    made = backend()
    found = gradients(model, torch.compile(model, backend=made, **options), *inputs)
    assert 0 < error(found, exact) < 0.02
    assert coded(made.plan())
    return made.plan()


# --- shapes and layouts -------------------------------------------------------------------------


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.out = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.mix(self.table(tokens)).unsqueeze(1).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.out(F.gelu(x))


@pytest.mark.parametrize("mark", [False, True], ids=["seen", "marked"])
def test_no_storm_of_recompiles(mark: bool) -> None:
    """Batch and sequence both vary: a graph for the first sizes, one or two for all others."""
    model, made = Text(), backend()
    compiled = torch.compile(model, backend=made)
    counters.clear()
    for rows in (2, 3, 5, 4, 9):
        for length in (6, 8, 11, 16):
            tokens = torch.randint(20, (rows, length))
            exact = gradients(model, model, tokens)
            if mark:
                torch._dynamo.mark_dynamic(tokens, (0, 1))
            assert 0 < error(gradients(model, compiled, tokens), exact) < 0.02, (rows, length)
    assert counters["stats"]["unique_graphs"] == (1 if mark else 3)
    assert len(made.plans) == (1 if mark else 3)


def test_channels_last() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU()]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend=backend())
    out = compiled(images)
    assert out.is_contiguous(memory_format=torch.channels_last)
    loss(out).backward()
    torch._dynamo.reset()
    check(model, images)
    torch._dynamo.reset()
    check(model, images.contiguous())  # given in the other layout: compiled for that


# --- ways of differentiating --------------------------------------------------------------------


def test_double_backward_is_refused_by_name() -> None:
    """As under plain torch.compile; not a gradient of 0."""
    model = Net()
    out = loss(torch.compile(model, backend=backend())(batch()))
    first = torch.autograd.grad(out, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        sum(g.square().sum() for g in first).backward()


def test_a_backward_without_retain_graph_is_refused_twice() -> None:
    out = loss(torch.compile(Net(), backend=backend())(batch()))
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_one_module_called_twice() -> None:
    model, between = Net(), nn.Linear(8, 32)
    compiled = torch.compile(model, backend=backend())
    exact = gradients(model, lambda x: model(between(model(x))), batch())
    found = gradients(model, lambda x: compiled(between(compiled(x))), batch())
    assert 0 < error(found, exact) < 0.02


def test_gradients_of_inputs_alone() -> None:
    model = Net().requires_grad_(False)
    x = batch().requires_grad_()
    (exact,) = torch.autograd.grad(loss(model(x)), x)
    made = backend("uniform8")
    (found,) = torch.autograd.grad(loss(torch.compile(model, backend=made)(x)), x)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.02


def test_inference_mode_then_training() -> None:
    model = Net()
    exact = gradients(model, model, batch())
    compiled = torch.compile(model, backend=backend())
    with torch.inference_mode():
        expected = compiled(batch())
    assert 0 < error(gradients(model, compiled, batch()), exact) < 0.02
    torch.testing.assert_close(model(batch()), expected)


def test_partly_frozen_layer_by_layer() -> None:
    """Unfreezing makes another graph; each has the gradients of what is trained in it. (On 2.11
    PyTorch goes on with the first graph, with us and without.)"""
    model = Net().requires_grad_(False)
    plain = torch.compile(model, backend="aot_eager")
    compiled = torch.compile(model, backend=backend())
    for layer in (model.head, model.second, model.first):
        layer.weight.requires_grad_()
        exact = gradients(model, plain, batch())
        found = gradients(model, compiled, batch())
        assert 0 < error(found, exact) < 0.02


def test_functional_gradients() -> None:
    """``torch.func.grad`` over a compiled model."""
    model = Net()
    exact = gradients(model, model, batch())
    compiled = torch.compile(model, backend=backend())
    parameters = {k: p.detach() for k, p in compiled.named_parameters()}

    def value(given: dict[str, Tensor]) -> Tensor:
        return loss(torch.func.functional_call(compiled, given, (batch(),)))

    found = torch.func.grad(value)(parameters)
    bare = {k.removeprefix("_orig_mod."): g for k, g in found.items()}
    assert error(bare, exact) < 0.02


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_checkpointing(inside: bool, recwarn: pytest.WarningsRecorder) -> None:
    """Inside a compiled model regions are tagged; around one, its saved payloads are made again."""

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda t: F.gelu(self.first(t)), x, use_reentrant=False)
            return self.head(F.silu(self.second(x)))

    model = Checkpointed() if inside else Net()
    exact = gradients(model, model, batch())
    compiled = torch.compile(model, backend=backend())

    def call(x: Tensor) -> Tensor:
        return compiled(x) if inside else checkpoint(compiled, x, use_reentrant=False)

    assert 0 < error(gradients(model, call, batch()), exact) < 0.02
    warned = [w for w in recwarn if "hooks on saved tensors" in str(w.message)]
    assert bool(warned) != inside


# --- what a model may contain -------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """Saves one tensor in the checked way, one as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.square = x.square()
        return x * ctx.square

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (2 * ctx.square + x.square())


def test_custom_autograd_function() -> None:
    class Custom(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(Cube.apply(self.second(F.gelu(self.first(x)))))

    check(Custom(), batch(), fullgraph=True)


def test_cond() -> None:
    """Both branches; what crosses the operator is coded, what it holds inside is its own."""

    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.first(x))
            x = torch.cond(
                x.sum() > 40,
                lambda t: F.gelu(self.second(t)),
                lambda t: torch.sin(self.second(t)),
                (x,),
            )
            return self.head(x)

    model = Branches()
    sums = [float(F.gelu(model.first(x)).sum()) for x in (batch(), 0.1 * batch())]
    assert (sums[0] > 40) != (sums[1] > 40)
    compiled = torch.compile(model, backend=backend(), fullgraph=True)
    for x in (batch(), 0.1 * batch()):
        assert 0 < error(gradients(model, compiled, x), gradients(model, model, x)) < 0.02


def test_scan() -> None:
    from torch._higher_order_ops.scan import scan

    class Recurrent(Net):
        def forward(self, x: Tensor) -> Tensor:
            def combine(carry: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                # + 1: what is both returned and saved "might be aliasing", says PyTorch 2.14.
                return torch.sigmoid(carry + y) + 1, carry * y + 1

            _, states = scan(combine, torch.zeros(64), F.gelu(self.first(x)), dim=0)
            return self.head(F.silu(self.second(states)))

    model = Recurrent()
    exact = gradients(model, torch.compile(model, backend=PLAIN), batch(12))
    torch._dynamo.reset()
    check(model, batch(12), exact=exact)


def test_flex_attention() -> None:
    """Has no backward on CPUs, says PyTorch; without gradients it is the plain graph."""
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mix = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).view(2, 64, 3, 2, 16).permute(2, 0, 3, 1, 4)
            return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 0.1 * (i - j))

    model, x = Flex(), torch.randn(2, 64, 32)
    made = backend()
    with torch.no_grad():
        expected = torch.compile(model, backend=PLAIN)(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend=made)(x), expected)
    assert not made.plans
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        torch.compile(model, backend=made)(x)


def test_tensor_subclass() -> None:
    """A wrapper of two tensors: its parts are traced, and trained as without us."""
    from torch.testing._internal.two_tensor import TwoTensor

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(TwoTensor(torch.randn(shape) / 4, torch.randn(shape) / 4))

    torch.manual_seed(0)
    first, second = parameter(32, 64), parameter(64, 8)

    def model(x: Tensor) -> Tensor:
        return F.gelu(x @ first) @ second

    def one(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = call(TwoTensor(batch(), batch(seed=5)))
        out.square().sum().backward()
        found = [g for p in (first, second) for g in (p.grad.a, p.grad.b)]
        first.grad = second.grad = None
        return found

    exact = one(model)
    made = backend("lossless")
    for mine, theirs in zip(one(torch.compile(model, backend=made)), exact, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()
    made = backend("uniform8")
    for mine, theirs in zip(one(torch.compile(model, backend=made)), exact, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02
    assert made.plan().tensors or made.plan().note


# --- hooks on saved tensors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["backend", "name", pytest.param("enabled", marks=pytest.mark.slow)]
)
def test_ambient_hooks_are_noticed(way: str) -> None:
    model, x = Net(), batch()
    exact = gradients(model, model, x)
    torch._dynamo.reset()
    settings = {"policy": "uniform8", "min_bytes": 0}
    if way == "backend":
        compiled = torch.compile(model, backend=backend())
    elif way == "name":
        options = {**settings, "inner": "aot_eager"}
        compiled = torch.compile(model, backend="fxcompress", options=options)
    else:
        compiled = torch.compile(model, backend="inductor")

    def step() -> None:
        with torch.autograd.graph.save_on_cpu():
            found = gradients(model, compiled, x)
        assert 0 < error(found, exact) < 0.02

    inside = fxcompress.enabled(**settings) if way == "enabled" else nullcontext()
    with pytest.warns(UserWarning, match="hooks on saved tensors are in force"), inside:
        step()


def test_a_hook_that_changes_what_it_was_given_is_caught() -> None:
    """Payloads are bytes; one that comes back as something else is not decoded."""

    def pack(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.uint8 else tensor

    compiled = torch.compile(Net(), backend=backend())
    with (
        pytest.warns(UserWarning, match="bit for bit"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        out = loss(compiled(batch()))
    with pytest.raises(fxcompress.FxCompressError, match="uint8"):
        out.backward()


def test_no_hook_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    model = Net()
    with torch.autograd.graph.save_on_cpu():
        model(batch())
    loss(torch.compile(model, backend=backend())(batch())).backward()
    assert not [w for w in recwarn if "hooks" in str(w.message)]


# --- options of torch.compile -------------------------------------------------------------------


def test_fullgraph() -> None:
    """Neither compile nor step breaks the graph; a break of the user's is still an error."""
    check(Net(), batch(), fullgraph=True)

    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Broken(), backend=backend(), fullgraph=True)(batch())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("by_name", [True, False], ids=["name", "instance"])
def test_modes_reach_inductor(mode: str, by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the mode stands for, and our own option beside it."""
    seen: dict[str, Any] = {}

    def compile_fx(module: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.update(config_patches)
        partitioner = seen.pop("custom_partitioner_fn")
        return torch_private.compile_with_aot_eager(module, inputs, partitioner)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setenv("FXCOMPRESS_POLICY", "uniform8")
    monkeypatch.setenv("FXCOMPRESS_MIN_BYTES", "0")
    model = Net()
    exact = gradients(model, model, batch())
    made = "fxcompress" if by_name else fxcompress.backend()
    found = gradients(model, torch.compile(model, backend=made, mode=mode), batch())
    assert 0 < error(found, exact) < 0.02
    assert seen == {**torch_private.mode_options(mode), "allow_buffer_reuse": False}


@pytest.mark.slow
def test_accumulation_under_reduce_overhead() -> None:
    """Compiled with CUDA graphs asked for: on CPUs Inductor leaves them out, with a reason."""
    model = Net()
    parts = [batch(seed=s) for s in (4, 5, 6)]
    exact: dict[str, Tensor] = {}
    for part in parts:
        for k, g in gradients(model, model, part).items():
            exact[k] = exact.get(k, 0) + g
    made = fxcompress.backend(policy="uniform8", min_bytes=0)
    compiled = torch.compile(model, backend=made, mode="reduce-overhead")
    for part in parts:
        loss(compiled(part)).backward()
    found = {k: p.grad for k, p in model.named_parameters()}
    assert 0 < error(found, exact) < 0.02


# --- copies -------------------------------------------------------------------------------------


def _pickled(compiled: Any) -> Any:
    return pickle.loads(pickle.dumps(compiled))


def _saved(compiled: Any) -> Any:
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fresh"])
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved], ids=lambda f: f.__name__)
@pytest.mark.parametrize("in_place", [True, False], ids=["Module.compile", "torch.compile"])
def test_copies_of_a_compiled_model(
    copied: Callable[[Any], Any], trained: bool, in_place: bool
) -> None:
    """A copy trains by itself, compressed where copying keeps a model compiled at all."""
    model = Net()
    exact = gradients(model, model, batch())
    if in_place:
        model.compile(backend=backend())
        compiled: Any = model
    else:
        compiled = torch.compile(model, backend=backend())
    if trained:
        gradients(compiled, compiled, batch())
    twin = copied(compiled)
    found = {k.removeprefix("_orig_mod."): g for k, g in gradients(twin, twin, batch()).items()}
    assert error(found, exact) < 0.02
    if not in_place:
        assert error(found, exact) > 0
        assert coded(fxcompress.explain(twin))
    with torch.no_grad():
        twin_weight = dict(twin.named_parameters())
        next(iter(twin_weight.values())).zero_()
    assert bool(model.first.weight.any())


def test_a_copied_backend_has_its_own_plans() -> None:
    made = backend("uniform4", budget_mb=3.0, seed=5)
    twin = pickle.loads(pickle.dumps(made))
    assert twin.settings == made.settings
    loss(torch.compile(Net(), backend=made)(batch())).backward()
    assert made.plans
    assert not twin.plans
