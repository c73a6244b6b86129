"""Scratch: what a convolution allocates on a CPU while it runs, measured on this machine.

oneDNN pads and reorders weights as the implementation that it picks likes them. Of most that is a
few copies of the weight (fxcompress.peak). Where a group, or the input, has fewer channels than a
vector has lanes it can be far more: the backward of EfficientNetV2-S's last depthwise convolutions
takes 14 MB for weights of 55 kB, half of a step's peak under compression, that of a ViT's patches
11 MB. So each of those is run once, and what it took is kept beside Inductor's cache.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress import __version__, files, schema, torch_private
from fxcompress.passes import properties as prop

log = logging.getLogger("fxcompress")

LARGEST_FILE = 1 << 20
FEW = 16  # channels: lanes of a vector
_WEIGHTS = {"convolution": 1, "convolution_backward": 2}  # the place of the weight


def convolution_bytes(node: fx.Node, *, channels_last: bool) -> int:
    """Most bytes that a convolution, or its backward, holds at one time, without its result or the
    gradient of its input. 0 where that is not measured: on GPUs, with symbolic sizes or channels
    enough, in distributed jobs, and while somebody profiles.

    Args:
        channels_last: how feature maps are laid out.
    """
    place = _WEIGHTS.get(prop.op_name(node))
    if place is None:
        return 0
    weight = prop.value(node.args[place])  # type: ignore[arg-type]
    few = weight.dim() > 2 and min(weight.shape[:2]) < FEW
    if not few or weight.device.type != "cpu" or torch_private.is_profiling():
        return 0
    if torch_private.job_store() is not None:  # ranks plan alike, whatever machines they are on
        return 0
    key = _key(node, channels_last)
    if key is None:
        return 0
    known = _known()
    if key not in known:
        try:
            with torch_private.outside_compile(), torch.no_grad():
                known[key] = _measured(node, channels_last)
        except Exception as error:  # an estimate goes without
            log.info("the scratch memory of %s is not known: %s", node.name, error)
            return 0
        files.keep(_path(), json.dumps(known))
    return known[key]


def _key(node: fx.Node, channels_last: bool) -> str | None:
    """All that decides; None where a size is symbolic."""
    values = [prop.value(a) if isinstance(a, fx.Node) else a for a in node.args]
    shown = [[list(v.shape), str(v.dtype)] if isinstance(v, Tensor) else v for v in values]
    try:
        return json.dumps([prop.op_name(node), shown, channels_last, torch.get_num_threads()])
    except TypeError:
        return None


@cache
def _known() -> dict[str, int]:
    try:
        found = files.read_json(_path(), LARGEST_FILE)
        return schema.value(dict[str, int], found)  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return {}


def _path() -> Path:
    name = f"scratch-{__version__}-{torch.__version__}.json"
    return torch_private.cache_dir() / "fxcompress" / name


def _measured(node: fx.Node, channels_last: bool) -> int:
    arguments = [_zeros(a, channels_last) if isinstance(a, fx.Node) else a for a in node.args]

    def call() -> Any:
        return node.target(*arguments)  # type: ignore[operator]

    call()  # what is allocated once, on first use
    events, result = torch_private.allocations(call)
    first = result[0] if isinstance(result, tuple) else result
    own = first.nbytes if isinstance(first, Tensor) else 0
    return max(max(accumulate(events), default=0) - own, 0)


def _zeros(node: fx.Node, channels_last: bool) -> Tensor:
    value = prop.value(node)
    made = torch.zeros(tuple(value.shape), dtype=value.dtype)
    is_map = channels_last and value.dim() == 4
    return made.contiguous(memory_format=torch.channels_last) if is_map else made
