"""Tensors that wait in host memory: graphs, exactness, and what the planner makes of a device."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_rebuild import CASES, Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fxcompress
from fxcompress.choose import bytes_of, exact_choice, offload_choice, why_not_offload
from fxcompress.costs import Clock, rates
from fxcompress.ladder import ladder
from fxcompress.passes.analyse import Candidate, analyse
from fxcompress.passes.capture import Cut
from fxcompress.passes.rewrite import KEEP, OFFLOAD, Choice, rewrite
from fxcompress.peak import timeline
from fxcompress.policies import Situation, policy
from fxcompress.record import Recorder, Recording, gradients
from fxcompress.solve import build, least_noise

OPS = torch.ops.fxcompress


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recorded(model: nn.Module, x: Tensor) -> Recording:
    recorder = Recorder(0)
    torch.compile(model, backend=recorder)(x).square().mean().backward()
    (found,) = recorder.recordings()
    return found


def offloaded(candidates: list[Candidate]) -> list[Choice]:
    """All that may be coded or kept, in host memory: on a CPU, another part of the same."""
    return [Choice(c, KEEP if c.keep else OFFLOAD) for c in candidates]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [0, 1])
def test_gradients_are_those_of_plain(case: int, channels_last: bool) -> None:
    make, shape = CASES[case]
    x = torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    recording = recorded(make(), x)
    cut = recording.cut.copy()
    candidates = analyse(cut, 0, channels_last=recording.channels_last)
    choices = offloaded(candidates)
    moved = rewrite(cut, choices, "", channels_last=recording.channels_last)
    count = sum(c.representation == OFFLOAD for c in choices)
    there = moved.forward.graph.find_nodes(op="call_function", target=OPS.to_host.default)
    assert count > 5
    assert len(there) == count
    assert {s.forward for s in moved.saved} >= set(there)
    for node in there:  # nothing of the forward reads the tensor after its copy was made
        (source,) = node.all_input_nodes
        assert all(u <= node for u in source.users if u.op != "output")
    back = moved.backward.graph.find_nodes(op="call_function", target=OPS.to_device.default)
    assert {n.args[0].name for n in back} <= {n.name for n in there}
    for found, exact in zip(
        gradients(recording, moved), gradients(recording, recording.cut), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)


def on_gpu(cut: Cut) -> Cut:
    """The cut as if it had been traced on a GPU."""
    moved, mode = cut.copy(), FakeTensorMode()

    def there(value: Tensor) -> Tensor:
        with mode:
            strides = (value.shape, value.stride())
            return torch.empty_strided(*strides, dtype=value.dtype, device="cuda:0")

    for module in (moved.forward, moved.backward):
        for node in module.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map_only(Tensor, there, node.meta["val"])
    return moved


def test_the_planner_moves_what_it_may_not_bend() -> None:
    recording = recorded(Block(), torch.randn(2, 64, 32))
    cut = on_gpu(recording.cut)
    candidates = analyse(cut, 0, channels_last=False)
    own = rates("cpu")
    memory = timeline(cut, candidates, channels_last=False)
    kept = [Choice(c, KEEP) for c in candidates]
    plain = memory.plain_peak(kept)

    def planned(host_bytes: float, price: float) -> tuple[float, float, int]:
        """(peak, noise, bytes in host memory) of a plan within 2/3 of plain's peak."""
        clock = Clock(1e-3, replace(own, host_bytes=host_bytes), price)
        program = build([ladder(c, 256, None, clock) for c in candidates], memory)
        found = least_noise(program, peak=plain * 2 / 3)
        assert found is not None
        moved = [c for c in found.choices if c.representation == OFFLOAD]
        assert all(bytes_of(c, {}) == 0 for c in moved)
        assert memory.peak(found.choices) <= plain * 2 / 3
        return memory.peak(found.choices), found.noise, sum(c.candidate.own_bytes for c in moved)

    _, noise, moved = planned(host_bytes=25e9, price=1e-6)
    assert noise == 0
    assert moved > 0
    _, noise, moved = planned(host_bytes=1e3, price=1.0)  # hours a step
    assert moved == 0


def test_rates_of_a_cpu_have_no_way_to_the_host() -> None:
    assert rates("cpu").host_bytes == 0


def test_a_cpu_is_the_host(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recording = recorded(Block(), torch.randn(2, 64, 32))
    candidate = next(c for c in recording.candidates if not c.keep)
    assert offload_choice(candidate) is None
    assert why_not_offload(candidate) == "it is there already"

    def trained(**settings: object) -> fxcompress.Plan:
        torch._dynamo.reset()
        backend = fxcompress.backend(inner="aot_eager", min_bytes=0, **settings)
        compiled = torch.compile(Block(), backend=backend)
        compiled(torch.randn(2, 64, 32)).mean().backward()
        return fxcompress.explain(compiled)

    rule = {"match": "*", "representation": "offload"}
    with caplog.at_level(logging.WARNING, logger="fxcompress"):
        plan = trained(policy="lossless", overrides=[rule])
    assert "it is there already" in caplog.text
    assert "offload" not in {t.representation for t in plan.tensors}
    data = json.loads(plan.to_json())
    for row in data["tensors"]:
        if "read for its values" in row["reason"]:
            row["representation"] = "offload"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(fxcompress.SettingsError, match="there already; write 'keep' or a codec"):
        trained(plan=str(tmp_path / "plan.json"))


def test_the_policy_moves_what_lossless_keeps() -> None:
    recording = recorded(Block(), torch.randn(2, 64, 32))
    candidates = analyse(on_gpu(recording.cut), 0, channels_last=False)
    choose = policy("offload").choose
    assert choose is not None
    for choice in choose(Situation(candidates)):
        exact = exact_choice(choice.candidate).representation
        free = exact == KEEP and not choice.candidate.keep
        assert choice.representation == (OFFLOAD if free else exact)


def test_a_graph_that_is_captured_stays_on_its_device() -> None:
    from torch._inductor import config

    recording = recorded(Block(), torch.randn(2, 64, 32))
    candidates = analyse(on_gpu(recording.cut), 0, channels_last=False)
    free = [c for c in candidates if offload_choice(c)]
    assert free
    with config.patch({"triton.cudagraphs": True}):
        assert not any(offload_choice(c) for c in free)


def test_layout_survives() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    host = OPS.to_host(x, [0, 2, 3, 1])
    back = OPS.to_device(host, torch.device("cpu"), x.shape, [0, 2, 3, 1])
    assert host.shape == (x.numel(),)
    assert torch.equal(back, x)
    assert back.stride() == x.stride()
