"""One group rotated and coded: what the Triton kernels of rotate and subsample share.

All sums are of integers, so no order matters. A group's eight lanes take three stages of each
Walsh-Hadamard transform without leaving a thread; the stages within a lane add pairs of columns,
first those that a thread holds, then across threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxcompress.kernels.triton.common import hash_bits

BF16_MAX = tl.constexpr(torch.finfo(torch.bfloat16).max)


@triton.jit
def padded_sizes(size, FAST: tl.constexpr):
    """Elements that groups of these sizes are coded as: the next power of two from 32."""
    if FAST:
        return size
    else:
        n = tl.maximum(size, 32) - 1
        n |= n >> 1
        n |= n >> 2
        n |= n >> 4
        n |= n >> 8
        return n + 1


@triton.jit
def add_columns(lanes, h: tl.constexpr):
    """One stage within each lane: columns c and c + h become their sum and their difference."""
    return [add_pairs(y, h) for y in lanes]


@triton.jit
def add_pairs(y, h: tl.constexpr):
    pairs = tl.reshape(y, (y.shape[0], y.shape[1] // (2 * h), 2, h))
    odd = tl.arange(0, 2)[None, None, :, None]
    return tl.reshape(tl.sum(pairs, 2, keep_dims=True) - 2 * odd * pairs, y.shape)


@triton.jit
def add_lanes(y, h: tl.constexpr):
    """One stage across lanes."""
    return [
        y[lane - h] - y[lane] if lane & h else y[lane] + y[lane + h]
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]


@triton.jit
def hadamard(lanes, WIDTH: tl.constexpr):
    """Walsh-Hadamard transform of each group. Shorter groups: columns past their own are junk."""
    lanes = add_lanes(add_lanes(add_lanes(lanes, 1), 2), 4)
    for h in tl.static_range(1, WIDTH):
        if h & (h - 1) == 0:
            lanes = add_columns(lanes, h)
    return lanes


@triton.jit
def sign_lanes(lanes, offsets, word, coded, k_a, k_b):
    """Integers times the signs of their elements, whose hashes start at `word`; 0 if not coded."""
    return [
        tl.where(coded, lanes[lane] * signs(offsets[lane], word, k_a, k_b), 0)
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]


@triton.jit
def signs(offsets, word, k_a, k_b):
    """1 or -1 for each element."""
    bits = hash_bits(word + (offsets >> 5).to(tl.uint32), k_a, k_b) >> (offsets & 31).to(tl.uint32)
    return 1 - 2 * (bits & 1).to(tl.int32)


@triton.jit
def power(field):
    """The fp32 with this exponent field."""
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent(lanes):
    """The largest exponent field of each group."""
    most = tl.zeros(lanes[0].shape, tl.int32)
    for lane in tl.static_range(8):
        most = tl.maximum(most, lanes[lane].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(most, 1, keep_dims=True) >> 23


@triton.jit
def total(lanes):
    """The sum of each group of int32."""
    found = lanes[0]
    for lane in tl.static_range(1, 8):
        found += lanes[lane]
    return tl.sum(found, 1, keep_dims=True)


@triton.constexpr_function
def four_levels(levels, k):
    """Levels 4k .. 4k + 3 as the bytes of an int."""
    return sum(level << (8 * i) for i, level in enumerate(levels[4 * k : 4 * k + 4]))


@triton.jit
def level(number, LEVELS: tl.constexpr):
    """The level of that number, by shifts: comparisons took twice the instructions at 4 bits."""
    word = tl.full(number.shape, four_levels(LEVELS, 0), tl.uint32)
    for k in tl.static_range(1, (len(LEVELS) + 3) // 4):
        word = tl.where(number >= 4 * k, four_levels(LEVELS, k), word)
    return ((word >> (number % 4 * 8).to(tl.uint32)) & 255).to(tl.int32)


@triton.jit
def signed_level(code, LEVELS: tl.constexpr):
    """What a code stands for."""
    size = level(code % len(LEVELS), LEVELS)
    return tl.where(code >= len(LEVELS), -size, size)


@triton.jit
def quantize(w, r, regular, coded, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr):
    """(code, T^2, T*q, q^2) of the coordinates of one lane."""
    t = ((tl.where(coded, w, 0).to(tl.float32) * r).to(tl.int32) + 8) >> 4
    number = tl.zeros(t.shape, tl.int32)
    for k in tl.static_range(len(THRESHOLDS)):
        number += (tl.abs(t) >= THRESHOLDS[k]).to(tl.int32)
    q = tl.where(coded, level(number, LEVELS), 0)
    code = tl.where(regular, number + (t < 0).to(tl.int32) * len(LEVELS), 0)
    return code, t * t, tl.abs(t) * q, q * q


@triton.jit
def centre(lanes, inside, size, CENTRED: tl.constexpr):
    """(v*f - mean*f, bf16 mean, 1/f, whether all of it is finite) of groups of fp32 lanes."""
    field = exponent(lanes)
    finite = field < 255
    field = tl.minimum(tl.maximum(field, 1), 253)
    f, unit = power(254 - field), power(field)
    lanes = [tl.where(finite, lane * f, 0.0) for lane in lanes]
    mean = tl.zeros(unit.shape, tl.float32)
    if CENTRED:
        fixed = [(lane * 65536.0).to(tl.int32) for lane in lanes]
        mean = tl.math.div_rn(total(fixed).to(tl.float32), size.to(tl.float32) * 65536.0) * unit
        mean = tl.where(mean > BF16_MAX, BF16_MAX, tl.where(mean < -BF16_MAX, -BF16_MAX, mean))
        shift = mean.to(tl.bfloat16).to(tl.float32) * f
        lanes = [
            tl.where(inside[lane], lanes[lane] - shift, 0.0) for lane in (0, 1, 2, 3, 4, 5, 6, 7)
        ]
    return lanes, mean.to(tl.bfloat16), unit, finite


@triton.jit
def code(
    lanes,
    unit,
    finite,
    n,
    gain,
    offsets,
    word,
    groups,
    coded,
    k_a,
    k_b,
    LEVELS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    EDEN: tl.constexpr,
):
    """(codes, scale as the bits of bf16) of what `centre` gave; `gain` multiplies what is decoded.

    n: elements that each group is coded as; word: the number of the tile's first hash of signs.
    """
    WIDTH: tl.constexpr = lanes[0].shape[1]
    inner = exponent(lanes)
    e = power(254 - inner)
    fixed = [(lane * e * 65536.0).to(tl.int32) for lane in lanes]
    short = [(c + 64) >> 7 for c in fixed]
    energy = total([c * c for c in short])
    regular = finite & (energy > 0)
    s = tl.math.sqrt_rn(energy.to(tl.float32) * n.to(tl.float32)) * 0.001953125
    r = tl.where(regular, tl.math.div_rn(0.25, tl.where(regular, s, 1.0)), 0.0)

    w = hadamard(sign_lanes(fixed, offsets, word, coded, k_a, k_b), WIDTH)
    w = hadamard(sign_lanes(w, offsets, word + (1 << 30), coded, k_a, k_b), WIDTH)
    drawn = [quantize(y, r, regular, coded, LEVELS, THRESHOLDS) for y in w]
    tq = total([found[2] for found in drawn]).to(tl.float32)
    if EDEN:
        ratio = tl.math.div_rn(total([found[1] for found in drawn]).to(tl.float32), tq)
    else:
        ratio = tl.math.div_rn(tq, total([found[3] for found in drawn]).to(tl.float32))
    each = tl.math.div_rn(gain, 1024.0 * n.to(tl.float32) * n.to(tl.float32))
    exact = s * ratio * each * power(inner) * unit
    noise = hash_bits(groups.to(tl.uint32) + (1 << 31), k_a, k_b) >> 16
    rounded = (exact.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16
    scale = tl.where(finite, tl.where(regular, rounded, 0), 0x7FC0)
    return [found[0] for found in drawn], scale.to(tl.int16)


@triton.jit
def decode(codes, scale, offsets, word, coded, k_a, k_b, LEVELS: tl.constexpr):
    """fp32 lanes without their mean, from what `code` gave."""
    WIDTH: tl.constexpr = codes[0].shape[1]
    scale = (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    q = [tl.where(coded, signed_level(number, LEVELS), 0) for number in codes]
    w = sign_lanes(hadamard(q, WIDTH), offsets, word + (1 << 30), coded, k_a, k_b)
    w = hadamard(w, WIDTH)
    # The sign last, as in the reference: it shows where w is 0.
    return [
        w[lane].to(tl.float32) * scale * signs(offsets[lane], word, k_a, k_b).to(tl.float32)
        for lane in (0, 1, 2, 3, 4, 5, 6, 7)
    ]
