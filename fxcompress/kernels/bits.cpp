// Kernels of codecs/bits.py: only the low byte of an item can tell its code.

namespace {

constexpr i64 kGroup = 256;

template <class Item, int bits>
void encode_bits(const Item* x, u8* payload, i64 numel, i64 low, int threads) {
    constexpr u8 mask = u8((1 << bits) - 1);
    for_groups(numel, kGroup, threads, [=](i64 start, i64 size, u8* codes) {
        const Item* __restrict in = x + start;
#pragma omp simd
        for (i64 i = 0; i < size; i++) codes[i] = u8(u8(in[i]) - u8(low)) & mask;
        std::memset(codes + size, 0, up8(size) - size);
        pack<bits>(codes, payload + start / 8 * bits, up8(size));
    });
}

template <class Item, int bits>
void decode_bits(const u8* payload, Item* x, i64 numel, i64 low, int threads) {
    want_huge_pages(x, numel * i64(sizeof(*x)));
    for_groups(numel, kGroup, threads, [=](i64 start, i64 size, u8* codes) {
        unpack<bits>(payload + start / 8 * bits, codes, up8(size));
        Item* __restrict out = x + start;
#pragma omp simd
        for (i64 i = 0; i < size; i++) out[i] = Item(Item(codes[i]) + Item(low));
    });
}

template <class Call>  // call(item, bits)
bool choose_item(int log2_size, int bits, Call call) {
    return choose<u8, u16, u32, uint64_t>(
        log2_size, [=](auto t) { return choose_bits(bits, [=](auto b) { return call(t, b); }); });
}

}  // namespace

EXPORT bool fxc_bits_encode(const void* x, u8* payload, i64 numel, i64 low, int bits,
                            int log2_size, int threads) {
    return choose_item(log2_size, bits, [=](auto t, auto b) {
        auto* in = static_cast<const decltype(t)*>(x);
        encode_bits<decltype(t), b()>(in, payload, numel, low, threads);
        return true;
    });
}

EXPORT bool fxc_bits_decode(const u8* payload, void* x, i64 numel, i64 low, int bits,
                            int log2_size, int threads) {
    return choose_item(log2_size, bits, [=](auto t, auto b) {
        auto* out = static_cast<decltype(t)*>(x);
        decode_bits<decltype(t), b()>(payload, out, numel, low, threads);
        return true;
    });
}
