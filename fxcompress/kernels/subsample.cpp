// Kernels of codecs/subsample.py, after those of rotate.cpp.

namespace {

constexpr i64 drawn_group = 256, longest_block = 16;

// Offsets of the elements drawn from `blocks` blocks, from the first one on.
inline void draw(u32* __restrict offsets, i64 blocks, i64 block, u32 first, Keys keys) {
    const Keys exchanged = {keys.b, keys.a};
    const int shift = 32 - __builtin_ctzll(static_cast<unsigned long long>(block));
#pragma omp simd
    for (i64 j = 0; j < blocks; j++) offsets[j] = exchanged.hash(first + u32(j)) >> shift;
}

template <class Type>
void encode_subsample(const typename Type::Stored* x, u8* payload, const int32_t* levels,
                      i64 numel, i64 block, const Prologue* before, Keys keys, int threads) {
    const Levels<1> table(levels);
    const Sections<1> sections(payload, (numel + block - 1) / block, drawn_group);
    for_groups(numel, drawn_group * block, threads, [=](i64 start, i64 size, u8* codes) {
        alignas(32) float c[drawn_group * longest_block], drawn[drawn_group];
        u32 offsets[drawn_group];
        if (before) {
            prepare<Type>(x, start, size, *before, c, codes);
        } else {
#pragma omp simd
            for (i64 i = 0; i < size; i++) c[i] = Type::load(x[start + i]);
        }
        const Centre found = centre(c, size, true);
        const i64 blocks = (size + block - 1) / block, first = start / block;
        for (i64 i = size; i < blocks * block; i++) c[i] = 0.0f;
        draw(offsets, blocks, block, u32(first), keys);
        for (i64 j = 0; j < blocks; j++) drawn[j] = c[j * block + offsets[j]];
        const i64 g = first / drawn_group;
        const u16 scale = quantise<1>(drawn, blocks, found.unit, table, true, float(block),
                                      u32(first / 32), u32(g), keys, codes);
        sections.scales[g] = scale;
        const bool finite = found.unit == found.unit;
        sections.means[g] = finite ? u16(bit_cast<u32>(found.mean) >> 16) : scale;
        pack<1>(codes, payload + first / 8, padded(blocks));
    });
}

template <class Type>
void decode_subsample(const u8* payload, typename Type::Stored* x, const int32_t* levels,
                      i64 numel, i64 block, Keys keys, int threads) {
    const Levels<1> table(levels);
    const Sections<1> sections(const_cast<u8*>(payload), (numel + block - 1) / block, drawn_group);
    for_output_groups(x, numel, drawn_group * block, threads, [=](i64 start, i64 size, u8* codes) {
        alignas(32) int32_t h[most];
        u32 offsets[drawn_group];
        typename Type::Stored drawn[drawn_group];
        const i64 blocks = (size + block - 1) / block, first = start / block;
        const i64 g = first / drawn_group;
        const u32 word = u32(first / 32);
        const float mean = BF16::load(sections.means[g]), scale = BF16::load(sections.scales[g]);
        unpack<1>(payload + first / 8, codes, padded(blocks));
        dequantise<1>(codes, table, padded(blocks), word, keys, h);
        store_group<Type>(h, drawn, blocks, mean, scale, word, keys);
        draw(offsets, blocks, block, u32(first), keys);
        float rest = mean > Type::limit ? Type::limit : mean;
        rest = rest < -Type::limit ? -Type::limit : rest;
        const auto other = Type::store(rest);
        auto* __restrict out = x + start;
        for (i64 i = 0; i < size; i++) out[i] = other;
        for (i64 j = 0; j < blocks; j++) {
            const i64 at = j * block + offsets[j];
            if (at < size) out[at] = drawn[j];
        }
    });
}

}  // namespace

EXPORT bool fxc_subsample_encode(const void* x, u8* payload, i64 numel, const int32_t* levels,
                                 int block, int type, const Prologue* before, u32 k_a, u32 k_b,
                                 int threads) {
    return choose<F32, BF16, F16>(type, [=](auto t) {
        auto* in = static_cast<const typename decltype(t)::Stored*>(x);
        encode_subsample<decltype(t)>(in, payload, levels, numel, block, before, Keys{k_a, k_b},
                                      threads);
        return true;
    });
}

EXPORT bool fxc_subsample_decode(const u8* payload, void* x, i64 numel, const int32_t* levels,
                                 int block, int type, u32 k_a, u32 k_b, int threads) {
    return choose<F32, BF16, F16>(type, [=](auto t) {
        auto* out = static_cast<typename decltype(t)::Stored*>(x);
        decode_subsample<decltype(t)>(payload, out, levels, numel, block, Keys{k_a, k_b}, threads);
        return true;
    });
}
