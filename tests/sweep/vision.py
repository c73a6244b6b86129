"""Every classification model of torchvision, small ones first, on images as small as it takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision
from subject import Subject, Trained

BATCH = 2
SIZE = 64
LARGER = {"inception_v3": 299, "maxvit_t": 224}
ENTRIES: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_h_14": {"image_size": 56},
    **{f"vit_{n}": {"image_size": SIZE} for n in ("b_16", "b_32", "l_16", "l_32")},
}
REPRESENTATIVE = {"mobilenet_v3_small", "squeezenet1_1", "resnet18"}


def subjects() -> list[Subject]:
    names = torchvision.models.list_models(torchvision.models)
    return [
        Subject(
            f"vision:{name}",
            partial(_make, name),
            draws=2,
            representative=name in REPRESENTATIVE,
            predict=name in REPRESENTATIVE,
        )
        for name in sorted(names, key=_parameters)
    ]


def _parameters(name: str) -> int:
    weights = torchvision.models.get_model_weights(name)
    return min(w.meta["num_params"] for w in weights)


def _make(name: str) -> Trained:
    entries = ENTRIES.get(name, {})
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **entries)
    size = entries.get("image_size", LARGER.get(name, SIZE))
    return Trained(model.train(), (torch.randn(BATCH, 3, size, size),))
