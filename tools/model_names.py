"""Model names: which there are, and which are near to one that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec

OWN = ("cifar:resnet20", "gpt:base", "gpt:small", "gpt:tiny")


def known(kind: str = "") -> list[str]:
    """Models that can be named here: all of a kind, or those that are quick to list."""
    names = list(OWN)
    if find_spec("torchvision") is not None:
        import torchvision

        classifiers = torchvision.models.list_models(module=torchvision.models)
        names += [f"torchvision:{name}" for name in classifiers]
    if kind == "hf" and find_spec("transformers") is not None:  # seconds to import
        from transformers import CONFIG_MAPPING

        names += [f"hf:{name}" for name in CONFIG_MAPPING]
    return [name for name in names if name.startswith(f"{kind}:")] if kind else names


def suggestion(spec: str) -> str:
    """``; did you mean …?`` with the names nearest to ``spec``; empty if none is near."""
    kind, _, name = spec.rpartition(":")
    same_kind = known(kind)
    return near(name, {n.rpartition(":")[2]: n for n in same_kind or known()})


def near(name: str, names: dict[str, str]) -> str:
    """As `suggestion`, among ``names``: short name → what to write."""
    lowered = {short.lower(): full for short, full in names.items()}
    close = get_close_matches(name.lower(), lowered, n=4, cutoff=0.6)
    return _asked(lowered[short] for short in close)


def _asked(names: Iterable[str]) -> str:
    listed = list(names)
    return f"; did you mean {' or '.join(listed)}?" if listed else ""
