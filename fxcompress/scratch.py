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
from dataclasses import asdict, dataclass
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
MOST = 64_000_000  # bytes of feature maps that a convolution is tried on
_WEIGHTS = {"convolution": 1, "convolution_backward": 2}  # the place of the weight


def convolution_bytes(node: fx.Node, *, channels_last: bool) -> int:
    """Most bytes that a convolution, or its backward, holds at one time, without its result or the
    gradient of its input. 0 where that is not measured: on GPUs, with symbolic sizes or channels
    enough, in distributed jobs, and while somebody profiles.

    Args:
        channels_last: Inductor lays feature maps out so, unless they are laid out so already.
    """
    place = _WEIGHTS.get(prop.op_name(node))
    if place is None:
        return 0
    argument = node.args[place]
    assert isinstance(argument, fx.Node)
    weight = prop.value(argument)
    few = weight.dim() > 2 and min(weight.shape[:2]) < FEW
    if not few or weight.device.type != "cpu" or torch_private.is_profiling():
        return 0
    if torch_private.job_store() is not None:  # ranks plan alike, whatever machines they are on
        return 0
    if any(map(prop.has_symbols, node.all_input_nodes)):
        return 0
    arguments = _arguments(node, place, channels_last=channels_last)
    try:
        key = json.dumps([prop.op_name(node), arguments, torch.get_num_threads()], default=asdict)
    except TypeError:  # a size is symbolic
        return 0
    known = _known()
    if key not in known:
        try:
            with torch_private.outside_compile(), torch.no_grad():
                known[key] = _measured(node.target, arguments)
        except Exception as error:  # an estimate goes without
            log.info("the scratch memory of %s is not known: %s", node.name, error)
            return 0
        files.keep(_path(), json.dumps(known))
    return known[key]


@dataclass(frozen=True)
class _Like:
    """A tensor of this shape, layout and dtype."""

    shape: list[int]
    strides: list[int]
    dtype: str


def _arguments(node: fx.Node, weight: int, *, channels_last: bool) -> list[Any]:
    """What to call the operator with: of a large batch, a part, for weights decide what it takes.

    weight: the place of the weight, after the feature maps.
    """
    values: list[Any] = [prop.value(a) if isinstance(a, fx.Node) else a for a in node.args]
    found: list[Any] = [
        _Like(list(v.shape), _strides(v, channels_last and i < weight), str(v.dtype))
        if isinstance(v, Tensor)
        else v
        for i, v in enumerate(values)
    ]
    size = sum(torch_private.size_hint(v.numel()) * v.element_size() for v in values[:weight])
    for each in found[:weight] if size > MOST else ():
        each.shape[0] = max(torch_private.size_hint(each.shape[0]) * MOST // size, 1)
    return found


def _strides(value: Tensor, channels_last: bool) -> list[int]:
    """Those that the call finds: it copies what is not as it likes it, a part of a larger tensor as
    the patches of a ViT are beside its class token, or a weight (which Inductor copies if the call
    does not)."""
    strides = list(value.stride())
    is_written = 0 in strides  # what repeats elements is expanded first
    is_map = channels_last and value.dim() == 4
    if not is_written and not (is_map and strides[1] != 1):
        return strides
    layout = torch.channels_last if is_map else torch.contiguous_format
    return list(torch.empty(value.shape, device="meta", memory_format=layout).stride())


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


def _measured(target: Any, arguments: list[Any]) -> int:
    given = [_zeros(a) if isinstance(a, _Like) else a for a in arguments]

    def call() -> Any:
        return target(*given)

    call()  # what is allocated once, on first use
    events, result = torch_private.allocations(call)
    first = result[0] if isinstance(result, tuple) else result
    own = first.nbytes if isinstance(first, Tensor) else 0
    return max(max(accumulate(events), default=0) - own, 0)


def _zeros(like: _Like) -> Tensor:
    dtype = getattr(torch, like.dtype.removeprefix("torch."))
    return torch.empty_strided(like.shape, like.strides, dtype=dtype).zero_()
