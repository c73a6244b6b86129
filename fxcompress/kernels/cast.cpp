// Kernels of codecs/cast.py: every format by integers, so that all loops vectorise.
// Of a format with M bits of mantissa and an exponent biased by B, the code of an fp32 number in
// its range is its bits, cut to M of mantissa, less the difference of the biases. Subnormals are
// read off a sum with a power of two, whose spacing in fp32 is theirs.

namespace {

template <class StoredNumber, int mantissa, int bias_of_exponent>
struct Format {
    using Number = StoredNumber;
    static constexpr int M = mantissa, bias = bias_of_exponent, dropped = 23 - M;
    static constexpr int width = 8 * sizeof(Number);
    static constexpr bool scaled = bias < 127;
    static constexpr u32 shift = u32(127 - bias) << M;             // of codes
    static constexpr u32 smallest = u32(128 - bias) << 23;         // bits of the smallest normal
    static constexpr u32 spaced = u32(128 - bias - M + 23) << 23;  // of spacing 2^(1-bias-M)
};

struct ToBF16 : Format<u16, 7, 127> {
    static constexpr float largest = BF16::limit;
    static constexpr u32 nan = 0x7fc0;
};
struct ToF16 : Format<u16, 10, 15> {
    static constexpr float largest = F16::limit;
    static constexpr u32 nan = 0x7e00;
};
struct ToE4M3 : Format<u8, 3, 7> {
    static constexpr float largest = 448.0f;
    static constexpr u32 nan = 0x7f;
};
struct ToE5M2 : Format<u8, 2, 15> {
    static constexpr float largest = 57344.0f;
    static constexpr u32 nan = 0x7f;
};

// The code of |y|, without its sign: the nearest, or one of the two next to it by `hash`.
template <class F, bool stochastic>
inline u32 code_of(float magnitude, u32 hash) {
    u32 bits = bit_cast<u32>(magnitude);
    const u32 below = u32(int32_t(bits - F::smallest) >> 31);  // all ones below the normals
    if constexpr (stochastic) {
        const float raised = magnitude + bit_cast<float>(below & F::smallest);
        bits = bit_cast<u32>(raised) + (hash >> (32 - F::dropped));
        return (bits >> F::dropped) - F::shift - (below & (1u << F::M));
    } else {
        const u32 odd = (bits >> F::dropped) & 1;
        const u32 normal = ((bits + (1u << (F::dropped - 1)) - 1 + odd) >> F::dropped) - F::shift;
        if constexpr (!F::scaled) return normal;
        const u32 sum = bit_cast<u32>(magnitude + bit_cast<float>(F::spaced)) & 0x7fffff;
        return (sum & below) | (normal & ~below);
    }
}

inline u16* scales_of(u8* payload, i64 bytes) {
    return reinterpret_cast<u16*>(payload + (bytes + 1) / 2 * 2);
}

template <class Type, class F, bool stochastic>
void encode_cast(const typename Type::Stored* x, u8* payload, i64 numel, i64 group, u32 k_a,
                 u32 k_b, int threads) {
    using Number = typename F::Number;
    const i64 bytes = numel * i64(sizeof(Number));
    if (F::scaled && bytes % 2) payload[bytes] = 0;
    auto* numbers = reinterpret_cast<Number*>(payload);
    u16* scales = scales_of(payload, bytes);
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8*) {
        const auto* __restrict in = x + start;
        auto* __restrict out = numbers + start;
        float scale = 1.0f;
        if constexpr (F::scaled) {
            u32 most = 0;
#pragma omp simd reduction(max : most)
            for (i64 i = 0; i < size; i++) {
                const u32 bits = bit_cast<u32>(Type::load(in[i])) & 0x7fffffff;
                const u32 finite = bits < 0x7f800000 ? bits : 0;
                most = finite > most ? finite : most;
            }
            const float exact = bit_cast<float>(most) / F::largest;
            const u32 up = bit_cast<u32>(exact < 0x1p-126f ? 0x1p-126f : exact) + 0xffff;
            scales[start / group] = u16(up >> 16);
            scale = bit_cast<float>(up & 0xffff0000u);
        }
        const u32 first = u32(start);
#pragma omp simd
        for (i64 i = 0; i < size; i++) {
            const u32 bits = bit_cast<u32>(Type::load(in[i])), magnitude = bits & 0x7fffffff;
            const bool finite = magnitude < 0x7f800000;
            float y = bit_cast<float>(magnitude);
            if (F::scaled) {
                y = y / scale;
                y = y < F::largest ? y : F::largest;
            }
            const u32 hash = stochastic ? mix(mix((first + u32(i)) ^ k_a) + k_b) : 0;
            const u32 sign = (bits >> 31) << (F::width - 1);
            const u32 code = code_of<F, stochastic>(y, hash) | sign;
            out[i] = Number(finite ? code : F::nan);
        }
    });
}

template <class Type, class F>
void decode_cast(const u8* payload, typename Type::Stored* x, i64 numel, i64 group, int threads) {
    using Number = typename F::Number;
    const auto* numbers = reinterpret_cast<const Number*>(payload);
    const i64 bytes = numel * i64(sizeof(Number));
    const u16* scales = scales_of(const_cast<u8*>(payload), bytes);
    want_huge_pages(x, numel * i64(sizeof(*x)));
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8*) {
        const auto* __restrict in = numbers + start;
        auto* __restrict out = x + start;
        const float scale = F::scaled ? BF16::load(scales[start / group]) : 1.0f;
        const float unit = bit_cast<float>(u32(254 - F::bias) << 23);  // 2^(127-bias)
#pragma omp simd
        for (i64 i = 0; i < size; i++) {
            const u32 code = in[i] & u32((1ull << (F::width - 1)) - 1);
            float value = bit_cast<float>(code << F::dropped);
            if (F::scaled) {
                value = value * unit * scale;  // both products are exact
                value = code == F::nan ? bit_cast<float>(0x7fc00000u) : value;
            }
            value = value > Type::limit ? Type::limit : value;
            const u32 sign = u32(in[i]) << (32 - F::width) & 0x80000000u;
            out[i] = Type::store(bit_cast<float>(bit_cast<u32>(value) | sign));
        }
    });
}

template <class Call>
bool choose_cast(int type, int format, Call call) {
    return choose<F32, BF16, F16>(type, [=](auto t) {
        return choose<ToBF16, ToF16, ToE4M3, ToE5M2>(format, [=](auto f) { return call(t, f); });
    });
}

}  // namespace

EXPORT bool fxc_cast_encode(const void* x, u8* payload, i64 numel, i64 group, int format,
                            int stochastic, int type, u32 k_a, u32 k_b, int threads) {
    return choose_cast(type, format, [=](auto t, auto f) {
        using T = decltype(t);
        auto* in = static_cast<const typename T::Stored*>(x);
        if (stochastic)
            encode_cast<T, decltype(f), true>(in, payload, numel, group, k_a, k_b, threads);
        else
            encode_cast<T, decltype(f), false>(in, payload, numel, group, 0, 0, threads);
        return true;
    });
}

EXPORT bool fxc_cast_decode(const u8* payload, void* x, i64 numel, i64 group, int format,
                            int type, int threads) {
    return choose_cast(type, format, [=](auto t, auto f) {
        auto* out = static_cast<typename decltype(t)::Stored*>(x);
        decode_cast<decltype(t), decltype(f)>(payload, out, numel, group, threads);
        return true;
    });
}
