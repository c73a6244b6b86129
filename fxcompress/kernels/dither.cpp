// Kernel of codecs/dither.py, whose encoder is affine's.

namespace {

template <class Type>
void decode_dither(const u8* payload, typename Type::Stored* x, i64 numel, i64 group, int bits,
                   const u8* mask, u32 k_a, u32 k_b, int threads) {
    const i64 code_bytes = up8(numel) / 8 * bits, groups = (numel + group - 1) / group;
    const u16* steps = reinterpret_cast<const u16*>(payload + (code_bytes + 1) / 2 * 2);
    const u16* minima = steps + groups;
    want_huge_pages(x, numel * i64(sizeof(*x)));
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8* codes) {
        choose_bits(bits, [=](auto b) {
            unpack<b()>(payload + start / 8 * bits, codes, up8(size));
            return true;
        });
        const float step = BF16::load(steps[start / group]), fine = step * 0x1p-16f;
        const float lo = BF16::load(minima[start / group]);
        const u32 first = u32(start);
        auto* __restrict out = x + start;
#pragma omp simd
        for (i64 i = 0; i < size; i++) {
            const u32 hash = mix(mix((first + u32(i)) ^ k_a) + k_b);
            const int32_t d = 0x7fff - 2 * int32_t(hash >> 17);
            float value = (lo + float(int32_t(codes[i])) * step) + float(d) * fine;
            value = value > Type::limit ? Type::limit : value;
            value = value < -Type::limit ? -Type::limit : value;
            out[i] = Type::store(value);
        }
        if (mask) clear_masked(out, size, mask + start / 8);
    });
}

}  // namespace

EXPORT bool fxc_dither_decode(const u8* payload, void* x, i64 numel, i64 group, int bits,
                              int type, const u8* mask, u32 k_a, u32 k_b, int threads) {
    return choose<F32, BF16, F16>(type, [=](auto t) {
        auto* out = static_cast<typename decltype(t)::Stored*>(x);
        decode_dither<decltype(t)>(payload, out, numel, group, bits, mask, k_a, k_b, threads);
        return true;
    });
}
