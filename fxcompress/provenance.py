"""Provenance: which module and which line of the user's code a node comes from."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_INTERNAL = ("/torch/nn/modules/", "/torch/nn/functional.py", "/torch/_")


def module_path(node: fx.Node) -> str:
    """Path of the innermost module, as ``named_modules`` spells it; "" for the root or unknown."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    # Dynamo writes L['self'].layers.0 or L['self']._modules['layers']._modules['0'].
    path = re.sub(r"^(?:L\['\w+'\]|L__self___?|self)\.?", "", str(path))
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    return path.strip(".")


def source_line(node: fx.Node) -> str:
    """``file.py:line`` of the deepest frame outside PyTorch's own layers; "" if unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = _FRAME.findall(trace)
    own = [frame for frame in frames if not any(part in frame[0] for part in _INTERNAL)]
    if not own:
        return ""
    file, line = own[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line}"
