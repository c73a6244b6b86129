"""PyTorch's own activation quantization in kind: saved floats as fp8 e5m2, one scale a tensor.

As `torch._functorch.partitioners.quantize_activation_fw` (2.8+, `activation_quantization_aten_pass`
in Inductor's post-grad options), with nearest rounding, so biased; there only tensors above a size
are taken.
"""

from __future__ import annotations

from fxcompress.policies.base import Policy
from fxcompress.policies.uniform import with_spec

POLICIES = (
    Policy(
        "fp8",
        "every float saved tensor as fp8 e5m2 with a scale a tensor, as PyTorch's own pass",
        with_spec(lambda _: "cast(format=e5m2,group=0)"),
    ),
)
