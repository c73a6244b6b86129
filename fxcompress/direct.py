"""Direct: compiled graphs call our operators as functions.

PyTorch's dispatcher takes 20 us to hand a call on to Python and its result back, warm, and twice
that in a step; a graph has a hundred calls or four. The code that Inductor writes for our graphs
names the functions instead. Who watches operators (a profiler, a dispatch mode) is shown them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from fxcompress import ops, torch_private

_NAMES = (
    *("encode", "encode_filled", "encode_standardised"),
    *("decode", "decode_filled", "next_key", "fence"),
)
_CALL = re.compile(rf"torch\.ops\.fxcompress\.({'|'.join(_NAMES)})\.default\(")
_IMPORT = "import torch\n"
_IMPORTS_US = "from fxcompress import direct as fxcompress_direct\n"


def call_directly(code: str) -> str:
    """The code of a graph, as Inductor writes it, without the dispatcher."""
    if _IMPORT not in code or _CALL.search(code) is None:
        return code
    return _CALL.sub(r"fxcompress_direct.\1(", code).replace(_IMPORT, _IMPORT + _IMPORTS_US, 1)


def _direct(name: str) -> Callable[..., Any]:
    function, operator = getattr(ops, name), getattr(torch.ops.fxcompress, name).default

    def call(*arguments: Any) -> Any:
        return (operator if torch_private.is_watched() else function)(*arguments)

    return call


encode = _direct("encode")
encode_filled = _direct("encode_filled")
encode_standardised = _direct("encode_standardised")
decode = _direct("decode")
decode_filled = _direct("decode_filled")
next_key = _direct("next_key")
fence = _direct("fence")
