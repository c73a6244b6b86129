"""Overrides: which tensors a rule is about, what they get, and what is wrong with a rule."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.overrides import Rule, parse
from fxcompress.pipeline import Partitioner
from fxcompress.settings import make


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def planned(*rules: dict[str, Any], model: nn.Module | None = None, **settings: Any) -> Any:
    """Representation by tensor name, after a step."""
    settings = {"policy": "lossless", "inner": "aot_eager", **settings}
    compiled = torch.compile(
        model or Net(), backend=fxcompress.backend(overrides=list(rules), **settings)
    )
    compiled(torch.randn(512, 64)).backward()
    return {t.name: t for t in fxcompress.explain(compiled).tensors}


def changed(*rules: dict[str, Any], **settings: Any) -> dict[str, str]:
    """What the rules change, by tensor: module and representation."""
    before = planned(**settings)
    torch._dynamo.reset()
    after = planned(*rules, **settings)
    return {
        t.module: t.representation
        for name, t in after.items()
        if t.representation != before[name].representation
    }


# --- what a rule matches ------------------------------------------------------------------------


def test_a_module_pattern_matches_every_layer() -> None:
    # Guessed noise of four bits: rotated Lloyd-Max below dither.
    assert changed({"match": "layers.*.up", "bits": 4}) == {
        f"layers.{i}.up": "rotate(bits=4)" for i in range(3)
    }
    torch._dynamo.reset()
    assert set(changed({"match": "layers.1.up", "bits": 4})) == {"layers.1.up"}


@pytest.mark.parametrize(
    "pattern", ["op:addmm", "op:aten.addmm", "op:aten.addmm.default", "op:*mm"]
)
def test_an_operator_pattern(pattern: str) -> None:
    assert set(changed({"match": pattern, "codec": "rotate(bits=3)"})) == {
        f"layers.{i}.up" for i in range(3)
    }


def test_a_tensor_pattern() -> None:
    names = [name for name, t in planned().items() if t.module == "layers.2.up"]
    torch._dynamo.reset()
    found = changed({"match": f"tensor:{names[0]}", "codec": "rotate( bits = 2 )"})
    assert found == {"layers.2.up": "rotate(bits=2)"}


def test_operators_of_several_outputs() -> None:
    """A batch norm's output is an item of what its operator returns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, 1))

    def run(*rules: dict[str, Any]) -> set[str]:
        torch._dynamo.reset()
        compiled = torch.compile(
            model,
            backend=fxcompress.backend(
                policy="uniform8", inner="aot_eager", overrides=list(rules), min_bytes=1024
            ),
        )
        compiled(torch.randn(512, 64)).sum().backward()
        return {
            t.module for t in fxcompress.explain(compiled).tensors if "rotate" in t.representation
        }

    assert run({"match": "module:0", "codec": "rotate(bits=4)"}) == {"0"}


def test_the_last_rule_holds() -> None:
    found = changed(
        {"match": "layers.*", "bits": 2},
        {"match": "layers.1.*", "codec": "affine(bits=8)"},
        {"match": "layers.2.*", "keep": True},
    )
    assert found["layers.0.up"] == "rotate(bits=2)"
    assert found["layers.1.up"] == "affine(bits=8)"
    assert "layers.2.up" not in found


# --- what it gets -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["auto", "uniform8", "gact-l1"])
def test_any_policy_honours_rules(policy: str) -> None:
    tensors = planned(
        {"match": "layers.0.up", "codec": "rotate(bits=1)"},
        {"match": "layers.1.up", "keep": True},
        policy=policy,
    )
    by_module = {t.module: t for t in tensors.values() if t.op == "addmm"}
    assert by_module["layers.0.up"].representation == "rotate(bits=1)"
    assert by_module["layers.1.up"].representation == "keep"
    assert by_module["layers.2.up"].representation not in {"keep", "rotate(bits=1)"}
    assert by_module["layers.0.up"].reason == "by the override for layers.0.up"


def test_the_solver_pays_for_what_is_kept_elsewhere() -> None:
    free = planned(policy="auto", ratio_saved=8)
    kept = next(t for t in free.values() if t.module == "layers.0.up")
    assert kept.representation != "keep"
    torch._dynamo.reset()
    ruled = planned({"match": "layers.0.up", "keep": True}, policy="auto", ratio_saved=4)
    before = sum(t.storage_bytes for t in ruled.values())
    assert ruled[kept.name].representation == "keep"
    assert sum(t.bytes_after for t in ruled.values()) <= before / 4


def test_rules_hold_within_a_generous_budget() -> None:
    tensors = planned({"match": "layers.1.up", "bits": 4}, policy="auto", budget_mb=1000)
    coded = [t for t in tensors.values() if t.representation not in {"keep", "recompute"}]
    assert [t.module for t in coded] == ["layers.1.up"]


def test_gradients_are_those_of_the_rule() -> None:
    x = torch.randn(512, 64)
    gradients = []
    for settings in (
        {"policy": "uniform4"},
        {"policy": "lossless", "overrides": [{"match": "*", "codec": "affine(bits=4)"}]},
    ):
        torch._dynamo.reset()
        fxcompress.manual_seed(7)
        model = Net()
        torch.compile(model, backend=fxcompress.backend(inner="aot_eager", **settings))(
            x
        ).backward()
        gradients.append([p.grad for p in model.parameters()])
    fxcompress.manual_seed(None)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bits_below_what_a_reader_bears_are_raised() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p.view(4, 64, 2, 16).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v).sum()

    compiled = torch.compile(
        Attention(),
        backend=fxcompress.backend(
            policy="lossless", inner="aot_eager", overrides=[{"match": "*", "bits": 2}]
        ),
    )
    compiled(torch.randn(4, 64, 32)).backward()
    tensors = fxcompress.explain(compiled).tensors
    coded = [t for t in tensors if t.representation.startswith(("affine", "dither", "rotate"))]
    assert coded
    for tensor in coded:
        assert tensor.reason == (
            "by the override for *"
            if tensor.representation == "rotate(bits=2)"
            else "an exponential reads it"
        )


def test_views_of_one_buffer_stay_together(caplog: pytest.LogCaptureFixture) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 128)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.layer(x).view(2, 256, 128).unbind(0)
            return (F.silu(left) @ F.silu(right).T).sum()

    names = [n for n, t in planned(model=Views()).items() if t.op == "getitem"]
    assert len(names) == 2
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "fxcompress"):
        tensors = planned(
            {"match": f"tensor:{names[0]}", "keep": True},
            {"match": f"tensor:{names[1]}", "bits": 4},
            model=Views(),
            policy="auto",
            ratio_saved=1,
        )
    assert {tensors[name].representation for name in names} == {"keep"}
    assert f"shares its memory with {names[0]}" in caplog.text


# --- rules that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "remedy"),
    [
        ([{"bits": 4}], "match is missing"),
        ([{"match": "", "bits": 4}], "layers.*.act"),
        ([{"match": "a"}], "exactly one of bits, codec, keep=True"),
        ([{"match": "a", "bits": 4, "keep": True}], "exactly one"),
        ([{"match": "a", "keep": False}], "exactly one"),
        ([{"match": "a", "width": 4}], "known: match, bits, codec, keep, representation"),
        ([{"match": "a", "bits": 0}], "above 0"),
        ([{"match": "a", "bits": True}], "above 0"),
        ([{"match": "a", "bits": "4"}], "above 0"),
        ([{"match": "a", "keep": "yes"}], "keep is True or absent"),
        ([{"match": "a", "codec": 4}], "rotate(bits=2)"),
        (["a"], "is not a rule"),
        (3, "is not a list"),
        ("[{", "not JSON"),
    ],
    ids=str,
)
def test_bad_rules(rules: Any, remedy: str) -> None:
    with pytest.raises(fxcompress.SettingsError) as caught:
        fxcompress.backend(overrides=rules)
    assert remedy in str(caught.value)


def test_bad_codec() -> None:
    with pytest.raises(fxcompress.CodecError, match="unknown codec 'zip'"):
        fxcompress.backend(overrides=[{"match": "a", "codec": "zip"}])


def test_fewer_bits_than_any_codec_has() -> None:
    with pytest.raises(
        fxcompress.SettingsError, match=r"no codec of 0.001 bits or less; the fewes"
    ):
        planned({"match": "layers.0.up", "bits": 0.001})


def test_a_rule_without_a_match_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fxcompress"):
        planned({"match": "layer.1.up", "bits": 4}, {"match": "layers.0.up", "bits": 4})
    assert "'layer.1.up'" in caplog.text
    assert "close: layers.1.up" in caplog.text
    assert "'layers.0.up'" not in caplog.text


# --- where rules come from, and the cache key ---------------------------------------------------


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"match": "layers.*", "bits": 4}, {"match": "op:mul", "keep": True}]
    monkeypatch.setenv("FXCOMPRESS_OVERRIDES", json.dumps(rules))
    assert make().overrides == parse(rules)
    monkeypatch.setenv("FXCOMPRESS_OVERRIDES", '[{"match": "a", "width": 4}]')
    with pytest.raises(fxcompress.SettingsError, match="unknown key 'width'"):
        make()


def test_options_of_the_named_backend() -> None:
    compiled = torch.compile(
        Net(),
        backend="fxcompress",
        options={
            "policy": "lossless",
            "inner": "aot_eager",
            "overrides": [{"match": "layers.0.up", "codec": "rotate(bits=2)"}],
        },
    )
    compiled(torch.randn(512, 64)).backward()
    found = {t.representation for t in fxcompress.explain(compiled).tensors}
    assert "rotate(bits=2)" in found


def test_the_key_covers_rules() -> None:
    def key(*rules: dict[str, Any]) -> str:
        return Partitioner(make(policy="auto", overrides=rules)).uuid()

    first, second = {"match": "a", "bits": 4}, {"match": "b", "keep": True}
    keys = [key(), key(first), key(second), key(first, second), key(second, first)]
    keys.append(key({"match": "a", "bits": 5}))
    assert len(set(keys)) == len(keys)
    assert key(dict(first)) == key(first) == Partitioner(make(overrides=[Rule("a", 4)])).uuid()
