"""Put auxiliary activations into models that exist: residual networks and transformers' MLPs.

Both change the class of layers in place. Parameters, hooks and the names in the state dict stay, so
that trained weights load and an optimizer made before goes on. Convert before ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import Tensor, nn

from fxcompress.errors import FxCompressError
from fxcompress.nn.ara import conv2d_ara
from fxcompress.nn.asa import LinearASA

READS_INPUT = ("conv1", "downsample.0")  # the convolutions of a block that read its input


class _RelayedConv2d(nn.Conv2d):
    """A convolution that is given its auxiliary beforehand, so that its block stays as it is."""

    auxiliary: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.auxiliary is None:
            return super().forward(input)
        assert not isinstance(self.padding, str)
        return conv2d_ara(
            input, self.auxiliary, self.weight, self.bias,
            self.stride, self.padding, self.dilation, self.groups,
        )  # fmt: skip


class Stage(nn.Sequential):
    """Residual blocks in segments that share an auxiliary.

    A block that changes the shape ends a segment, so the segment before it should reach over it:
    such a block, first of its stage in most networks, is run by the stage before (`and_then`) and
    skipped by its own (`skip`).
    """

    segment = 2
    skip = 0
    and_then: tuple[nn.Module, ...] = ()  # a tuple: they stay registered where they were

    def forward(self, input: Tensor) -> Tensor:
        x = auxiliary = input
        count = 0
        for block in (*list(self)[self.skip :], *self.and_then):
            if count == self.segment or auxiliary.shape != x.shape:
                auxiliary, count = x, 0
            convolutions = [m for m in block.modules() if isinstance(m, _RelayedConv2d)]
            for convolution in convolutions:
                convolution.auxiliary = auxiliary.detach()
            x = block(x)
            for convolution in convolutions:
                convolution.auxiliary = None
            count += 1
        return x


def convert_resnet(
    model: nn.Module, segment: int = 2, reads_input: Sequence[str] = READS_INPUT
) -> nn.Module:
    """Let the first convolution of residual blocks (and of their shortcut) learn from an auxiliary.

    Every ``nn.Sequential`` of blocks that have a child named as in ``reads_input`` becomes a run of
    segments: torchvision's ResNets, ResNeXts and Wide ResNets, and the like. The first block of a
    segment learns exactly; the others, up to ``segment`` in all, do not need their input any more.

    Args:
        segment: blocks that share an auxiliary; 2 as in the paper.
        reads_input: names, within a block, of the convolutions that read the block's input.

    Raises:
        FxCompressError: no such blocks; or ``segment`` below 1.
    """
    if segment < 1:
        raise FxCompressError(f"segment={segment} must be 1 block or more")
    stages: list[Stage] = []
    for child in list(model.modules()):
        if type(child) is not nn.Sequential:
            continue
        convolutions = [c for block in child for c in _convolutions(block, reads_input)]
        for convolution in convolutions:
            convolution.__class__ = _RelayedConv2d
        if convolutions:
            child.__class__ = Stage
            assert isinstance(child, Stage)
            child.segment = segment
            stages.append(child)
    if not stages:
        raise FxCompressError(
            f"no nn.Sequential of blocks with a convolution {' or '.join(reads_input)}: name those "
            "that read a block's input with reads_input=[...]"
        )
    for before, after in pairwise(stages):
        if any(isinstance(m, nn.Conv2d) and m.stride != (1, 1) for m in after[0].modules()):
            before.and_then, after.skip = (after[0],), 1
    return model


def _convolutions(block: nn.Module, names: Sequence[str]) -> list[nn.Conv2d]:
    """Those named within a block that can learn from an auxiliary."""
    named = dict(block.named_modules())
    found = [named[name] for name in names if name in named]
    return [
        c
        for c in found
        if type(c) is nn.Conv2d and c.padding_mode == "zeros" and not isinstance(c.padding, str)
    ]


def convert_mlps(
    model: nn.Module, layers: int = 1, match: Sequence[str] | None = None
) -> nn.Module:
    """Let linear layers of a transformer's MLPs learn from the signs of their input.

    An MLP is a linear layer from d to h > d features followed, in the order of ``modules()``, by
    one from h to d.

    Args:
        layers: 1: the second layer, whose input is the widest saved tensor; 2: both ("asa1" and
            "asa2" in the paper's tables).
        match: shell patterns of module names, to choose layers by hand instead.

    Raises:
        FxCompressError: no such layer.
    """
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    if match is not None:
        chosen = [n for n in linear if any(fnmatchcase(n, p) for p in match)]
    else:
        pairs = pairwise(linear)
        mlps = [(a, b) for a, b in pairs if _is_mlp(linear[a], linear[b])]
        chosen = [n for a, b in mlps for n in ((a, b) if layers == 2 else (b,))]
    if not chosen:
        raise FxCompressError(
            "no linear layer to convert: name some with match=['blocks.*.down']; this model has "
            f"{', '.join(list(linear)[:5]) or 'none'}"
        )
    for name in chosen:
        linear[name].__class__ = LinearASA
    return model


def _is_mlp(up: nn.Linear, down: nn.Linear) -> bool:
    wide = up.out_features > up.in_features
    return wide and (up.in_features, up.out_features) == (down.out_features, down.in_features)
