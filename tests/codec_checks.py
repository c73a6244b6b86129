"""What the tests of single codec families share: shapes, round trips, statistics of the noise."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxcompress import rng
from fxcompress.codecs import Codec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

float_types = st.sampled_from(FLOATS)
shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=5),  # scalars, vectors, maps, empty ones of every rank
    st.lists(st.integers(1, 3000), min_size=1, max_size=1),
    st.tuples(st.integers(1, 4), st.integers(1, 700)).map(list),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)).map(
        list
    ),
)


def step_key(counter: int = 0) -> Tensor:
    return torch.tensor([0x1234567890ABCDEF, counter])


def round_trip(c: Codec, x: Tensor, counter: int = 0) -> Tensor:
    """decode(encode(x)); the payload has the stated size."""
    key = step_key(counter)
    payload = c.encode(x, key, 3)
    assert payload.numel() == c.payload_bytes(x.shape, x.dtype)
    decoded = c.decode(payload, x.shape, x.dtype, key, 3)
    assert decoded.shape == x.shape
    assert decoded.dtype == x.dtype
    return decoded


def check_noise(c: Codec, x: Tensor, draws: int = 400, within: float = 0.05) -> None:
    """Over keys, decoded - x has the stated bias and, `within` this share, variance."""
    stated = c.error(x)
    bias, variance = stated.bias.double(), stated.variance.double()
    noise = torch.stack([round_trip(c, x, n) for n in range(draws)]).double() - x.double() - bias
    # The sum of all, 4 standard errors: elements may share their noise, so from the draws. Fixed
    # points truncate below 2^-22 of a step, fp32 below 2^-24 of x.
    floor = 2**-20 * noise.abs().max() + 2**-22 * x.double().abs().max()
    total = noise.mean(tuple(range(1, noise.ndim)))
    assert abs(total.mean()) < 4 * total.std() / math.sqrt(draws) + floor
    # Each element: squared means are variance/draws on average.
    noisy = variance > 16 * floor**2
    assert bool(noisy.any())
    excess = (noise.mean(0).square() / (variance / draws))[noisy].mean()
    assert excess < 1 + 10 / math.sqrt(int(noisy.sum()) / 16)
    assert bool((noise.square().mean(0)[~noisy] < 400 * floor**2).all())
    assert abs(noise.square().mean() / variance.mean() - 1) < within


def check_symbolic_bytes(c: Codec) -> None:
    """payload_bytes of symbolic sizes is right and asks nothing of them."""
    x, env = torch.empty(6, 5, 14, 18), ShapeEnv()
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 4)
    shape = FakeTensorMode(shape_env=env).from_tensor(x, symbolic_context=sizes).shape
    symbolic = c.payload_bytes(shape, x.dtype)
    assert isinstance(symbolic, torch.SymInt)
    assert not env.guards
    assert int(symbolic) == c.payload_bytes(x.shape, x.dtype)


def feature_map(*shape: int) -> Tensor:
    """A smooth random [N, C, H, W] map, its channels of different mean and spread."""
    n, c, h, w = shape
    coarse = torch.randn(n, c, max(1, h // 4), max(1, w // 4))
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear", align_corners=True)
    return (smooth + 0.2 * torch.randn(shape)) * torch.rand(c, 1, 1) * 3 + torch.randn(c, 1, 1)


def extreme(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Finite tensors over the whole range of `dtype`: zeros, constants, denormal, huge."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.randn(shape)
    return [
        torch.zeros(shape, dtype=dtype),
        torch.full(shape, -0.0, dtype=dtype),
        torch.full(shape, 0.1, dtype=dtype),
        (x * tiny / 100).to(dtype),
        (x.clamp(-5, 5) * (largest / 20)).to(dtype),
        (x.sigmoid() * 0.499 * largest + 0.5 * largest).to(dtype),
    ]


# ---- kernels against references ----


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Same bits, except that one NaN is as good as another (ATen's casts disagree on which)."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(
        a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
    )


def references(c: Codec, x: Tensor) -> tuple[Tensor, Tensor]:
    """(payload, decoded) of the reference, whatever kernels there are."""
    payload = torch.zeros(c.payload_bytes(x.shape, x.dtype), dtype=torch.uint8)
    keys = rng.stream_keys(step_key(), 3)
    c.encode_reference(x, payload, keys)
    decoded = torch.empty_like(x)
    c.decode_reference(payload, decoded, keys)
    return payload, decoded


def awkward(size: int, dtype: torch.dtype) -> Tensor:
    """Groups of 256 of every awkward kind, in turn: values over the whole range of `dtype`."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator)
    kinds = torch.arange(size) // 256 % 10
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    x = torch.where(kinds == 1, 0.1, x)  # constant, not a bf16 number
    x = torch.where(kinds == 2, -0.0, x)
    x = torch.where(kinds == 3, x * tiny / 100, x)  # denormal
    x = torch.where(kinds == 4, x * largest / 20, x)  # huge
    x = torch.where(kinds == 5, x.sign() * largest, x)  # the grid itself overflows fp32
    x = torch.where(kinds == 6, x.clamp(min=0), x)
    x = x.to(dtype)
    x[(kinds == 7) & (torch.arange(size) % 256 == 100)] = math.nan
    x[(kinds == 8) & (torch.arange(size) % 256 == 0)] = -math.inf
    x[(kinds == 9) & (torch.arange(size) % 256 == 255)] = math.inf
    return x


def check_kernel(c: Codec, x: Tensor) -> None:
    """encode and decode of x, by whatever runs on its device, give the reference's bits."""
    payload, decoded = references(c, x)
    assert same_bits(c.encode(x, step_key(), 3), payload)
    assert same_numbers(c.decode(payload, x.shape, x.dtype, step_key(), 3), decoded)
