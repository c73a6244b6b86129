"""The rewritten FX graphs themselves: who reads what, in which order, under which reason."""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.fx_passes import post_grad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fxcompress import Plan, report, torch_private
from fxcompress.passes.capture import Cut, output_args, pair, placeholders, receive
from fxcompress.passes.properties import storage_root
from fxcompress.pipeline import Partitioner, plan_graph
from fxcompress.settings import make

Modules = tuple[fx.GraphModule, fx.GraphModule]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder(Partitioner):
    """Keeps plain PyTorch's cut and ours, of the last graph."""

    before: Cut
    after: Cut
    plan: Plan

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Modules:
        min_cut, count = torch_private.min_cut, kwargs["num_fwd_outputs"]

        def recorded(*args: Any, **kwargs: Any) -> Modules:
            plain = min_cut(*args, **kwargs)
            self.before = pair(*plain, count, ()).copy()
            return plain

        torch_private.min_cut = recorded
        try:
            after = super().__call__(gm, joint_inputs, **kwargs)
        finally:
            torch_private.min_cut = min_cut
        self.after = pair(*after, count, ())
        if self.plans:
            self.plan = report.read(next(reversed(self.plans)))
        return after


def record(call: Callable[..., Any], *inputs: Any, **settings: Any) -> Recorder:
    """Compile ``call`` for training, run one step, and return what the partitioner saw."""
    recorder = Recorder(make(**{"inner": "aot_eager", "min_bytes": 0, **settings}))

    def backend(module: fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        return torch_private.compile_with_aot_eager(module, example, recorder)

    out = torch.compile(call, backend=backend)(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    sum(o.sum() for o in outs if o.requires_grad).backward()
    return recorder


# --- models that save something of every sort -----------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.head = nn.MaxPool2d(3, 2, 1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = F.leaky_relu(x + self.norm2(self.conv2(x)))
        return self.head(F.dropout(F.hardtanh(x).flatten(1), 0.2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.mix(self.norm(x)).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        return F.gelu(self.out(y.transpose(1, 2).reshape(batch, length, width)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv_net": (ConvNet, (2, 3, 8, 8)),
    "attention": (Attention, (2, 12, 16)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def coded(request: pytest.FixtureRequest) -> Recorder:
    """A model rewritten with every float saved tensor at 4 bits."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, shape = MODELS[request.param]
    return record(build(), torch.randn(shape, requires_grad=True), policy="uniform4")


@pytest.fixture(scope="module")
def conv_net() -> Recorder:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return record(ConvNet(), torch.randn(2, 3, 8, 8, requires_grad=True), policy="uniform4")


def calls(module: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in module.graph.nodes if name_of(n) == name]


def name_of(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return "getitem" if target is operator.getitem else str(target)


def argument(node: fx.Node, name: str) -> Any:
    """What a call of an operator is given under a name of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    return node.args[names.index(name)]


def spec_of(node: fx.Node) -> str:
    """Codec of an encode or decode."""
    return str(argument(node, "codec"))


def payloads(cut: Cut) -> dict[str, tuple[fx.Node, str]]:
    """(the encode that makes it, its codec) of payloads by name: of an encode that fills zeros, of
    the values and of their mask."""
    found = {}
    for node in encodes(cut):
        if name_of(node) != "fxcompress::encode_filled":
            found[node.name] = (node, spec_of(node))
            continue
        for part in node.users:
            found[part.name] = (node, "bits(bits=1)" if part.args[1] else spec_of(node))
    return found


def encodes(cut: Cut) -> list[fx.Node]:
    return [n for n in cut.forward.graph.nodes if name_of(n).startswith("fxcompress::encode")]


def decodes(cut: Cut) -> list[fx.Node]:
    return [n for n in cut.backward.graph.nodes if name_of(n).startswith("fxcompress::decode")]


def descendants(starts: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(starts)
    while pending:
        for user in pending.pop().users:
            if user not in found and user.op != "output":
                found.add(user)
                pending.append(user)
    return found


# --- masks --------------------------------------------------------------------------------------

STEPS = {"sign", "sgn", "floor", "ceil", "round", "trunc", "frac", "fmod", "remainder"}


def test_nothing_that_branches_reads_a_decode(coded: Recorder) -> None:
    lossy = [d for d in decodes(coded.after) if spec_of(d).startswith("affine")]
    assert lossy
    for node in descendants(lossy):
        value = node.meta["val"]
        assert not isinstance(value, Tensor) or value.is_floating_point(), node.format_node()
        assert name_of(node).removeprefix("aten::") not in STEPS


def test_no_comparison_is_left_in_the_backward(conv_net: Recorder) -> None:
    """Comparisons that plain PyTorch makes in the backward are made in the forward, once."""

    def comparisons(module: fx.GraphModule) -> int:
        return sum(len(calls(module, f"aten::{name}")) for name in ("le", "gt", "ge", "lt"))

    assert comparisons(conv_net.before.backward) >= 1
    assert comparisons(conv_net.after.backward) == 0
    assert comparisons(conv_net.after.forward) >= comparisons(conv_net.before.backward)


def test_masks_take_one_bit(coded: Recorder) -> None:
    for node in [s.forward for s in coded.after.saved]:
        assert node.meta["val"].dtype is not torch.bool, f"{node} is saved unpacked"
    for node in encodes(coded.after):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype is torch.bool:
            assert node.meta["val"].numel() == math.ceil(source.meta["val"].numel() / 8)


def test_pooling_indices_take_four_bits(conv_net: Recorder) -> None:
    """Windows of 3 by 3: nine values, four bits, where plain Inductor saves a byte."""
    indices = [
        e
        for e in encodes(conv_net.after)
        if "max_pool" in name_of(e.args[0].args[0])  # type: ignore[union-attr,arg-type]
    ]
    packed = [e for e in indices if e.args[0].args[1] == 1]  # type: ignore[union-attr]
    assert len(packed) == 1
    assert packed[0].meta["val"].numel() == 2 * 8 * 4 * 4 // 2


@pytest.mark.parametrize(("size", "expected"), [(10, ["bits(bits=6)"]), (22, [])])
def test_pooling_indices_of_a_whole_image(size: int, expected: list[str]) -> None:
    """Indices that count through the image (8 by 8, 20 by 20) take as many bits as it has pixels.

    More than the codec packs are saved as they are, and nothing else of the plan suffers.
    """
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(3))
    recorder = record(model, torch.randn(2, 1, size, size), policy="lossless")
    assert [spec_of(e) for e in encodes(recorder.after)] == expected
    found = {t.name: t.representation for t in recorder.plan.tensors}
    assert found["convolution"] == "shape"  # its values are read by nobody
    assert "convolution" not in [s.name for s in recorder.after.saved]


# --- places -------------------------------------------------------------------------------------


def test_encode_follows_the_last_reader(coded: Recorder) -> None:
    nodes = list(coded.after.forward.graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    lossy = [e for e in encodes(coded.after) if spec_of(e).startswith("affine")]
    assert lossy
    for node in lossy:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        readers = [u for u in source.users if u.op != "output" and "encode" not in name_of(u)]
        last = max([source, *readers], key=at.__getitem__)
        between = nodes[at[last] + 1 : at[node]]
        assert all("fxcompress::" in name_of(n) for n in between), (node, last, between)


def test_decode_precedes_its_readers(coded: Recorder) -> None:
    nodes = list(coded.after.backward.graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    assert decodes(coded.after)
    for node in decodes(coded.after):
        assert node.users, f"{node} is read by nobody"
        first = min(at[u] for u in node.users)
        between = nodes[at[node] + 1 : first]
        assert all("fxcompress::" in name_of(n) for n in between), (node, between)


def test_no_matmul_or_convolution_while_a_decode_waits(coded: Recorder) -> None:
    """A decoded tensor lives for one cluster of readers: no other big call runs meanwhile."""
    nodes = list(coded.after.backward.graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    big = ("aten::mm", "aten::bmm", "aten::addmm", "aten::convolution_backward")
    for node in decodes(coded.after):
        last = max(at[u] for u in node.users)
        for other in nodes[at[node] + 1 : last]:
            assert name_of(other) not in big or other in node.users


def test_far_apart_readers_get_a_decode_each() -> None:
    """Decoding twice is cheaper than a full tensor that waits through a matrix product."""
    first, second, third = (nn.Linear(16, 16) for _ in range(3))

    def step(x: Tensor) -> Tensor:
        y = first(x)
        return third(F.gelu(second(F.gelu(y)))) * F.silu(y)

    recorder = record(step, torch.randn(64, 16), policy="uniform4")
    test_decode_precedes_its_readers(recorder)
    test_no_matmul_or_convolution_while_a_decode_waits(recorder)
    payloads = [d.args[0] for d in decodes(recorder.after)]
    assert len(payloads) > len(set(payloads))


# --- order and identity ---------------------------------------------------------------------------


def check_order(recorder: Recorder) -> None:
    """What the forward returns is what the backward takes, user outputs and tangents in place."""
    before, after = recorder.before, recorder.after
    count = before.num_outputs
    mine, theirs = output_args(after.forward), output_args(before.forward)
    assert [str(n) for n in mine[:count]] == [str(n) for n in theirs[:count]]
    assert len(set(mine[count:])) == len(mine) - count, "a value is saved twice"

    def tangents(cut: Cut) -> list[str]:
        return [n.name for n in placeholders(cut.backward) if "tangents" in str(n.target)]

    received = placeholders(after.backward)
    assert tangents(after) == tangents(before)
    assert [n.name for n in received[-len(tangents(after)) :]] == tangents(after)
    symbols = [n for n in mine[count:] if torch_private.is_sym_node(n)]  # type: ignore[arg-type]
    tensors = [n for n in mine[count:] if n not in symbols]
    assert mine[count:] == (*tensors, *symbols)
    assert [n.name for n in received[: len(symbols) + len(tensors)]] == [
        n.name  # type: ignore[union-attr]
        for n in (*symbols, *tensors)
    ]
    for sent, taken in zip(tensors, received[len(symbols) :], strict=False):
        a, b = sent.meta["val"], taken.meta["val"]  # type: ignore[union-attr]
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    unchecked = [torch_private.is_unchecked(n) for n in tensors]  # type: ignore[arg-type]
    assert unchecked == sorted(unchecked)
    description = next(iter(after.forward.graph.find_nodes(op="output"))).meta.get("desc")
    assert description is None or len(description) == len(mine)


def test_order_of_outputs_and_placeholders(coded: Recorder) -> None:
    check_order(coded)
    for module in (coded.after.forward, coded.after.backward):
        module.graph.lint()


def test_the_forward_computes_what_it_computed(coded: Recorder) -> None:
    """User outputs are the same expressions of the same placeholders, node by node."""

    def formula(node: Any) -> Any:
        if isinstance(node, fx.Node):
            if node.op == "placeholder":
                return node.name
            return (name_of(node), formula(list(node.args)), formula(sorted(node.kwargs.items())))
        if isinstance(node, (list, tuple)):
            return [formula(n) for n in node]
        return repr(node)

    count = coded.before.num_outputs
    ours, plain = output_args(coded.after.forward), output_args(coded.before.forward)
    for mine, theirs in zip(ours[:count], plain[:count], strict=True):
        assert formula(mine) == formula(theirs)


def test_a_received_value_has_its_name_to_itself() -> None:
    """The backward may compute the same value again, under the same name."""
    forward = fx.symbolic_trace(lambda x: torch.sin(x) + 1)
    backward = fx.symbolic_trace(lambda x: torch.cos(torch.sin(x)))
    (sent,) = (n for n in forward.graph.nodes if n.name == "sin")
    received = receive(backward, sent, placeholders(backward)[0])
    assert received.name == "sin"
    backward.graph.lint()
    backward.recompile()
    x = torch.randn(5)
    assert torch.equal(backward(x, torch.zeros(5)), torch.cos(torch.sin(x)))


def test_one_key_a_step(coded: Recorder) -> None:
    assert len(calls(coded.after.forward, "fxcompress::next_key")) == 1
    assert not calls(coded.after.backward, "fxcompress::next_key")
    lossy = [n for n in encodes(coded.after) if spec_of(n).startswith("affine")]
    streams = [argument(n, "stream") for n in lossy]
    assert len(set(streams)) == len(streams), "two tensors share their noise"


def test_decode_agrees_with_its_encode(coded: Recorder) -> None:
    sent = payloads(coded.after)
    for node in decodes(coded.after):
        encode, spec = sent[argument(node, "payload").name]
        source = argument(encode, "x")
        assert spec_of(node) == spec
        if spec == spec_of(encode):
            assert argument(node, "stream") == argument(encode, "stream")
        assert argument(node, "order") == argument(encode, "order")
        assert list(argument(node, "shape")) == list(source.meta["val"].shape)
        assert node.meta["val"].shape == source.meta["val"].shape
        if name_of(node) == "fxcompress::decode_filled":
            assert sent[argument(node, "mask").name] == (encode, "bits(bits=1)")


# --- what is left alone, and why ------------------------------------------------------------------


def reasons(recorder: Recorder) -> dict[str, str]:
    return {t.name: t.reason for t in recorder.plan.tensors if t.representation == "keep"}


def test_overlapping_views_are_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention output is saved for its own backward and, viewed, for the next matmul."""
    # Inductor would see that this view changes nothing here, and save one of the two.
    monkeypatch.setattr(post_grad, "remove_noop_ops", lambda graph: None)
    recorder = record(Attention(), torch.randn(2, 12, 16, requires_grad=True), policy="uniform4")

    def roots(cut: Cut) -> list[str]:
        found = []
        for saved in cut.saved:
            node = saved.forward
            if name_of(node).startswith("fxcompress::encode"):
                assert isinstance(node.args[0], fx.Node)
                node = node.args[0]
            found.append(storage_root(node).name)
        return found

    attention = [
        n.name
        for n in recorder.before.forward.graph.nodes
        if n.target is operator.getitem and n.args[1] == 0 and "attention" in name_of(n.args[0])  # type: ignore[arg-type]
    ]
    assert len(attention) == 1
    assert roots(recorder.before).count(attention[0]) == 2
    assert roots(recorder.after).count(attention[0]) <= 1


def test_statistics_stay_exact(coded: Recorder) -> None:
    kept = reasons(coded)
    assert [n for n, why in kept.items() if "statistic" in why]
    names = {
        t.name for t in coded.plan.tensors if math.prod(t.shape) <= 24 and t.dtype != "torch.bool"
    }  # type: ignore[arg-type]
    assert names <= kept.keys()


def test_small_tensors_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 64), nn.GELU())
    recorder = record(model, torch.randn(32, 16), policy="uniform4", min_bytes=4096)
    for row in recorder.plan.tensors:
        small = math.prod(row.shape) * 4 < 4096  # type: ignore[arg-type]
        assert (row.representation == "keep") == small
        assert ("smaller than 4096 bytes" in row.reason) == small
    assert {row.representation for row in recorder.plan.tensors} > {"keep"}


def test_integers_of_unknown_range_are_kept() -> None:
    table = nn.Embedding(16, 8)

    def step(tokens: Tensor) -> Tensor:
        return table(tokens * 3 % 16).tanh()

    recorder = record(step, torch.randint(16, (4, 9)), policy="uniform4")
    rows = [t for t in recorder.plan.tensors if t.dtype == "torch.int64"]
    assert [t.representation for t in rows] == ["keep"]
    assert rows[0].reason == "integers of unknown range"


def test_float64_is_kept() -> None:
    recorder = record(
        nn.Sequential(nn.Linear(8, 8), nn.GELU()).double(), torch.randn(9, 8).double()
    )
    assert set(reasons(recorder).values()) == {"dtype float64 has no codec"}
    assert not encodes(recorder.after)


def test_outputs_are_not_coded() -> None:
    def step(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return y, F.gelu(y)

    weight = torch.randn(16, 16, requires_grad=True)
    recorder = record(step, torch.randn(32, 16), weight, policy="uniform4")
    assert set(reasons(recorder).values()) == {"also an output of the forward"}
    assert recorder.plan.saved_bytes == 0  # the user holds it anyway
    assert not encodes(recorder.after)


def test_inputs_and_parameters_are_not_listed(coded: Recorder) -> None:
    inputs = {n.name for n in placeholders(coded.before.forward)}
    saved = {s.name for s in coded.before.saved}
    assert saved & inputs  # weights are saved by plain Inductor too
    assert not {t.name for t in coded.plan.tensors} & inputs


def test_opaque_reader_keeps_its_tensor() -> None:
    """An op we know nothing about might branch on what it reads."""

    @torch.library.custom_op("fxcompress_tests::odd", mutates_args=())
    def odd(gradient: Tensor, x: Tensor) -> Tensor:
        return gradient * (x > 0)

    odd.register_fake(lambda gradient, x: torch.empty_like(gradient))

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return odd(gradient, *ctx.saved_tensors)

    layer = nn.Linear(16, 16)
    recorder = record(lambda x: Odd.apply(layer(x)), torch.randn(64, 16), policy="uniform4")
    assert list(reasons(recorder).values()) == ["odd is not an op we know"]
    assert not encodes(recorder.after)


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda y: F.binary_cross_entropy(y.clamp(0, 1), torch.ones_like(y)), "div has a pole"),
        (lambda y: (y * y).log(), "div has a pole"),
        (lambda y: 1 / (1 + y.exp()), ""),
        (lambda y: F.layer_norm(y, (16,)), ""),
    ],
    ids=["cross_entropy", "log", "logistic", "layer_norm"],
)
def test_what_is_divided_by_is_kept(read: Callable[[Tensor], Tensor], why: str) -> None:
    """Rounded to zero, it would make gradients infinite; a sum or an exponential is none of it."""
    layer = nn.Linear(16, 16)
    recorder = record(lambda x: read(layer(x)), torch.randn(64, 16), policy="uniform4")
    poles = {t.reason for t in recorder.plan.tensors if "pole" in t.reason}
    assert poles == ({why} if why else set())
    if not why:
        assert [e for e in encodes(recorder.after) if spec_of(e).startswith("affine")]


# --- checkpointing --------------------------------------------------------------------------------


def test_checkpointed_regions_are_respected() -> None:
    """A region that the user recomputes is recomputed from an exact tensor."""
    first, inner = nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

    def step(x: Tensor) -> Tensor:
        return checkpoint(inner, F.silu(first(x)), use_reentrant=False)

    recorder = record(step, torch.randn(64, 16), policy="uniform4")
    why = reasons(recorder)
    assert "root of a region checkpointed by the user" in why.values()

    def matmuls(cut: Cut) -> int:
        return sum(len(calls(cut.backward, f"aten::{n}")) for n in ("mm", "addmm"))

    assert matmuls(recorder.after) == matmuls(recorder.before)
    lossy = [d for d in decodes(recorder.after) if spec_of(d).startswith("affine")]
    assert not [n for n in descendants(lossy) if name_of(n) == "aten::addmm"]


def test_must_save_is_respected() -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_matmul = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if is_matmul else CheckpointPolicy.PREFER_RECOMPUTE

    inner = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU())
    first = nn.Linear(16, 32)

    def step(x: Tensor) -> Tensor:
        context = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(inner, first(x), use_reentrant=False, context_fn=context)

    recorder = record(step, torch.randn(64, 16), policy="uniform4")
    marked = [why for why in reasons(recorder).values() if "checkpoint policy" in why]
    assert len(marked) == 2


# --- saved without a version check ----------------------------------------------------------------


class KeptOnContext(torch.autograd.Function):
    """``ctx.x = x``: saved without a version check, last among the saved tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.x = x
        return x * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return gradient * y, gradient * ctx.x


def test_unchecked_tensors_keep_their_slot() -> None:
    first, second, third = (nn.Linear(16, 16) for _ in range(3))

    def step(x: Tensor) -> Tensor:
        return third(F.relu(KeptOnContext.apply(first(x), second(x))))

    recorder = record(step, torch.randn(64, 16), policy="uniform4")
    before = [torch_private.is_unchecked(s.forward) for s in recorder.before.saved]
    assert any(before), "PyTorch no longer marks them: find out how it does now"
    after = [torch_private.is_unchecked(s.forward) for s in recorder.after.saved]
    assert sum(after) == sum(before)
    sent = payloads(recorder.after)
    joined = {name for name, (_, spec) in sent.items() if spec == "bits(bits=1)"}
    assert joined, "no mask joins the version-checked ones"
    assert len([e for e in encodes(recorder.after) if spec_of(e).startswith("affine")]) >= 2
    check_order(recorder)


def test_symbolic_sizes_keep_their_order() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8), nn.ReLU())
    batch = torch.randn(48, 16)
    torch._dynamo.mark_dynamic(batch, 0)
    recorder = record(model, batch, policy="uniform4")
    assert any(torch_private.is_sym_node(n) for n in placeholders(recorder.after.forward))
    assert encodes(recorder.after)
    check_order(recorder)


class Deep(nn.Module):
    """One long chain of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(32)), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(40):
            x = (x * self.scale).sin()
        return self.last(F.normalize(x, dim=-1))


def test_nothing_recurses_along_the_graph() -> None:
    """Python's stack is shorter than a large model's backward."""
    cut = record(Deep(), torch.randn(4, 32)).before
    limit, depth = sys.getrecursionlimit(), len(inspect.stack(0))
    sys.setrecursionlimit(depth + 60)
    try:
        planned = plan_graph(cut, make(policy="uniform8", min_bytes=0, inner="aot_eager"))
    finally:
        sys.setrecursionlimit(limit)
    assert planned.decision is not None
    assert any("affine" in t.representation for t in planned.plan.tensors)
