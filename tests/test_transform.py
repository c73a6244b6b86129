"""transform: fitted bases, bytes, stated effect against the measured one, states that are lost."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_checks import FLOATS, check_noise, round_trip, step_key
from torch import Tensor
from torch.nn.functional import interpolate

from fxcompress.codecs import Average, Frequency, codec, states
from fxcompress.codecs.rotate import Rotate
from fxcompress.codecs.transform import RATES, Transform, _energies, coder
from fxcompress.errors import CodecError
from fxcompress.fit import Fitted, _errors, _true_rates, at_rate, fit, staleness
from fxcompress.tools.memory import measure_step

SHAPE = (6, 16, 16, 24)  # storage order, channels last


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of these tests are kept apart from the user's."""
    monkeypatch.setattr(states, "_path", lambda name: tmp_path / f"state-{name}.npz")


def correlated(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Smooth over space, 6 directions strong among the channels, each channel with its mean."""
    fixed = torch.Generator().manual_seed(7)
    mixing = torch.randn(6, shape[-1], generator=fixed) * torch.logspace(0.5, -0.5, 6)[:, None]
    mean = 2 * torch.randn(shape[-1], generator=fixed)
    torch.manual_seed(seed)
    n, h, w, c = shape
    coarse = torch.randn(n, 6, h // 4, w // 4)
    smooth = interpolate(coarse, (h, w), mode="bilinear") + 0.2 * torch.randn(n, 6, h, w)
    return (smooth.permute(0, 2, 3, 1) @ mixing + 0.1 * torch.randn(n, h, w, c) + mean).contiguous()


def covector(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Reads channels unevenly, as a gradient does."""
    torch.manual_seed(seed)
    return torch.randn(shape) * torch.linspace(0.2, 2, shape[-1])


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit(correlated(0), [covector(1), covector(2)], -1)


def by_hand(rates: Tensor, sides: tuple[int, int] = (4, 4), channels: int = 24) -> Transform:
    """No mean, no channel basis: only the Walsh-Hadamard transform over space."""
    identity = torch.eye(channels)[None]
    basis = states.put(
        {
            "mean": torch.zeros(channels),
            "running": torch.tensor([False]),
            "positions": torch.tensor([SHAPE[0] * SHAPE[1] * SHAPE[2]]),
            "energy": torch.ones(len(rates), dtype=torch.float64),
            # So different that they, not energies, decide which band has which rate.
            "weight": 10.0 ** (6 * rates.double()),
            "sides": torch.tensor(sides),
            "analysis": identity,
            "synthesis": identity,
        }
    )
    ranked = rates.sort(descending=True).values.to(torch.uint8)
    return Transform(basis, states.put({"rates": ranked}), -1)


# ---- fitted ----


def test_forward_and_backward_are_inverse(fitted: Fitted) -> None:
    c, x, w = at_rate(fitted, 2.0), correlated(3), covector(4)
    z = c.forward(x)
    assert z.shape == (c._bands(), x.numel() // c._bands())
    mean = x.mean((0, 1, 2)).bfloat16().float()
    assert torch.allclose(c._backward(z.clone(), x.shape) + mean, x, atol=1e-4)
    centred = x - mean
    expected = float((w * centred).sum())
    assert float((c.adjoint(w) * z).sum()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bits", [6.0, 3.0, 1.5, 0.5, 0.25])
def test_bytes_meet_the_rate(fitted: Fitted, bits: float) -> None:
    c = at_rate(fitted, bits)
    assert codec(c.spec) == c
    assert c.unbiased
    for shape, dtype in ((SHAPE, torch.float32), ((3, 16, 16, 24), torch.bfloat16)):
        round_trip(c, correlated(3, shape).to(dtype))  # the payload has the stated size
    spent = 8 * c.payload_bytes(SHAPE, torch.float32) / math.prod(SHAPE)
    assert 0.8 * bits <= spent <= 1.02 * bits  # coders pad their last groups


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bits", [4.0, 1.5, 0.5])
def test_no_two_bands_gain_by_an_exchange_of_rates(
    fitted: Fitted, bits: float, unbiased: bool
) -> None:
    need = np.sort(fitted.energy * fitted.weight)[::-1]
    rates = states.arrays(at_rate(fitted, bits, unbiased=unbiased).rates)["rates"].astype(int)
    spent, errors = _true_rates(), _errors()
    assert spent[rates].mean() + fitted.side_bits <= bits
    up, down = rates < len(spent) - 1, rates > int(unbiased)
    next_up, next_down = np.minimum(rates + 1, len(spent) - 1), np.maximum(rates - 1, 0)
    gain = need * (errors[rates] - errors[next_up])
    gain /= np.maximum(spent[next_up] - spent[rates], 1e-9)
    loss = need * (errors[next_down] - errors[rates])
    loss /= np.maximum(spent[rates] - spent[next_down], 1e-9)
    assert gain[up].max() <= loss[down].min() * (1 + 1e-9)


@pytest.mark.parametrize("bits", [4.0, 2.0, 1.0, 0.5])
def test_unbiased_with_the_stated_error(fitted: Fitted, bits: float) -> None:
    check_noise(at_rate(fitted, bits), correlated(5), 300)


@pytest.mark.parametrize("bits", [3.0, 1.0, 0.5])
def test_stated_effect_is_the_measured_one(fitted: Fitted, bits: float) -> None:
    """On readings that sum channels and neighbours: their noise does not add up independently."""
    c, x = at_rate(fitted, bits), correlated(5)
    generator = torch.Generator().manual_seed(1)
    weights = []
    for _ in range(64):
        cells = torch.randn(6, 4, 4, 3, generator=generator)
        channels = torch.randn(3, 24, generator=generator)
        weights.append(cells.repeat_interleave(4, 1).repeat_interleave(4, 2) @ channels)
    stated = torch.tensor([c.effect(x, w)[0] for w in weights])
    measured = torch.zeros(64)
    for draw in range(200):
        error = round_trip(c, x, draw) - x
        measured += torch.stack([(w * error).sum() for w in weights]).square() / 200
    # One reading's variance is known to 10 % from 200 draws, the mean of 64 to 2 %.
    assert float((measured / stated).mean()) == pytest.approx(1, abs=0.05)
    apart = torch.stack([(w.square() * c.error(x).variance).sum() for w in weights])
    spread = [float((measured / each - 1).square().mean()) for each in (stated, apart)]
    assert spread[0] < spread[1] / 3  # summing over elements misses the correlation


@pytest.mark.parametrize("bits", [4.0, 2.0])
@pytest.mark.parametrize("count", [16, 24, 272])
def test_bands_of_few_positions_share_their_scales(count: int, bits: float) -> None:
    """Noise goes from bands with much energy into others that the gradient reads better."""
    torch.manual_seed(0)
    x = torch.randn(count, 64) * torch.logspace(1, -1, 64)
    w = torch.randn(count, 64) * torch.logspace(-1, 1, 64)
    c, probes = at_rate(fit(x, [w], -1), bits), [w, torch.randn_like(x)]
    z, read = c.forward(x), [c.adjoint(w) for w in probes]
    measured = 0.0
    for draw in range(100):
        noise = c.forward(round_trip(c, x, draw)) - z
        measured += sum(float((noise * w).square().sum()) for w in read) / 200
    assert c.effect(x, *probes)[0] == pytest.approx(measured, rel=0.1)


def test_the_basis_holds_on_other_data_and_gains(fitted: Fitted) -> None:
    x, w = correlated(9), covector(9)
    for bits in (2.0, 1.0):
        plain = Rotate(round(bits)).effect(x, w)[0]
        assert at_rate(fitted, bits).effect(x, w)[0] < plain / 5


def test_more_bits_less_noise(fitted: Fitted) -> None:
    x, w = correlated(5), covector(1)
    noise = [at_rate(fitted, bits).effect(x, w)[0] for bits in (0.125, 0.5, 1.0, 2.0, 4.0, 6.0)]
    assert noise == sorted(noise, reverse=True)


def test_dropping_is_smaller_but_biased(fitted: Fitted) -> None:
    c, x = at_rate(fitted, 0.25, unbiased=False), correlated(5)
    assert not c.unbiased
    stated = c.error(x)
    measured = torch.stack([round_trip(c, x, n) - x for n in range(300)]).mean(0)
    assert float(stated.bias.square().mean()) > 0
    deviation = (stated.variance / 300).sqrt()
    assert float(((measured - stated.bias) / deviation).square().mean()) < 1.1


@pytest.mark.parametrize("dtype", FLOATS)
def test_other_dtypes_and_huge_values_stay_finite(fitted: Fitted, dtype: torch.dtype) -> None:
    c = at_rate(fitted, 2.0)
    largest = torch.finfo(dtype).max
    for x in (torch.zeros(SHAPE), correlated(0) * 1e3, correlated(0).sign() * min(largest, 1e30)):
        assert bool(round_trip(c, x.to(dtype)).isfinite().all())


def test_channels_may_lie_anywhere() -> None:
    x, w = correlated(0), covector(1)
    last = at_rate(fit(x, [w], -1), 2.0)
    moved = x.permute(0, 3, 1, 2).contiguous(), w.permute(0, 3, 1, 2).contiguous()
    second = at_rate(fit(moved[0], [moved[1]], 1), 2.0)
    assert last.rates == second.rates
    assert torch.allclose(last.forward(x), second.forward(moved[0]), atol=1e-4)


def test_tokens_and_matrices() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) * torch.logspace(0, -2, 64)[:, None]
    for shape in ((8, 32, 64), (256, 64)):
        x = torch.randn(shape) @ mixing
        check_noise(at_rate(fit(x, [torch.randn(shape)], -1), 1.0), x, 300)


# ---- kernels ----


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "channels", "width"),
    [
        (SHAPE, -1, 64),  # blocks of 4 x 4
        ((3, 48, 8, 8), 1, 16),
        ((5, 6, 10, 33), -1, 64),  # 2 x 2, and a width that no vector divides
        ((3, 33, 7, 12), 1, 64),  # 1 x 4
        ((70, 9, 130), -1, 64),  # no neighbours; two blocks of channels
        ((131, 64), -1, 64),
        ((2, 128), -1, 64),
    ],
)
def test_kernels_do_what_is_defined(
    shape: tuple[int, ...],
    channels: int,
    width: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) + torch.randn(shape[-1])).to(dtype)
    fitted = fit(x, [torch.randn(shape)], channels, width=width)
    c = at_rate(fitted, 1.0, unbiased=False)
    assert c._on_cpu(x) is not None
    payload = c.encode(x, step_key(), 3)
    decoded = c.decode(payload, x.shape, dtype, step_key(), 3)
    monkeypatch.setattr("fxcompress.codecs.transform._on_cpu", lambda _: False)
    again = c.encode(x, step_key(), 3)
    assert torch.equal(c._numbers_in(payload), c._numbers_in(again))
    # Coefficients differ in their last digits: here and there one is drawn to the next level.
    assert float((payload != again).float().mean()) < 0.01
    defined = c.decode(payload, x.shape, dtype, step_key(), 3)
    assert torch.allclose(decoded, defined, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_kernels_do_not_depend_on_threads(fitted: Fitted) -> None:
    c, x, before = at_rate(fitted, 1.5), correlated(0), torch.get_num_threads()
    payloads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        payloads.append(c.encode(x, step_key(), 3))
    torch.set_num_threads(before)
    assert torch.equal(*payloads)


def test_what_is_not_finite_is_seen(fitted: Fitted) -> None:
    c, x = at_rate(fitted, 1.0), correlated(0)
    for bad in (math.nan, math.inf, -math.inf):
        x[1, 3, 5, 7] = bad
        assert not bool(round_trip(c, x).isfinite().all())


# ---- rates ----


@pytest.mark.parametrize("rate", RATES)
def test_a_coder_spends_its_rate(rate: float) -> None:
    found = coder(rate)
    if rate == 0:
        assert found is None
    else:
        assert found is not None
        assert found.unbiased
        bits = 8 * found.payload_bytes([1 << 16], torch.float32) / (1 << 16)
        assert rate < bits <= rate + max(0.125, rate / 8)


# ---- DIVISION and averaging as special cases ----


def spatial_mean(rate: int, rest: int) -> Transform:
    """Frequency 0, the sum over a 4x4 block, at RATES[rate]; the others at RATES[rest]."""
    rates = torch.full((16, 24), rest)
    rates[0] = rate
    return by_hand(rates.view(-1))


def test_averaging_is_a_transform_that_keeps_the_mean_only() -> None:
    x = correlated(0)
    c, average = spatial_mean(RATES.index(2.0), 0), Average(0.125, along="space", channels=-1)
    assert not c.unbiased
    # Both decode to one value a block, and both spend 2 bits on each block's mean.
    blocks = round_trip(c, x).view(6, 4, 4, 4, 4, 24)
    assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))
    sizes = [each.payload_bytes(SHAPE, torch.float32) for each in (c, average)]
    which = 16 * 24 // 2  # bytes that say which band has which rate
    assert sizes[0] - which == pytest.approx(sizes[1], rel=0.1)
    # Their bias is the same, to the fp32 digits: what the mean leaves out.
    assert torch.allclose(c.error(x).bias, average.error(x).bias, atol=1e-4)


def test_division_is_a_transform_with_a_fine_mean() -> None:
    x = correlated(0)
    c = spatial_mean(RATES.index(8.0), RATES.index(2.0))
    division = Frequency(2, 4, channels=-1)
    assert c.unbiased
    means = [round_trip(each, x).view(6, 4, 4, 4, 4, 24).mean((2, 4)) for each in (c, division)]
    exact = x.view(6, 4, 4, 4, 4, 24).mean((2, 4))
    # The mean is coded finely in the transform; DIVISION's residual puts noise back on it.
    assert float((means[0] - exact).square().mean()) < float((means[1] - exact).square().mean()) / 4
    # DIVISION's 16 bits a block and grid a plane against 8 bits and rotated residuals.
    noise = [float((round_trip(each, x) - x).square().mean()) for each in (c, division)]
    assert noise[0] < noise[1] / 2
    assert c.payload_bytes(SHAPE, torch.float32) < division.payload_bytes(SHAPE, torch.float32)


# ---- states ----


def test_states_survive_a_process(fitted: Fitted) -> None:
    c, x = at_rate(fitted, 1.0), correlated(3)
    payload = c.encode(x, step_key(), 3)
    expected = c.decode(payload, x.shape, x.dtype, step_key(), 3)
    dumped = {name: states.dump(name) for name in (c.basis, c.rates)}
    for name in dumped:
        states.restore(dumped[name])
        _forget(name)
    with pytest.raises(CodecError, match="calibrate the model again"):
        states.arrays("0" * 16)
    for name, content in dumped.items():
        assert states.restore(content) == name
    assert torch.equal(c.decode(payload, x.shape, x.dtype, step_key(), 3), expected)


def _forget(name: str) -> None:
    """As in a new process: nothing in memory."""
    states._states.pop(name)
    for key in [key for key in states._on_device if key[0] == name]:
        states._on_device.pop(key)


def test_a_state_is_found_on_disk_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    name = states.put({"rates": torch.arange(12, dtype=torch.uint8)})
    path = tmp_path / f"state-{name}.npz"
    _forget(name)
    assert states.arrays(name)["rates"].tolist() == list(range(12))
    _forget(name)
    good = path.read_bytes()
    other = states.put({"rates": torch.zeros(12, dtype=torch.uint8)})
    path.write_bytes(states.dump(other))  # a state, but not the one it is named after
    with pytest.raises(CodecError, match="is damaged: delete it"):
        states.arrays(name)
    for content in (b"", good[: len(good) // 2], b"PK\x03\x04" + good[4:40], b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(CodecError, match="not a calibrated state"):
            states.arrays(name)
    path.unlink()
    with pytest.raises(CodecError, match="is missing from"):
        states.arrays(name)


def test_restoring_runs_no_code(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", rates=np.array([print], dtype=object))
    with pytest.raises(CodecError, match="not a calibrated state"):
        states.restore((tmp_path / "x.npz").read_bytes())


def test_equal_states_have_one_name() -> None:
    state = {"rates": torch.arange(5, dtype=torch.uint8)}
    name = states.put(state)
    assert states.put({"rates": state["rates"].clone()}) == name
    assert states.put({"rates": state["rates"].int()}) != name
    assert states.put({"rates": state["rates"].view(5, 1)}) != name


def test_staleness_is_relative_to_the_fit(fitted: Fitted) -> None:
    c, mean = at_rate(fitted, 2.0), states.get(fitted.basis, torch.device("cpu"))["mean"]
    calibrated = staleness(c, correlated(0))
    assert calibrated == pytest.approx(1, rel=1e-3)
    assert 0.5 * calibrated < staleness(c, correlated(1)) < 2 * calibrated
    wider = mean + 2 * (correlated(0) - mean)
    assert staleness(c, wider) == pytest.approx(4 * calibrated, rel=1e-3)
    unseen = correlated(0).flip(-1)  # channels that correlate in other ways
    assert staleness(c, unseen) > 3


def test_rates_follow_the_energy_of_the_day(fitted: Fitted) -> None:
    """Bands that wake up after the calibration are not left at the few bits of silent ones."""
    c, x = at_rate(fitted, 2.0), correlated(0)
    scale = torch.linspace(0.05, 3, x.shape[-1])
    changed = (x - x.mean((0, 1, 2))) * scale
    z = c.forward(changed)
    errors = torch.tensor(_errors())[c._numbers(_energies(z), states.get(c.basis, z.device)).long()]
    fixed = torch.tensor(_errors())[
        c._numbers(_energies(c.forward(x)), states.get(c.basis, x.device)).long()
    ]
    weight = states.get(fitted.basis, torch.device("cpu"))["weight"]
    need = z.double().square().mean(1) * weight
    assert (errors * need).sum() < 0.8 * (fixed * need).sum()


def test_means_of_the_day_are_subtracted(fitted: Fitted) -> None:
    c, x = at_rate(fitted, 1.0), correlated(0)
    moved = x + 50 * torch.randn(x.shape[-1])
    errors = [float((round_trip(c, each) - each).square().mean()) for each in (x, moved)]
    assert errors[1] < 2 * errors[0]


def test_few_positions_take_the_calibrated_means() -> None:
    x = correlated(0)[:1, :8, :8]
    small = at_rate(fit(x, [covector(1, x.shape)], -1), 2.0)
    assert small._running_means() == 0
    assert float((round_trip(small, x) - x).square().mean()) < 0.2 * float(x.var())


def test_workspace_is_what_is_allocated(fitted: Fitted) -> None:
    """Besides the tensor and its payload: two buffers of its size, or less."""
    c, x, key = at_rate(fitted, 2.0), correlated(0).repeat(4, 1, 1, 1), step_key()
    payload = c.encode(x, key, 3)
    stated = c.workspace_bytes(x.shape, x.dtype)
    for call, result in (
        (lambda: c.encode(x, key, 3), payload.nbytes),
        (lambda: c.decode(payload, x.shape, x.dtype, key, 3), x.nbytes),
    ):
        peak = measure_step(call, []).peak_bytes
        assert peak - result <= 1.1 * stated
