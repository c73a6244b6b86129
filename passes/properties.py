"""What an operator does to noise in its inputs: asked of the op, never of a model layer.

A *smooth* reader turns a small error of a saved tensor into a small error of the gradient. An
*exact* reader does not: comparisons, signs, indices, rounding. A *shape* reader looks at sizes
only. Everything else here follows from schemas and dtypes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxcompress import torch_private

aten = torch.ops.aten
prims = torch.ops.prims

INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})

# Float-valued steps: a small error of the input can move the output by a whole unit.
_STEPS = frozenset(
    """
    floor ceil round trunc fix frac sign sgn heaviside fmod remainder floor_divide nextafter
    signbit copysign bucketize searchsorted histc
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)

# Readers that branch on the value they are given although both input and output are floats; left
# whole by some decomposition tables. Argument position → they need it exact.
_BRANCHING = {
    "threshold_backward": (1,),
    "leaky_relu_backward": (1,),
    "hardtanh_backward": (1,),
    "hardsigmoid_backward": (1,),
    "hardswish_backward": (1,),
    "softshrink_backward": (1,),
    "hardshrink_backward": (1,),
    "elu_backward": (5,),
    "rrelu_with_noise_backward": (1, 2),
    "prelu": (0,),
    "_prelu_kernel": (0,),
    "_prelu_kernel_backward": (1,),
    "grid_sampler_2d_backward": (2,),
    "grid_sampler_3d_backward": (2,),
    "_cdist_backward": (1, 2, 4),
    "_pdist_backward": (1, 3),
    "_ctc_loss_backward": (1, 5, 6),
    "multi_margin_loss_backward": (1,),
    "multilabel_margin_loss_backward": (1, 5),
    "smooth_l1_loss_backward": (1, 2),
    "huber_loss_backward": (1, 2),
    "nll_loss_backward": (6,),
    "sort": (0,),
    "topk": (0,),
    "cummax": (0,),
    "cummin": (0,),
    "median": (0,),
    "kthvalue": (0,),
    "mode": (0,),
}

# Readers that look at the sizes of an argument only (the backward of a pooling spreads gradients
# to positions that do not depend on the values).
_SHAPE_ONLY = {
    "max_pool2d_with_indices_backward": (1,),
    "max_pool3d_with_indices_backward": (1,),
    "adaptive_max_pool2d_backward": (1,),
    "adaptive_max_pool3d_backward": (1,),
    "fractional_max_pool2d_backward": (1,),
    "fractional_max_pool3d_backward": (1,),
    "avg_pool2d_backward": (1,),
    "avg_pool3d_backward": (1,),
    "_adaptive_avg_pool2d_backward": (1,),
    "_adaptive_avg_pool3d_backward": (1,),
    "replication_pad1d_backward": (1,),
    "replication_pad2d_backward": (1,),
    "replication_pad3d_backward": (1,),
    "reflection_pad1d_backward": (1,),
    "reflection_pad2d_backward": (1,),
    "reflection_pad3d_backward": (1,),
    "new_zeros": (0,),
    "new_empty": (0,),
    "new_full": (0,),
    "new_ones": (0,),
    "zeros_like": (0,),
    "ones_like": (0,),
    "full_like": (0,),
    "empty_like": (0,),
    "sym_size": (0,),
    "sym_numel": (0,),
    "sym_stride": (0,),
}

# Outputs of one of these amplify an error of their input exponentially.
_EXPONENTIAL = frozenset(
    """
    exp exp2 expm1 sinh cosh
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)

# Infinite where their input is zero; noise can carry a small input there.
_POLES = frozenset(
    """
    reciprocal rsqrt log log2 log10
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)

# Never zero, whatever their input: `1 / (1 + exp(x))` has no pole.
_POSITIVE = frozenset(
    """
    exp exp2 sigmoid cosh
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)

# Ops along which an error stays in proportion: between a saved tensor and an exponential, these
# do not tame it.
_LINEAR = frozenset(
    """
    add sub rsub mul div neg mm bmm addmm baddbmm convert_element_type _to_copy sum mean
    clone where masked_fill
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)

# Ops that hand on what is added or filled in to mask elements out, in size.
_MASKING = frozenset(
    """
    add sub mul where masked_fill maximum minimum convert_element_type _to_copy clone
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)
MASKING_CONSTANT = 1e4  # and above, up to infinity: what models mask scores with

# Ops that never fuse into a neighbour: they read and write memory of their own.
_EXTERN = frozenset(
    """
    convolution convolution_backward mm bmm addmm baddbmm _fft_r2c _fft_c2c _fft_c2r sort
    scatter_add scatter_reduce index_put _unsafe_index_put
    _unsafe_masked_index_put_accumulate embedding_dense_backward _cudnn_rnn
    _cudnn_rnn_backward mkldnn_rnn_layer mkldnn_rnn_layer_backward
    """.split()  # noqa: SIM905 (a list of words reads better than a column)
)


def op_name(node: fx.Node) -> str:
    """Base name of the node's operator: ``aten.mul.Tensor`` → ``mul``."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    if target is operator.getitem:
        return "getitem"
    return str(getattr(target, "__name__", target))


def value(node: fx.Node) -> Any:
    """The node's fake value: a tensor, a symbolic number, a tuple of those, or None."""
    return node.meta.get("val")


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def is_integer(node: fx.Node) -> bool:
    """Boolean or integer tensor: exact by nature."""
    val = value(node)
    return isinstance(val, torch.Tensor) and val.dtype in INTEGERS


def has_symbols(node: fx.Node) -> bool:
    """Any size that is not a plain int."""
    val = value(node)
    return isinstance(val, torch.Tensor) and not all(isinstance(s, int) for s in val.shape)


def is_view(node: fx.Node) -> bool:
    """The output shares the storage of the first argument and writes nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    arguments, returns = target._schema.arguments, target._schema.returns
    return bool(
        arguments and arguments[0].alias_info is not None and returns and returns[0].alias_info
    )


def storage_root(node: fx.Node) -> fx.Node:
    """The node that owns the memory ``node`` is a view of (itself if it is no view)."""
    while True:
        if is_view(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        elif node.target is operator.getitem and is_view(node.args[0]):  # type: ignore[arg-type]
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the memory of a node, through views."""
    for user in node.users:
        if is_view(user):
            yield from readers(user)
        else:
            yield user


def tensor_bytes(node: fx.Node) -> int:
    """Bytes of the node's tensor, dense; 0 where it has none."""
    val = value(node)
    if not isinstance(val, torch.Tensor):
        return 0
    return torch_private.size_hint(val.numel()) * val.element_size()


def is_pure(node: fx.Node) -> bool:
    """May be evaluated a second time, elsewhere, with the same result and no side effect."""
    if node.op == "placeholder":
        return True
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in {"_operator", "math", "torch"}
    return (
        not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and target.namespace
        in {"aten", "prims", "prim", "inductor", "_inductor_test", "fxcompress"}
        and not op_name(node).startswith("inductor_")  # random: seeds, lookups, draws
    )


def is_known(node: fx.Node) -> bool:
    """An operator of PyTorch's own whose effect on noise we may assume from its schema."""
    if node.target is operator.getitem:
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace in {
        "aten", "prims", "inductor"
    }  # fmt: skip


def is_extern(node: fx.Node) -> bool:
    """Runs as a call of its own (matrix product, convolution, attention, an opaque op)."""
    name = op_name(node)
    return (
        name in _EXTERN
        or "attention" in name
        or (
            node.op == "call_function"
            and not is_known(node)
            and node.target is not operator.getitem
        )
    )


def is_pointwise(node: fx.Node) -> bool:
    """Computes each output element from the input elements at the same place."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or op_name(node) == "convert_element_type"
    )


def is_step(node: fx.Node) -> bool:
    """Float-valued but with jumps: floor, round, sign, …"""
    return op_name(node) in _STEPS or node.kwargs.get("rounding_mode") is not None


def is_exponential(node: fx.Node) -> bool:
    """An error of its input may grow without bound."""
    return op_name(node) in _EXPONENTIAL and not is_logistic(node)


def is_logistic(node: fx.Node) -> bool:
    """A step of `y / (1 + exp(x))` or `log(1 + exp(x))`, which are as smooth as a sigmoid.

    So SiLU and softplus are spelled once PyTorch has taken them apart.
    """
    if op_name(node) == "exp":
        return bool(node.users) and all(
            _flattens(u, node) or (_is_raised(u) and all(_flattens(r, u) for r in u.users))
            for u in node.users
        )
    return any(_flattens(node, n) for n in node.all_input_nodes)


def _is_raised(node: fx.Node) -> bool:
    """`exp(x)` and a positive constant."""
    if op_name(node) != "add" or len(node.args) != 2 or node.kwargs:
        return False
    exp, constant = node.args
    is_exp = isinstance(exp, fx.Node) and op_name(exp) == "exp"
    return is_exp and isinstance(constant, int | float) and constant > 0


def _flattens(node: fx.Node, grown: fx.Node) -> bool:
    name = op_name(node)
    if name == "log1p":
        return op_name(grown) == "exp"
    divides = name in {"reciprocal", "log"} or (name == "div" and _positions(node, grown) == [1])
    return divides and _is_raised(grown)


def has_pole(node: fx.Node, argument: fx.Node) -> bool:
    """``node`` divides by ``argument``, or takes its logarithm, and it may be zero."""
    name = op_name(node)
    if _is_raised(argument):
        return False
    if name == "div":
        return 1 in _positions(node, argument)
    if name == "pow":
        exponent = node.args[1]
        negative = isinstance(exponent, int | float) and exponent < 0
        return negative and 0 in _positions(node, argument)
    return name in _POLES


def can_vanish(node: fx.Node) -> bool:
    """Computed element by element, by an op that can return zero."""
    return (is_pointwise(node) and op_name(node) not in _POSITIVE) or is_view(node)


def is_linear(node: fx.Node) -> bool:
    return op_name(node) in _LINEAR or is_view(node)


def _positions(node: fx.Node, argument: fx.Node) -> list[int]:
    return [i for i, a in enumerate(node.args) if a is argument]


def reads_shape_only(node: fx.Node, argument: fx.Node) -> bool:
    """``node`` looks at the sizes of ``argument``, never at its values."""
    allowed = _SHAPE_ONLY.get(op_name(node), ())
    positions = _positions(node, argument)
    named = argument in node.kwargs.values()
    return bool(positions) and not named and all(p in allowed for p in positions)


def branches_on(node: fx.Node, argument: fx.Node) -> bool:
    """``node`` compares the values of ``argument`` although it returns floats."""
    positions = _BRANCHING.get(op_name(node), ())
    return any(p in positions for p in _positions(node, argument))


def masks_scores(node: fx.Node, argument: fx.Node) -> bool:
    """``node`` is a fused attention and adds ``argument`` to its scores."""
    return _is_attention_argument(node, argument, "attn_bias", "attn_mask")


def normalises_scores(node: fx.Node, argument: fx.Node) -> bool:
    """``node`` is the backward of a fused attention and ``argument`` its log-sum-exp."""
    return _is_attention_argument(node, argument, "logsumexp")


def _is_attention_argument(node: fx.Node, argument: fx.Node, *names: str) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or "attention" not in op_name(node):
        return False
    order = [a.name for a in node.target._schema.arguments]
    given = {**dict(zip(order, node.args, strict=False)), **node.kwargs}
    return any(given.get(name) is argument for name in names)


def is_masked_out(node: fx.Node) -> bool:
    """Some elements are -inf, or as good as that: filled in, or added to what they were.

    No grid of a few levels holds them beside the others.
    """
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op != "call_function":
            continue
        constant = op_name(current) in {"full", "scalar_tensor"}
        if not (constant or op_name(current) in _MASKING or is_view(current)):
            continue
        numbers = [a for a in current.args if isinstance(a, int | float)]
        if not is_view(current) and any(abs(a) >= MASKING_CONSTANT for a in numbers):
            return True
        new = [n for n in current.all_input_nodes if is_tensor(n) and n not in seen]
        seen.update(new)
        pending.extend(new)
    return False


def integer_bits(node: fx.Node) -> int:
    """Bits that an element of a boolean or integer tensor takes, where its range is known."""
    bounds = integer_range(node)
    if bounds is None:
        return 8 * value(node).element_size()
    return max((bounds[1] - bounds[0]).bit_length(), 1)


def integer_range(node: fx.Node) -> tuple[int, int] | None:
    """Bounds (low, high), both inclusive, that the operator itself guarantees; None if none."""
    val = value(node)
    if not isinstance(val, torch.Tensor):
        return None
    if val.dtype is torch.bool:
        return 0, 1
    if val.dtype not in INTEGERS:
        return None
    name = op_name(node)
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        return _index_output_range(source, index)
    if name in {"convert_element_type", "_to_copy"} or is_view(node) or name == "clone":
        source = node.args[0]
        return integer_range(source) if isinstance(source, fx.Node) else None
    if name in {"argmax", "argmin"}:
        source, *rest = node.args
        dim = rest[0] if rest else node.kwargs.get("dim")
        return _below(value(source).numel() if dim is None else value(source).size(dim))  # type: ignore[arg-type]
    return None


def _index_output_range(source: fx.Node, index: Any) -> tuple[int, int] | None:
    """Range of output ``index`` of a multi-output op, where that output is an index."""
    name = op_name(source)
    if index != 1 or not isinstance(source.args[0], fx.Node):
        return None
    x = value(source.args[0])
    if name == "_low_memory_max_pool_with_offsets":
        return _below(math.prod(_pair(source.args[1], x.dim() - 2)))
    if name in {"max_pool2d_with_indices", "adaptive_max_pool2d"}:
        return _below(x.size(-1) * x.size(-2))
    if name in {"max_pool3d_with_indices", "adaptive_max_pool3d"}:
        return _below(x.size(-1) * x.size(-2) * x.size(-3))
    if name in {"max", "min", "sort", "topk", "cummax", "cummin", "median", "kthvalue", "mode"}:
        position = {"topk": 2, "kthvalue": 2}.get(name, 1)
        default = 0 if name in {"max", "min", "median"} else -1
        dim = source.args[position] if len(source.args) > position else default
        return _below(x.size(dim)) if isinstance(dim, int) and x.dim() else None
    return None


def _pair(size: Any, dims: int) -> tuple[int, ...]:
    if isinstance(size, int):
        return (size,) * dims
    return tuple(size) * (dims if len(size) == 1 else 1)


def _below(count: Any) -> tuple[int, int] | None:
    return (0, max(count - 1, 0)) if isinstance(count, int) else None
