"""Calibration: what is measured is what happens; nothing else changes; files that are damaged."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import Calibration, calibrate, report, rng
from fxcompress.calibrate import evidence_of
from fxcompress.choose import codable_choice, exact_choice, is_codable
from fxcompress.codecs import codec, states
from fxcompress.errors import FxCompressError
from fxcompress.evidence import GraphEvidence, Price, TensorEvidence, signature
from fxcompress.fit import at_rate, fit
from fxcompress.ladder import specs
from fxcompress.passes.analyse import analyse
from fxcompress.passes.rewrite import rewrite
from fxcompress.record import Recorder, Recording, gradients


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graphs of other tests; states apart from the user's."""
    monkeypatch.setattr(states, "_path", lambda name: tmp_path / f"state-{name}.npz")
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 48),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(48, 10),
    )


def images(batch: int = 8) -> Tensor:
    return torch.randn(batch, 3, 16, 16)


def recorded(model: nn.Module, x: Tensor) -> Recording:
    recorder = Recorder(0)
    torch.compile(model, backend=recorder)(x).square().sum().backward()
    (found,) = recorder.recordings()
    return found


@pytest.fixture(scope="module")
def measured() -> tuple[Recording, Mapping[str, TensorEvidence]]:
    """A recorded step and its evidence."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    recording = recorded(network(), images())
    evidence = evidence_of([recording], probes=4).of(signature(recording.cut))
    assert evidence is not None
    return recording, evidence


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


# ---- what is measured ----


@pytest.mark.parametrize("spec", ["affine(bits=4)", "dither(bits=4)", "rotate(bits=3)"])
def test_prices_add_up_to_the_measured_noise(
    measured: tuple[Recording, Mapping[str, TensorEvidence]], spec: str
) -> None:
    recording, evidence = measured
    cut = recording.cut.copy()
    candidates = analyse(cut, 0, channels_last=recording.channels_last)
    choices = [codable_choice(c, spec) if is_codable(c) else exact_choice(c) for c in candidates]
    predicted = sum(
        evidence[c.candidate.name].prices[spec].variance
        for c in choices
        if c.representation == spec
    )
    rewritten = rewrite(cut, choices, "", channels_last=recording.channels_last)
    exact = flat(gradients(recording, recording.cut))
    rng.manual_seed(1)
    errors = torch.stack([flat(gradients(recording, rewritten)) - exact for _ in range(40)])
    rng.manual_seed(None)
    found = float(errors.square().sum(1).mean() / exact.square().sum())
    assert predicted == pytest.approx(found, rel=0.2)
    assert predicted > 1e-5
    bias = float(errors.mean(0).square().sum() / exact.square().sum())
    assert bias < 3 * found / 40


def test_every_rung_of_every_codable_tensor_is_priced(
    measured: tuple[Recording, Mapping[str, TensorEvidence]],
) -> None:
    recording, evidence = measured
    assert set(evidence) == {c.name for c in recording.candidates if is_codable(c)}
    for found in evidence.values():
        assert set(found.prices) >= set(specs())
        for family, widths in (("affine", range(1, 9)), ("rotate", range(1, 6))):
            noise = [found.prices[codec(f"{family}(bits={b})").spec].variance for b in widths]
            assert noise == sorted(noise, reverse=True)
        assert all(price.bias == 0 for spec, price in found.prices.items() if codec(spec).unbiased)
        assert found.norm_price > 0
        for spec in found.transforms.values():
            assert spec in found.prices


def test_layers_report_their_gradients_and_ranges() -> None:
    model, x = nn.Sequential(nn.Linear(40, 60), nn.GELU(), nn.Linear(60, 7)), torch.randn(9, 40)
    evidence = evidence_of([recorded(copy.deepcopy(model), x)]).graphs[0].tensors
    hidden = model[0](x)
    y = model[2](torch.nn.functional.gelu(hidden))
    (gradient,) = torch.autograd.grad(y.square().sum(), y)
    (found,) = evidence.values()  # the GELU's input; its output is rebuilt from it
    assert found.grad_square == pytest.approx(float(gradient.square().sum()) / 9, rel=1e-4)
    spans = (hidden.amax(1) - hidden.amin(1)).square()
    assert found.sample_ranges == pytest.approx(spans.tolist(), rel=1e-4)


def test_a_smaller_batch_calibrates_the_graph_that_is_trained() -> None:
    model = network()
    calibration = calibrate(model, images(4), images(4), min_bytes=0)
    trained = recorded(copy.deepcopy(model), images(16))  # Dynamo has seen both sizes by now
    assert calibration.of(signature(trained.cut)) is not None
    other = recorded(nn.Sequential(model, nn.Tanh()), images(16))
    assert calibration.of(signature(other.cut)) is None


def test_prices_hold_on_the_next_batch() -> None:
    model, first, second = network(), images(), images()
    one, other = calibrate(model, first, min_bytes=0), calibrate(model, second, min_bytes=0)
    total = [
        sum(t.prices["affine(bits=4)"].variance for t in c.graphs[0].tensors.values())
        for c in (one, other)
    ]
    assert total[0] == pytest.approx(total[1], rel=0.5)
    both = calibrate(model, first, second, min_bytes=0)
    assert both.batches == 2


# ---- what is left alone ----


def test_model_and_random_state_are_left_alone() -> None:
    model, x = network(), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    calibrate(model, x, min_bytes=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_batches_may_be_tuples_and_dicts() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.inner(x)) + y)

    x, y = torch.randn(2, 64, 32)
    found = [
        calibrate(Add(), batch, min_bytes=0, loss=torch.sum) for batch in ((x, y), {"x": x, "y": y})
    ]
    assert found[0].graphs[0].signature == found[1].graphs[0].signature


class Cast(nn.Module):
    """Under autocast the backward converts dtypes, by an op that has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 7))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x).float()


class Dropped(nn.Module):
    """With dropout inside, attention is written out; its softmax' backward has a fused product."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).view(2, -1, 2, 24).transpose(1, 2).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(*parts, dropout_p=0.1)


@pytest.mark.parametrize("model", [Cast, Dropped])
def test_ops_without_a_derivative_are_differentiated(model: type[nn.Module]) -> None:
    (graph,) = calibrate(model(), torch.randn(32, 16), min_bytes=0).graphs
    prices = [p.variance for t in graph.tensors.values() for p in t.prices.values()]
    assert max(prices) > 0


@pytest.mark.parametrize(
    ("model", "batches", "remedy"),
    [
        (nn.Linear(4, 4).requires_grad_(False), [torch.randn(2, 4)], "requires a gradient"),
        (nn.Linear(4, 4), [], r"calibrate\(model, batch\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), [torch.randn(2, 4)], ""),
    ],
)
def test_what_cannot_be_calibrated(model: nn.Module, batches: list[Tensor], remedy: str) -> None:
    if remedy:
        with pytest.raises(FxCompressError, match=remedy):
            calibrate(model, *batches)
    else:
        assert calibrate(model, *batches).graphs  # nothing worth coding, but no error


def test_a_loss_is_asked_for_where_none_follows() -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).argmax(-1)

    with pytest.raises(FxCompressError, match="pass loss="):
        calibrate(Labels(), torch.randn(2, 4))


# ---- files ----


def test_saved_and_loaded_with_its_states(tmp_path: Path) -> None:
    calibration = calibrate(network(), images(), min_bytes=0)
    path = tmp_path / "calibration.json"
    calibration.save(path)
    specs_of = [s for t in calibration.graphs[0].tensors.values() for s in t.transforms.values()]
    assert specs_of
    found = codec(specs_of[0])
    names = (found.basis, found.rates)  # type: ignore[attr-defined]
    for name in names:  # as on another machine
        (tmp_path / f"state-{name}.npz").unlink(missing_ok=True)
        states._states.pop(name)
    loaded = Calibration.load(path)
    assert loaded == calibration
    assert loaded.key() == calibration.key()
    assert all(states.arrays(name) for name in names)
    changed = replace(calibration, weighting="relative")
    assert changed.key() != calibration.key()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    calibration = calibrate(nn.Sequential(nn.Linear(32, 64), nn.Tanh()), torch.randn(64, 32))
    text = calibration.to_json()
    path = tmp_path / "calibration.json"
    data = json.loads(text)
    without = {k: v for k, v in data.items() if k != "graphs"}
    broken = {**data, "states": {"0" * 16: "bm90IGEgc3RhdGU="}}
    for content in (
        "",
        "{}",
        "[]",
        text[: len(text) // 2],
        json.dumps(without),
        json.dumps(broken),
    ):
        path.write_text(content)
        with pytest.raises(FxCompressError):
            Calibration.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FxCompressError, match="not a calibration file"):
        Calibration.load(path)
    path.write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(FxCompressError, match="another version"):
        Calibration.load(path)
    with pytest.raises(FxCompressError, match="there is no calibration"):
        Calibration.load(tmp_path / "nowhere.json")
    with pytest.raises(FxCompressError):
        fxcompress.backend(calibration=str(tmp_path / "nowhere.json"))


def test_a_biased_transform_is_fitted_in_mid_compile() -> None:
    """Where tensors are fake; it used to be left as plain Inductor."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    x = torch.randn(1024, 16)
    calibration = fxcompress.calibrate(model, x, min_bytes=1024)
    backend = fxcompress.backend(
        policy="transform(bits=1,unbiased=False)",
        calibration=calibration,
        inner="aot_eager",
        min_bytes=1024,
    )
    compiled = torch.compile(model, backend=backend)
    compiled(x).square().sum().backward()
    found = [t.representation for t in fxcompress.explain(compiled).tensors]
    transforms = [codec(spec) for spec in found if spec.startswith("transform")]
    assert transforms
    assert not any(c.unbiased for c in transforms)


def test_a_softmax_between_products_is_priced() -> None:
    """Its backward multiplies and adds by an operator of Inductor's that has no derivative."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = nn.Linear(32, 64), nn.Linear(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x).softmax(-1) * self.value(x)

    torch.manual_seed(0)
    recording = recorded(Mixed(), torch.randn(128, 32))
    assert any("fma" in str(n.target) for n in recording.cut.backward.graph.nodes)
    (found,) = evidence_of([recording]).graphs
    prices = [p for evidence in found.tensors.values() for p in evidence.prices.values()]
    assert prices
    assert max(p.variance for p in prices) > 0


# ---- where there is no derivative ----


class Bessel(torch.autograd.Function):
    """J₀, whose derivative is an operator of which PyTorch knows no derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -gradient * torch.special.bessel_j1(x)


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(24, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        with torch.no_grad():
            self.middle.weight *= 4  # to where J₀ has bends

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.first(x))
        return self.last(Bessel.apply(self.middle(hidden)))


@torch.library.custom_op("fxcompress_tests::wave", mutates_args=())
def wave(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("fxcompress_tests::wave_backward", mutates_args=())
def wave_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * x.cos()


@torch.library.custom_op("fxcompress_tests::slope", mutates_args=())
def slope(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * x.cos()


def _backward_of_slope(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    given, x = ctx.saved_tensors
    return gradient * x.cos(), -gradient * given * x.sin()


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


for _op in (wave, wave_backward, slope):
    _op.register_fake(lambda x, *others: torch.empty_like(x))
slope.register_autograd(_backward_of_slope, setup_context=_save)


class Waving(nn.Module):
    """An operator of the user's; its gradient, an operator too, passes the errors of a SiLU on."""

    def __init__(self, backward: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 64), nn.Linear(64, 64), nn.Linear(64, 8)])
        wave.register_autograd(lambda ctx, g: backward(g, *ctx.saved_tensors), setup_context=_save)

    def forward(self, x: Tensor) -> Tensor:
        first, middle, last = self.layers
        return last(torch.nn.functional.silu(middle(wave(first(x)))))


OF_PYTORCH = pytest.mark.skipif(torch.__version__ >= "2.15", reason="PyTorch derives J₁ now")


@pytest.mark.parametrize(
    ("model", "without"),
    [
        pytest.param(Waves, 1, id="PyTorch's", marks=OF_PYTORCH),
        pytest.param(lambda: Waving(wave_backward), 1, id="a user's"),
        pytest.param(lambda: Waving(slope), 0, id="a user's with a derivative"),
    ],
)
def test_operators_without_derivative_are_passed_by_trial(
    model: Callable[[], nn.Module], without: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What leads to one is priced as its errors turn out; the others as ever."""
    recording = recorded(model(), torch.randn(96, 24))
    with caplog.at_level(logging.INFO, "fxcompress"):
        evidence = evidence_of([recording], probes=2).of(signature(recording.cut))
    assert evidence is not None
    perturbed = {r.args[0] for r in caplog.records if "backward passes" in r.message}
    spec = "affine(bits=4)"
    exact = flat(gradients(recording, recording.cut))
    for name, found in evidence.items():
        cut = recording.cut.copy()
        candidates = analyse(cut, 0, channels_last=recording.channels_last)
        choices = [
            codable_choice(c, spec) if c.name == name else exact_choice(c) for c in candidates
        ]
        rewritten = rewrite(cut, choices, "", channels_last=recording.channels_last)
        rng.manual_seed(1)
        errors = [flat(gradients(recording, rewritten)) - exact for _ in range(20)]
        rng.manual_seed(None)
        measured = sum(float(e.square().sum()) for e in errors) / 20 / float(exact.square().sum())
        assert found.prices[spec].variance == pytest.approx(measured, rel=0.35), name
    assert len(perturbed) == without
    assert evidence


def test_a_budget_without_room_to_calibrate_is_found_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The smallest part of the batch is two samples: an eighth, whose derivatives take too much."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(64, 64), nn.SiLU())]
    model, x = nn.Sequential(*layers), torch.randn(16, 256, 64)
    messages = []
    for _ in range(2):
        torch._dynamo.reset()
        caplog.clear()
        backend = fxcompress.backend(budget_mb=7.0, inner="aot_eager")
        with caplog.at_level("INFO", logger="fxcompress"):
            torch.compile(model, backend=backend)(x).square().mean().backward()
        messages.append(caplog.text)
        assert not backend.plan().calibrated
    assert "leaves no room to calibrate" in messages[0]
    assert "leaves no room to calibrate" not in messages[1]


def test_a_kept_calibration_is_of_use_while_its_states_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names them, and a whole one, for another machine, holds them."""
    monkeypatch.setattr(states, "_path", lambda name: tmp_path / f"state-{name}.npz")
    monkeypatch.setattr(report, "_path", lambda name: tmp_path / f"{name}.json")
    x = torch.randn(256, 32)
    fitted = at_rate(fit(x, [torch.randn_like(x)], -1), 1.0)
    evidence = TensorEvidence({fitted.spec: Price(0.1)}, {1.0: fitted.spec})
    made = Calibration((GraphEvidence("graph", {"x": evidence}),))
    report.remember_calibration("g", made)
    for name in (fitted.basis, fitted.rates):
        states._states.pop(name)  # as in a later process
    assert report.recall_calibration("g") == made
    whole = made.to_json()
    (tmp_path / f"state-{fitted.basis}.npz").unlink()
    states._states.pop(fitted.basis)
    assert report.recall_calibration("g") is None
    assert Calibration.from_json(whole) == made
    assert report.recall_calibration("g") == made
