"""Planning ahead: the curve of memory against noise, and the largest batch for a budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.tools.memory import measure_step


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Deep(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.second = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.second(x).square().mean()


def batch(rows: int = 1024) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))


def compiled_peak(rows: int, broken: bool = False, **settings: object) -> int:
    """Planned peak of a real compile; raises what it raises."""
    torch._dynamo.reset()
    compiled = torch.compile(
        Deep(broken), backend=fxcompress.backend(**{"inner": "aot_eager", **settings})
    )
    compiled(batch(rows)).backward()
    return fxcompress.explain(compiled).planned_peak_bytes


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "two graphs"])
def test_a_curve(broken: bool) -> None:
    model = Deep(broken)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibration = fxcompress.calibrate(Deep(broken), batch(256), loss=lambda loss: loss)
    curve = fxcompress.pareto(model, batch(), points=4, calibration=calibration, inner="aot_eager")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert len(curve) == 4 or broken
    peaks, noise = [p.peak_bytes for p in curve], [p.variance for p in curve]
    assert peaks == sorted(peaks)
    assert noise == sorted(noise, reverse=True)
    assert noise[0] > 0 == noise[-1]
    assert curve[0].overhead > 0 == curve[-1].overhead
    assert curve[-1].plan.saved_bytes_before >= curve[-1].saved_bytes > curve[0].saved_bytes
    # What was planned ahead is what a compile does.
    assert compiled_peak(1024, broken, plan=curve[1].plan) == peaks[1]
    assert compiled_peak(1024, broken, policy="auto", budget_mb=1000) == peaks[-1]


def test_a_curve_calibrates_by_itself() -> None:
    curve = fxcompress.pareto(Deep(), batch(), points=2, loss=lambda loss: loss)
    assert curve[0].plan.calibrated
    assert curve[0].variance > 0


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({"points": 1}, "2 or more"), ({"budget_mb": 3}, "its own bounds"), ({"size": 3}, "unknown")],
    ids=str,
)
def test_bad_curves(settings: dict[str, object], remedy: str) -> None:
    with pytest.raises(fxcompress.SettingsError, match=remedy):
        fxcompress.pareto(Deep(), batch(64), loss=lambda loss: loss, **settings)


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "two graphs"])
def test_the_largest_batch_fits_and_no_larger_one(broken: bool) -> None:
    largest = 0
    # What an early graph saves depends on its noise: both go by the same measurements.
    calibration = fxcompress.calibrate(Deep(broken), batch(64), loss=lambda loss: loss)
    settings = {"budget_mb": 3.0, "inner": "aot_eager", "calibration": calibration}

    def ask() -> None:
        nonlocal largest
        largest = fxcompress.max_batch(Deep(broken), batch(64), **settings)

    parameters = list(Deep().parameters())
    assert measure_step(ask, parameters).peak_bytes < 0.2 * 3e6, "a batch was allocated"
    assert largest > 64
    compiled_peak(largest, broken, **settings)
    with pytest.raises(fxcompress.BudgetError):
        compiled_peak(largest + 8, broken, **settings)


def test_no_batch_fits() -> None:
    with pytest.raises(fxcompress.BudgetError) as caught:
        fxcompress.max_batch(Deep(), batch(64), 1e-4)
    assert caught.value.smallest_mb is not None
    assert caught.value.smallest_mb > 1e-4


def test_models_that_need_data() -> None:
    class Branching(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sum() if bool(x.sum() > 0) else self.second(x).sum()

    with pytest.raises(fxcompress.FxCompressError, match="cannot be traced without data"):
        fxcompress.max_batch(Branching(), batch(64), 3.0)


def test_nothing_to_train() -> None:
    model = Deep().requires_grad_(False)
    with pytest.raises(fxcompress.FxCompressError, match="no parameter of the model requires"):
        fxcompress.max_batch(model, batch(64), 3.0)


def test_a_batch_without_a_size() -> None:
    with pytest.raises(fxcompress.SettingsError, match="first size"):
        fxcompress.max_batch(Deep(), {}, 3.0)
