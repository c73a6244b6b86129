"""What `gpu_check` asks of kernels: equality with the reference, bandwidth, CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcompress import costs, rng
from fxcompress.codecs import Codec, codec, fused
from fxcompress.fit import at_rate, fit
from fxcompress.kernels import ahead

CODECS = (
    *("affine(bits=1)", "affine(bits=2)", "affine(bits=4)", "affine(bits=8)", "affine(bits=3)"),
    *("dither(bits=4)", "rotate(bits=1)", "rotate(bits=2)", "rotate(bits=4)", "rotate(bits=5)"),
    *("subsample(rate=0.5)", "subsample(rate=0.0625)", "average(beta=0.5)", "sign(scale=mean)"),
    *("magnitude(levels=4)", "cast(format=bf16)", "cast(format=fp16,rounding=stochastic)"),
    *("cast(format=e4m3)", "cast(format=e5m2,rounding=stochastic)", "bits(bits=1)"),
)
BF16 = ("affine(bits=4)", "dither(bits=4)", "rotate(bits=2)", "cast(format=e4m3)", "bits(bits=1)")
FUSED = ("affine(bits=4)", "dither(bits=4)", "rotate(bits=2)")  # with what stands around them
SIZES = (1, 77, 5000, (1 << 20) + 333)  # tails, and whole tiles with one
KEY = (0x1234567890ABCDEF, 7)
STREAM = 3


# Bytes of each lane that a thread holds, and the least warps of a program: other than the usual.
SHAPES = ((16, 4), (16, 8), (16, 2), (8, 4), (8, 8))


def equality(device: str, deadline: float) -> dict[str, Any]:
    """Each codec's kernels give what its definition gives on the CPU, bit for bit.

    Transform, whose products round otherwise: within that rounding. Rows after the deadline, of
    `time.perf_counter`, are left out.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others are compiling: threads would wait for each other
    try:
        ahead.build(_calls(device))
        rows = [
            {"codec": name, "dtype": str(dtype), **check()}
            for name, dtype, check in _checks(device)
            if time.perf_counter() < deadline
        ]
    finally:
        torch.set_num_threads(threads)
    for row in rows:
        print(row, flush=True)
    return {"ok": all(row["equal"] for row in rows), "rows": rows}


def _checks(device: str) -> Iterable[tuple[str, torch.dtype, Callable[[], dict[str, Any]]]]:
    for dtype, specs in ((torch.float32, CODECS), (torch.bfloat16, BF16)):
        for spec in specs:
            yield spec, dtype, partial(_is_equal, codec(spec), dtype, device)
        for spec in FUSED:
            yield f"{spec}, fused", dtype, partial(_is_equal_fused, codec(spec), dtype, device)
        yield "transform", dtype, partial(_is_transform_equal, dtype, device)


def _calls(device: str) -> Iterable[Callable[[], object]]:
    """What `equality` will call: its kernels are built side by side."""
    key = torch.tensor(KEY, device=device)
    for dtype, specs in ((torch.float32, CODECS), (torch.bfloat16, BF16)):
        for c in map(codec, specs):
            x = torch.empty(SIZES[-1], dtype=torch.bool if c.lossless else dtype, device="meta")
            yield partial(_there_and_back, c, x, key)
        for c in map(codec, FUSED):
            yield partial(_fused_there_and_back, c, torch.empty(SIZES[-1], device="meta"), key)


def _there_and_back(c: Codec, x: Tensor, key: Tensor) -> Tensor:
    return c.decode(c.encode(x, key, STREAM), x.shape, x.dtype, key, STREAM)


def _fused_there_and_back(c: Codec, x: Tensor, key: Tensor) -> Tensor:
    both = fused.encode_filled(c, x, x.new_empty(()), key, STREAM)
    return fused.decode_filled(c, *both, x.shape, x.dtype, key, STREAM)


def _is_equal(c: Codec, dtype: torch.dtype, device: str) -> dict[str, Any]:
    x, key, off = torch.randn(SIZES[-1]).to(dtype), torch.tensor(KEY), {}
    for size in SIZES:
        part = x[:size] > 0 if c.lossless else x[:size]
        expected = c.encode(part, key, STREAM)
        payload = c.encode(part.to(device), key.to(device), STREAM)
        decoded = c.decode(expected, part.shape, part.dtype, key, STREAM)
        found = c.decode(payload, part.shape, part.dtype, key.to(device), STREAM)
        off[f"encode {size}"] = _differing(payload, expected)
        off[f"decode {size}"] = _differing(found, decoded)
    return _verdict(off)


def _differing(found: Tensor, expected: Tensor) -> int:
    return int((found.cpu() != expected).sum())


def _verdict(off: dict[str, int]) -> dict[str, Any]:
    """Elements that differ, by what was compared: only where there are any."""
    return {"equal": not any(off.values()), **{name: n for name, n in off.items() if n}}


def _is_equal_fused(c: Codec, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """With a mask and in units of channels, as the CPU does by parts."""
    key, fill, off = torch.tensor(KEY), torch.tensor(0.75, dtype=dtype), {}
    given, value = key.to(device), fill.to(device)
    for rows in (1, 4321):  # a tail, and whole tiles with one
        own = torch.randn(rows, 48, 5).to(dtype)
        part, shape = own.to(device), own.shape
        payload, mask = fused.compose_filled(c, own, fill, key, STREAM)
        found = fused.encode_filled(c, part, value, given, STREAM)
        off[f"filled {rows}"] = _differing(found[0], payload)
        off[f"mask {rows}"] = _differing(found[1], mask)
        both = (payload.to(device), mask.to(device))
        decoded = fused.decode_filled(c, *both, shape, dtype, given, STREAM)
        expected = fused.compose_unfilled(c, payload, mask, shape, dtype, key, STREAM)
        off[f"decoded {rows}"] = _differing(decoded, expected)
        for kept in (1, 2):  # channels first, channels last
            sizes = [size if dim == kept else 1 for dim, size in enumerate(shape)]
            mean, rstd = torch.randn(sizes), torch.rand(sizes) + 0.1
            units = fused.compose_standardised(c, own, mean, rstd, key, STREAM)
            on_device = (mean.to(device), rstd.to(device))
            coded = fused.encode_standardised(c, part, *on_device, given, STREAM)
            off[f"standardised {rows}, {kept}"] = _differing(coded, units)
    return _verdict(off)


def _correlated(elements: int, dtype: torch.dtype, device: str) -> Tensor:
    """Channels and pixels that a basis can be fitted to."""
    x = torch.randn(elements, device=device).view(-1, 16, 16, 64).cumsum(1).cumsum(2)
    return (x + 4 * x.mean(3, keepdim=True)).to(dtype).contiguous()


def _fitted(sample: Tensor) -> Codec:
    return at_rate(fit(sample.float(), [torch.randn(sample.shape)], -1), 2.0)


def _is_transform_equal(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A payload decodes to the same on both devices; what each encodes is as near to x."""
    x = _correlated(1 << 20, dtype, device)
    sample, key = x.cpu(), torch.tensor(KEY)
    c = _fitted(sample)
    payload = c.encode(x, key.to(device), STREAM)
    found = c.decode(payload, sample.shape, dtype, key.to(device), STREAM).cpu().float()
    same = c.decode(payload.cpu(), sample.shape, dtype, key, STREAM).float()
    other = c.decode(c.encode(sample, key, STREAM), sample.shape, dtype, key, STREAM).float()
    near = 5e-2 if dtype == torch.bfloat16 else 1e-3  # of the spread: an ulp of large values
    errors = [float((y - sample.float()).square().mean()) for y in (found, other)]
    equal = float((found - same).abs().max()) < near * float(sample.float().std())
    return {"equal": equal and abs(errors[0] / errors[1] - 1) < 0.05}


def bandwidth(device: str, elements: int) -> dict[str, Any]:
    """Bytes a second of each codec, beside those of the device's own copy.

    A codec's are those it must move: the tensor once and the payload once.
    """
    found: dict[str, Any] = {"ok": True, "copy_gb_s": {}, "rows": [], "shapes": []}
    busy = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    seconds = partial(costs.gpu_seconds, busy=busy)
    key = torch.tensor(KEY, device=device)
    for dtype, specs in ((torch.bfloat16, CODECS), (torch.float32, FUSED)):
        x = torch.randn(elements, device=device).to(dtype)
        copy = 2 * x.nbytes / seconds(partial(torch.empty_like(x).copy_, x)) / 1e9
        found["copy_gb_s"][str(dtype)] = copy
        for c in map(codec, specs):
            found["rows"] += [_rate(c, x > 0 if c.lossless else x, key, copy, seconds)]
        for c in map(codec, FUSED):
            found["rows"] += [_fused_rate(c, x, key, copy, seconds)]
        if dtype == torch.bfloat16:
            found["shapes"] = [_shapes(codec(spec), x, key, seconds) for spec in FUSED]
        x = _correlated(elements, dtype, device)
        found["rows"] += [_rate(_fitted(x[:64].cpu()), x, key, copy, seconds)]
    return found


Seconds = Callable[[Callable[[], Any]], float]


def _rate(c: Codec, x: Tensor, key: Tensor, copy: float, seconds: Seconds) -> dict[str, Any]:
    payload = c.encode(x, key, STREAM)
    encode = seconds(lambda: c.encode(x, key, STREAM))
    decode = seconds(lambda: c.decode(payload, x.shape, x.dtype, key, STREAM))
    return _rates(str(c), x, x.nbytes + payload.nbytes, encode, decode, copy)


def _fused_rate(c: Codec, x: Tensor, key: Tensor, copy: float, seconds: Seconds) -> dict[str, Any]:
    fill = torch.tensor(0.75, dtype=x.dtype, device=x.device)
    both = fused.encode_filled(c, x, fill, key, STREAM)
    encode = seconds(lambda: fused.encode_filled(c, x, fill, key, STREAM))
    decode = seconds(lambda: fused.decode_filled(c, *both, x.shape, x.dtype, key, STREAM))
    moved = x.nbytes + sum(part.nbytes for part in both)
    return _rates(f"{c} with a mask", x, moved, encode, decode, copy)


def _rates(
    name: str, x: Tensor, moved: int, encode: float, decode: float, copy: float
) -> dict[str, Any]:
    row = {
        "codec": name,
        "dtype": str(x.dtype),
        "encode_gb_s": moved / encode / 1e9,
        "decode_gb_s": moved / decode / 1e9,
        "encode_vs_copy": moved / encode / 1e9 / copy,
        "decode_vs_copy": moved / decode / 1e9 / copy,
    }
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def _shapes(c: Codec, x: Tensor, key: Tensor, seconds: Seconds) -> dict[str, Any]:
    """Encode and decode under other shapes of programs, in microseconds."""
    from fxcompress.kernels.triton import common

    usual, times = common.CONFIG, {}
    payload = c.encode(x, key, STREAM)
    configs = [common.Config(*shape) for shape in SHAPES]
    try:
        for config in configs:  # to build them side by side
            common.CONFIG = config
            ahead.build([partial(_there_and_back, c, x.to("meta"), key)])
        for config in configs:
            common.CONFIG = config
            encode = seconds(lambda: c.encode(x, key, STREAM))
            decode = seconds(lambda: c.decode(payload, x.shape, x.dtype, key, STREAM))
            times[f"{config.vector} B, {config.warps} warps"] = [encode * 1e6, decode * 1e6]
    finally:
        common.CONFIG = usual
    print(c, {k: [round(t, 1) for t in v] for k, v in times.items()}, flush=True)
    return {"codec": str(c), "encode_decode_us": times}


def graphs() -> dict[str, Any]:
    """Capture a step's key, an encode and a decode in a CUDA graph; replay twice.

    Each replay draws new noise, and decodes what eager code does.
    """
    x = torch.randn(100_000, device="cuda")
    c = codec("rotate(bits=2)")
    rng.prepare(x.device)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        key = torch.ops.fxcompress.next_key("", x.device)
        payload = torch.ops.fxcompress.encode(x, key, c.spec, STREAM, [0])
        decoded = torch.ops.fxcompress.decode(
            payload, key, c.spec, STREAM, list(x.shape), [0], x.dtype
        )
        return key, payload, decoded

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        key, payload, decoded = step()
    seen = []
    for _ in range(2):
        graph.replay()
        eager = c.encode(x, key, STREAM)
        again = c.decode(eager, x.shape, x.dtype, key, STREAM)
        same = torch.equal(payload, eager) and torch.equal(decoded, again)
        seen.append((key.tolist(), same))
    advanced = seen[1][0][1] == seen[0][0][1] + 1
    return {"ok": advanced and all(same for _, same in seen), "keys": [key for key, _ in seen]}
