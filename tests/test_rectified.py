"""ReLU outputs: zeros come back exact, and the rest takes a fraction of the noise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_graphs import Recorder, argument, calls, decodes, payloads, record, spec_of
from torch import Tensor, nn

from fxcompress import backend, rng
from fxcompress.choose import codable_choice
from fxcompress.passes.analyse import analyse
from fxcompress.passes.rectified import filled, mask_of
from fxcompress.passes.rewrite import rewrite
from fxcompress.record import Recorder as StepRecorder
from fxcompress.record import Recording, gradients
from fxcompress.sensitivity import price, sensitivity


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


@pytest.fixture(scope="module")
def recording() -> Recording:
    recorder = StepRecorder(1024)
    torch.compile(network(), backend=recorder)(torch.randn(128, 16)).square().sum().backward()
    return recorder.recordings()[0]


def test_values_and_masks_are_coded_in_one_pass() -> None:
    recorder: Recorder = record(network(), torch.randn(128, 16), policy="uniform2")
    assert len(calls(recorder.after.forward, "fxcompress::encode_filled")) == 2
    assert not calls(recorder.after.forward, "fxcompress::encode")
    values = calls(recorder.after.backward, "fxcompress::decode_filled")
    masks = calls(recorder.after.backward, "fxcompress::decode")
    assert len(values) == len(masks) == 2
    assert {argument(d, "mask") for d in values} == {argument(d, "payload") for d in masks}
    assert len(payloads(recorder.after)) == 4  # one mask a tensor, for values and threshold


def test_values_are_read_under_their_mask() -> None:
    """Of a codec that does not do it in the same pass."""
    recorder = record(network(), torch.randn(128, 16), policy="affine(bits=2,group=128)")
    values = [d for d in decodes(recorder.after) if "affine" in spec_of(d)]
    assert len(values) == 2
    for decoded in values:
        (reader,) = decoded.users
        assert reader.target is torch.ops.aten.where.self
        assert reader.args[2] is decoded
        assert "bits" in str(reader.args[0].args[2])  # the mask, itself a decode
    # Both masks serve the threshold and the values: saved once each.
    assert len(calls(recorder.after.forward, "fxcompress::encode")) == 4


@pytest.mark.parametrize("group", [128, 256])
def test_what_a_batch_norm_reads_has_units_and_a_mask(group: int) -> None:
    """Coded in units of its channels, in one pass or not, its zeros are exact all the same."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.one, self.other = nn.Conv2d(16, 4, 3), nn.Conv2d(16, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.one(x) + self.other(self.norm(x))

    x = torch.randn(8, 3, 16, 16)
    policy = f"affine(bits=8,group={group})"
    recorder = record(Shared(), x, policy=policy)
    masked = [
        n for n in recorder.after.backward.graph.nodes if n.target is torch.ops.aten.where.self
    ]
    assert masked  # the zeros that are restored
    assert not calls(recorder.after.forward, "fxcompress::encode_filled")
    one_pass = calls(recorder.after.forward, "fxcompress::encode_standardised")
    assert len(one_pass) == (group == 256)
    model = Shared()
    compiled = torch.compile(
        Shared(), backend=backend(policy=policy, min_bytes=0, inner="aot_eager")
    )
    for each in (model, compiled):
        each(x).square().mean().backward()
    pairs = zip(model.parameters(), compiled.parameters(), strict=True)
    found = [(p.grad, q.grad) for p, q in pairs]
    error = flat([a - b for a, b in found])
    assert 0 < error.norm() < 0.02 * flat([a for a, _ in found]).norm()


def test_sum_of_readers_without_a_mask_is_left_alone() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sigmoid().square()

    recorder = record(Squared(), torch.randn(128, 16, requires_grad=True), policy="uniform2")
    assert not calls(recorder.after.backward, "aten::where")


def test_fill_is_the_mean_of_what_is_positive() -> None:
    y = torch.tensor([0.0, 1.0, 3.0, 0.0])
    assert filled(y).tolist() == [2.0, 1.0, 3.0, 2.0]
    assert filled(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    wide = filled(torch.tensor([0.0, float("inf"), 1.0]))
    assert wide.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("spec", ["rotate(bits=2)", "affine(bits=3,group=128)"])
def test_unbiased_and_as_noisy_as_priced(recording: Recording, spec: str) -> None:
    exact = flat(gradients(recording, recording.cut))
    cut = recording.cut.copy()
    copied = {s.name: s for s in cut.saved}
    coded = [codable_choice(c, spec) for c in analyse(cut, 1024) if c.name in copied]
    assert all(mask_of(c.candidate) is not None for c in coded)
    noisy = rewrite(cut, coded, "", channels_last=False)
    errors = []
    for seed in range(300):
        rng.manual_seed(seed)
        errors.append(flat(gradients(recording, noisy)) - exact)
    found = torch.stack(errors)
    variance = float(found.var(0, correction=1).sum())
    bias = float(found.mean(0).square().sum())
    assert bias < variance / 300 * 1.5  # what chance gives is variance/300
    measured = sensitivity(recording, lambda c: True, probes=30)
    predicted = sum(price(t, spec, 1.0).variance for t in measured.tensors)
    assert predicted == pytest.approx(variance, rel=0.15)


def flat(found: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in found]).double()


def test_compiles_under_inductor() -> None:
    model = network()
    compiled = torch.compile(model, backend=backend(policy="dither8", min_bytes=1024))
    x = torch.randn(128, 16)
    exact = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    error = flat([a - b for a, b in zip(found, exact, strict=True)])
    assert 0 < error.norm() < 0.01 * flat(list(exact)).norm()
