// Kernels of codecs/magnitude.py, with a bf16 step.

namespace {

// |x|_2 / max|x| of a group, by a sum of integers.
template <class Type>
inline float relative_norm(const typename Type::Stored* __restrict in, i64 size, float most) {
    i64 total = 0;
#pragma omp simd reduction(+ : total)
    for (i64 i = 0; i < size; i++) {
        const float value = bit_cast<float>(bit_cast<u32>(Type::load(in[i])) & 0x7fffffff);
        const int32_t share = int32_t(value / most * 0x1p15f);
        total += i64(share * share);
    }
    return __builtin_sqrtf(float(total)) * 0x1p-15f;
}

template <class Type, int bits>
void encode_magnitude(const typename Type::Stored* x, u8* payload, i64 numel, i64 group,
                      int32_t levels, bool euclidean, u32 k_a, u32 k_b, int threads) {
    const i64 code_bytes = up8(numel) / 8 * bits;
    if (code_bytes % 2) payload[code_bytes] = 0;
    u16* steps = reinterpret_cast<u16*>(payload + (code_bytes + 1) / 2 * 2);
    const float part = float(1.0 / levels), limit = float(levels) * 0x1p22f;
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8* codes) {
        const auto* __restrict in = x + start;
        u32 largest = 0;
#pragma omp simd reduction(max : largest)
        for (i64 i = 0; i < size; i++) {
            const u32 magnitude = bit_cast<u32>(Type::load(in[i])) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        const bool finite = largest < 0x7f800000;
        const float most = bit_cast<float>(largest);
        float exact = most * part;
        if (euclidean && finite && largest) exact *= relative_norm<Type>(in, size, most);
        const u32 up = bit_cast<u32>(exact < 0x1p-100f ? 0x1p-100f : exact) + 0xffff;
        const bool regular = finite && up < 0x7f800000;
        steps[start / group] = regular ? u16(up >> 16) : 0x7fc0;
        const i64 padded = up8(size);
        u8* out = payload + start / 8 * bits;
        if (!regular) {
            std::memset(out, 0, padded / 8 * bits);
            return;
        }
        const float r = 0x1p22f / bit_cast<float>(up & 0xffff0000u);
        const u32 first = u32(start);
#pragma omp simd
        for (i64 i = 0; i < size; i++) {
            float scaled = Type::load(in[i]) * r;
            scaled = scaled < limit ? scaled : limit;
            scaled = scaled > -limit ? scaled : -limit;
            const int32_t cut = int32_t(scaled);
            const int32_t fixed = cut - (float(cut) > scaled ? 1 : 0);  // its floor
            const u32 hash = mix(mix((first + u32(i)) ^ k_a) + k_b);
            codes[i] = u8(((fixed + int32_t(hash >> 10)) >> 22) + levels);
        }
        std::memset(codes + size, 0, padded - size);
        pack<bits>(codes, out, padded);
    });
}

template <class Type, int bits>
void decode_magnitude(const u8* payload, typename Type::Stored* x, i64 numel, i64 group,
                      int32_t levels, int threads) {
    const i64 code_bytes = up8(numel) / 8 * bits;
    const u16* steps = reinterpret_cast<const u16*>(payload + (code_bytes + 1) / 2 * 2);
    want_huge_pages(x, numel * i64(sizeof(*x)));
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8* codes) {
        unpack<bits>(payload + start / 8 * bits, codes, up8(size));
        const float step = BF16::load(steps[start / group]);
        auto* __restrict out = x + start;
#pragma omp simd
        for (i64 i = 0; i < size; i++) {
            float value = float(int32_t(codes[i]) - levels) * step;
            value = value > Type::limit ? Type::limit : value;
            value = value < -Type::limit ? -Type::limit : value;
            out[i] = Type::store(value);
        }
    });
}

}  // namespace

EXPORT bool fxc_magnitude_encode(const void* x, u8* payload, i64 numel, i64 group, int bits,
                                 int levels, int euclidean, int type, u32 k_a, u32 k_b,
                                 int threads) {
    return choose_float(type, bits, [=](auto t, auto b) {
        auto* in = static_cast<const typename decltype(t)::Stored*>(x);
        encode_magnitude<decltype(t), b()>(in, payload, numel, group, levels, euclidean, k_a, k_b,
                                           threads);
        return true;
    });
}

EXPORT bool fxc_magnitude_decode(const u8* payload, void* x, i64 numel, i64 group, int bits,
                                 int levels, int type, int threads) {
    return choose_float(type, bits, [=](auto t, auto b) {
        auto* out = static_cast<typename decltype(t)::Stored*>(x);
        decode_magnitude<decltype(t), b()>(payload, out, numel, group, levels, threads);
        return true;
    });
}
