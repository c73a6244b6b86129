"""Plans made again in training: bases renewed, graphs compiled anew, nothing in flight lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_checks import step_key
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import Calibration, replan
from fxcompress.automatic import slices_of_batch
from fxcompress.codecs import codec, states
from fxcompress.codecs.transform import Transform
from fxcompress.errors import CodecError, SettingsError
from fxcompress.evidence import GraphEvidence, TensorEvidence
from fxcompress.fit import at_rate, basis_of, fit, renew
from fxcompress.moments import moments, together

SHAPE = (64, 24)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """States, plans and calibrations of these tests are kept apart from the user's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def low_rank(seed: int, rows: int = SHAPE[0]) -> Tensor:
    """Values in four directions of their own for each seed, and a little noise."""
    torch.manual_seed(seed)
    directions = torch.randn(4, SHAPE[1])
    return torch.randn(rows, 4) @ directions + 0.05 * torch.randn(rows, SHAPE[1]) + seed


def fitted(x: Tensor, bits: float = 2.0) -> Transform:
    return at_rate(fit(x, [torch.randn_like(x)], -1), bits)


def error(c: Transform, x: Tensor) -> float:
    payload = c.encode(x, step_key(), 0)
    decoded = c.decode(payload, x.shape, x.dtype, step_key(), 0)
    return float((decoded - x).norm() / x.norm())


# ---- states ----


@pytest.mark.parametrize("is_prepared", [False, True])
def test_what_was_encoded_before_is_decoded_by_the_basis_of_then(is_prepared: bool) -> None:
    old, new = low_rank(1, 600), low_rank(2, 600)
    c = fitted(old)
    if is_prepared:
        states.renewable(c.basis, torch.device("cpu"))
    payload = c.encode(old, step_key(), 0)
    before = c.decode(payload, old.shape, old.dtype, step_key(), 0)
    stale = error(c, new)
    renew(c, moments(new, [torch.randn_like(new)], -1))
    assert torch.equal(c.decode(payload, old.shape, old.dtype, step_key(), 0), before)
    assert error(c, new) < 0.3 * stale
    renew(c, moments(old, [torch.randn_like(new)], -1))
    # Two renewals later the arrays are gone: wrong numbers would go unnoticed, these do not.
    assert c.decode(payload, old.shape, old.dtype, step_key(), 0).isnan().all()


def test_a_renewed_state_is_saved_under_a_name_of_its_own() -> None:
    x = low_rank(1)
    c = fitted(x)
    renew(c, moments(low_rank(2), [torch.randn(SHAPE)], -1))
    evidence = TensorEvidence(transforms={2.0: c.spec})
    text = Calibration((GraphEvidence("graph", {"x": evidence}),)).to_json()
    now = states.arrays(c.basis)
    loaded = Calibration.from_json(text).of("graph")
    assert loaded is not None
    found = codec(loaded["x"].transforms[2.0])
    assert isinstance(found, Transform)
    assert found.basis != c.basis
    assert all((states.arrays(found.basis)[k] == v).all() for k, v in now.items())


def test_a_state_of_other_shapes_is_refused() -> None:
    c = fitted(low_rank(1))
    with pytest.raises(CodecError, match="other shapes"):
        states.renew(c.basis, {"mean": torch.zeros(3)})


def test_moments_of_two_batches_are_those_of_both() -> None:
    """Means far apart, too: the covariance is around the common one."""
    a, b = low_rank(1).view(4, 16, -1), low_rank(20, 128).view(8, 16, -1)
    w = torch.randn(12, 16, SHAPE[1])
    apart = together(moments(a, [w[:4]], -1), moments(b, [w[4:]], -1))
    whole = moments(torch.cat([a, b]), [w], -1)
    torch.testing.assert_close(apart.mean, whole.mean)
    assert apart.positions == whole.positions
    for sides, values in whole.values.items():
        torch.testing.assert_close(apart.values[sides], values, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(apart.weights[sides], whole.weights[sides], rtol=1e-4, atol=1e-3)
    energies = [states.arrays(basis_of(m).basis)["energy"] for m in (apart, whole)]
    assert (abs(energies[0] - energies[1]) <= 1e-3 * energies[1].max()).all()


# ---- training ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(24, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def compiled(**settings: Any) -> tuple[nn.Module, Any]:
    model = Net()
    settings = {"policy": "transform4", "min_bytes": 256, "inner": "aot_eager", **settings}
    return model, torch.compile(model, backend=fxcompress.backend(**settings))


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def batch(seed: int) -> Tensor:
    return low_rank(seed, 256)


def basis_of_first(found: fxcompress.Plan) -> str:
    specs = [t.representation for t in found.tensors if "transform" in t.representation]
    c = codec(specs[0])
    assert isinstance(c, Transform)
    return c.basis


def test_bases_follow_the_data_and_gradients_in_flight_are_right() -> None:
    model, run = compiled(replan_every=2)
    exact = copy.deepcopy(model)
    for step in range(1, 3):
        gradient(model, run(batch(step)).square().sum())
    basis = basis_of_first(fxcompress.explain(run))
    assert states.current_name(basis) == basis
    losses = []
    for step in range(3, 6):  # renewed before steps 3 and 5; all three backwards are still to come
        losses.append(run(batch(step)).square().sum())
    assert states.current_name(basis) != basis
    for step, loss in zip(range(4, 6), losses[1:], strict=True):
        expected = gradient(exact, exact(batch(step)).square().sum())
        found = gradient(model, loss)
        assert float((found - expected).norm() / expected.norm()) < 0.1
    assert gradient(model, losses[0]).isfinite().all()  # renewed once since: its basis is held


def test_a_graph_is_compiled_anew_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replan, "WORTH", 1e9)  # any plan will do
    model, run = compiled(policy="auto", ratio_saved=8, replan_every=2)
    exact = copy.deepcopy(model)
    plans = []
    for step in range(1, 4):
        expected = gradient(exact, exact(batch(step)).square().sum())
        found = gradient(model, run(batch(step)).square().sum())
        assert float((found - expected).norm() / expected.norm()) < 0.5
        plans.append(fxcompress.explain(run))
    assert plans[0].key() == plans[1].key() != plans[2].key()
    assert len(plans[2].tensors) == len(plans[0].tensors)  # in its place, not beside it
    assert plans[2].calibrated


def test_what_cannot_be_measured_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, run = compiled(replan_every=1)
    gradient(model, run(batch(1)).square().sum())
    key = fxcompress.explain(run).key()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(replan, "measured_on", broken)
    assert gradient(model, run(batch(2)).square().sum()).isfinite().all()
    assert "not planned again: no room" in caplog.text
    assert fxcompress.explain(run).key() == key


def test_what_only_the_whole_batch_saves_keeps_its_measurements() -> None:
    def calibration(scatter: float | None, **elements: int) -> Calibration:
        tensors = {name: TensorEvidence(elements=n) for name, n in elements.items()}
        return Calibration((GraphEvidence("graph", tensors),), scatter=scatter)

    completed = replan._completed(calibration(None, a=1, c=3), calibration(0.5, a=10, b=20))
    assert completed == calibration(0.5, a=1, b=20, c=3)
    assert replan._completed(completed, None) is completed
    other = Calibration((GraphEvidence("another graph", {"a": TensorEvidence()}),))
    assert replan._completed(other, completed).graphs == other.graphs


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(SettingsError, match="1 step or more"):
        fxcompress.backend(policy="transform2", replan_every=0)
    for settings in ({"policy": "uniform4"}, {"policy": "auto"}):
        with pytest.raises(SettingsError, match="no measurements"):
            fxcompress.backend(replan_every=10, **settings)


# ---- parts of a batch ----


class Heads(nn.Module):
    """Sizes that are multiples of the batch: 64 positions, heads of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(64, 64))
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        positions = self.position[torch.arange(t)]
        y = (x + positions).view(b, t, 2, c // 2).transpose(1, 2)
        y = (y @ y.mT).softmax(-1) @ y
        z: Tensor = self.out(y.transpose(1, 2).reshape(b * t, c)).view(b, t, c)
        return z


def test_other_sizes_may_be_multiples_of_the_batch() -> None:
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(module: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        graphs.append((module, inputs))
        return module

    model, x = Heads(), torch.randn(16, 64, 64)
    expected = torch.compile(model, backend=keep)(x)
    ((module, inputs),) = graphs
    slices = slices_of_batch(module, inputs, 4, most=4)
    assert slices is not None
    parts = [slices.graph(*arguments)[0] for arguments in slices.arguments]
    torch.testing.assert_close(torch.cat(parts), expected)
