// Kernels of codecs/affine.py.
// Measured on one Zen 4 core, 51 MB of fp32, 4 bits: encode 9.0, decode 16.4 GB/s of fp32 read or
// written, where memcpy copies 11.6 (and a fresh output costs more than all: page faults, 2.1).

namespace {

struct Grid {
    float lo, step;
};

// From the ends of the group in the total order of its fp32 bits.
template <int bits>
inline Grid grid(int32_t lowest, int32_t highest) {
    constexpr float top = float((1 << bits) - 1), inverse = float(1.0 / ((1 << bits) - 1));
    const Grid bad = {0.0f, bit_cast<float>(0x7fc00000u)};
    const u32 low = u32(lowest ^ ((lowest >> 31) & 0x7fffffff));
    const u32 high = u32(highest ^ ((highest >> 31) & 0x7fffffff));
    if ((low & 0x7fffffff) >= 0x7f800000 || (high & 0x7fffffff) >= 0x7f800000) return bad;
    const float lo = bit_cast<float>((low + (low >> 31 ? 0xffffu : 0u)) & 0xffff0000u);
    const float max = bit_cast<float>(high);
    if (!(max > lo)) return {lo, 0.0f};
    float exact = (max - lo) * inverse;
    if (exact < 0x1p-100f) exact = 0x1p-100f;
    const float step = bit_cast<float>((bit_cast<u32>(exact) + 0xffffu) & 0xffff0000u);
    if ((bit_cast<u32>(step * top) & 0x7fffffff) >= 0x7f800000) return bad;
    return {lo, step};
}

// Codes of one group, whose first element has the number `first`; returns its grid.
template <class Type, int bits>
inline Grid code_group(const typename Type::Stored* __restrict in, i64 size, u32 first, u32 k_a,
                       u32 k_b, u8* codes, u8* out) {
    constexpr int32_t top = (1 << bits) - 1;
    int32_t lowest = INT32_MAX, highest = INT32_MIN;
#pragma omp simd reduction(min : lowest) reduction(max : highest)
    for (i64 i = 0; i < size; i++) {
        int32_t s = bit_cast<int32_t>(Type::load(in[i]));
        int32_t order = s ^ ((s >> 31) & 0x7fffffff);
        lowest = order < lowest ? order : lowest;
        highest = order > highest ? order : highest;
    }
    const Grid found = grid<bits>(lowest, highest);
    const float lo = found.lo, step = found.step;
    const i64 padded = up8(size);
    if (!(step > 0)) {  // constant, or NaN
        std::memset(out, 0, padded / 8 * bits);
        return found;
    }
    const float r = 0x1p22f / step;
#pragma omp simd
    for (i64 i = 0; i < size; i++) {
        int32_t fixed = int32_t((Type::load(in[i]) - lo) * r);
        fixed = fixed < (top << 22) ? fixed : (top << 22);
        u32 hash = mix(mix((first + u32(i)) ^ k_a) + k_b);
        int32_t q = (fixed + int32_t(hash >> 10)) >> 22;
        codes[i] = u8(q < top ? q : top);
    }
    std::memset(codes + size, 0, padded - size);
    pack<bits>(codes, out, padded);
    return found;
}

struct Prepared {  // a group after its prologue
    using Stored = float;
    static inline float load(float x) { return x; }
};

template <int bits>  // not inlined: the same for all types
__attribute__((noinline)) Grid code_prepared(const float* c, i64 size, u32 first, u32 k_a, u32 k_b,
                                             u8* codes, u8* out) {
    return code_group<Prepared, bits>(c, size, first, k_a, k_b, codes, out);
}

template <class Type, int bits>
void encode_affine(const typename Type::Stored* x, u8* payload, i64 numel, i64 group,
                   const Prologue* before, u32 k_a, u32 k_b, int threads) {
    const i64 code_bytes = up8(numel) / 8 * bits, groups = (numel + group - 1) / group;
    if (code_bytes % 2) payload[code_bytes] = 0;
    u16* steps = reinterpret_cast<u16*>(payload + (code_bytes + 1) / 2 * 2);
    u16* minima = steps + groups;
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8* codes) {
        u8* out = payload + start / 8 * bits;
        Grid found;
        if (before) {
            alignas(32) float c[prepared];
            prepare<Type>(x, start, size, *before, c, codes);
            found = code_prepared<bits>(c, size, u32(start), k_a, k_b, codes, out);
        } else {
            found = code_group<Type, bits>(x + start, size, u32(start), k_a, k_b, codes, out);
        }
        steps[start / group] = u16(bit_cast<u32>(found.step) >> 16);
        minima[start / group] = u16(bit_cast<u32>(found.lo) >> 16);
    });
}

template <class Type, int bits>
void decode_affine(const u8* payload, typename Type::Stored* x, i64 numel, i64 group,
                   const u8* mask, int threads) {
    const i64 code_bytes = up8(numel) / 8 * bits, groups = (numel + group - 1) / group;
    const u16* steps = reinterpret_cast<const u16*>(payload + (code_bytes + 1) / 2 * 2);
    const u16* minima = steps + groups;
    want_huge_pages(x, numel * i64(sizeof(*x)));
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8* codes) {
        unpack<bits>(payload + start / 8 * bits, codes, up8(size));
        const float step = BF16::load(steps[start / group]);
        const float lo = BF16::load(minima[start / group]);
        auto* __restrict out = x + start;
#pragma omp simd
        for (i64 i = 0; i < size; i++) {
            float value = lo + float(int32_t(codes[i])) * step;
            value = value > Type::limit ? Type::limit : value;
            value = value < -Type::limit ? -Type::limit : value;
            out[i] = Type::store(value);
        }
        if (mask) clear_masked(out, size, mask + start / 8);
    });
}

}  // namespace

EXPORT bool fxc_affine_encode(const void* x, u8* payload, i64 numel, i64 group, int bits,
                              int type, const Prologue* before, u32 k_a, u32 k_b, int threads) {
    return choose_float(type, bits, [=](auto t, auto b) {
        auto* in = static_cast<const typename decltype(t)::Stored*>(x);
        encode_affine<decltype(t), b()>(in, payload, numel, group, before, k_a, k_b, threads);
        return true;
    });
}

EXPORT bool fxc_affine_decode(const u8* payload, void* x, i64 numel, i64 group, int bits,
                              int type, const u8* mask, int threads) {
    return choose_float(type, bits, [=](auto t, auto b) {
        auto* out = static_cast<typename decltype(t)::Stored*>(x);
        decode_affine<decltype(t), b()>(payload, out, numel, group, mask, threads);
        return true;
    });
}
