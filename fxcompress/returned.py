"""Returned: does anybody hold what a graph returned when its backward begins?

``out = model(x); loss(out).backward()`` holds the output through the whole step, which may be the
largest tensor of a language model; ``loss(model(x)).backward()`` does not. No compiler can know. So
plans count it to the end of the step, and a step is watched: once the backward begins, what was
computed from the output has let go of it, and if it is still alive it has another owner.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def when_backward_begins(outputs: Iterable[Any], tell: Callable[[bool], None]) -> None:
    """Have ``tell`` called, at the first backward, with whether all of ``outputs`` have died.

    Scalars do not count: the loss is what the backward is called on.
    """
    made = [y for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]
    if not made:
        return
    references = [weakref.ref(y) for y in made if y.numel() > 1]
    node = made[0].grad_fn
    assert node is not None

    def begin(gradients: object) -> None:
        handle.remove()
        if any(reference() is not None for reference in references):
            gc.collect()  # a compile leaves frames behind that refer to each other
        tell(all(reference() is None for reference in references))

    handle = node.register_prehook(begin)
