"""Layers whose weights learn from less than their input: auxiliary activations (ICLR 2023).

"Learning with Auxiliary Activation for Memory-Efficient Training" (openreview YgC62m4CY3r). The
input gradient stays exact; only the weight gradient is computed from something else than the input:
an earlier tensor that is saved anyway (ARA) or the input's signs (ASA). Ordinary layers otherwise:
they train under any backend, and under ours what they still save is compressed as well.
"""

from fxcompress.nn.ara import Conv2dARA, DistributeARA, conv2d_ara
from fxcompress.nn.asa import LinearASA, linear_asa
from fxcompress.nn.convert import convert_mlps, convert_resnet
from fxcompress.nn.gauge import learning_indicator

__all__ = [
    "Conv2dARA",
    "DistributeARA",
    "LinearASA",
    "conv2d_ara",
    "convert_mlps",
    "convert_resnet",
    "learning_indicator",
    "linear_asa",
]
