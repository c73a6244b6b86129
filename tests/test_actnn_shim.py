"""ActNN's two calls over our backend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import actnn


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    fxcompress.set_optimization_level("L3")
    torch._dynamo.reset()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


def representations(level: str, **settings: object) -> dict[str, str]:
    fxcompress.set_optimization_level(level)
    model = net()
    names = list(model.state_dict())
    found = fxcompress.QModule(model, inner="aot_eager", min_bytes=0, **settings)
    assert found is model
    assert list(model.state_dict()) == names
    model(torch.randn(8, 3, 12, 12)).square().sum().backward()
    plan = fxcompress.explain(model)
    return {t.name: t.representation for t in plan.tensors}


def test_levels_are_policies() -> None:
    """L1 leaves batch norm's input alone, L2 does not; L0 is exact."""
    exact, first, second = (representations(level) for level in ("L0", "L1", "L2"))
    assert not [r for r in exact.values() if r.startswith("affine")]
    coded = {n for n, r in first.items() if r == "affine(bits=4)"}
    assert coded < {n for n, r in second.items() if r == "affine(bits=4)"}
    assert any(r.startswith("adaptive") for r in representations("L3").values())


def test_settings_pass_through() -> None:
    assert "affine(bits=8)" in representations("L3", policy="uniform8").values()
    with pytest.raises(fxcompress.SettingsError, match="unknown setting"):
        fxcompress.QModule(net(), bits=4)


def test_levels_that_cannot_be() -> None:
    for level in ("L9", "swap"):
        with pytest.raises(fxcompress.SettingsError, match=r"not one of L0, .*L5"):
            fxcompress.set_optimization_level(level)
    fxcompress.set_optimization_level("L4")
    with pytest.raises(fxcompress.SettingsError, match=r'level L4 .*set_optimization_level."L3"'):
        fxcompress.QModule(net())


def test_the_page_has_every_level() -> None:
    page = Path(__file__).parents[1] / "docs" / "migrating-from-actnn.md"
    rows = re.findall(r"^\| (`L.*?) \| (.*?) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    pairs = {
        (level, name)
        for levels, names in rows
        for level in re.findall(r"`(.*?)`", levels)
        for name in re.findall(r"`(.*?)`", names)
    }
    assert {(level, name) for level, name in actnn.LEVELS.items()} <= pairs
