// What the CPU kernels of all codecs share. cpu.py compiles this file and those of a few families as
// one source, through torch_private.load_cpp, which keeps floating point exact. Kernels are single
// pass, have a C ABI (ctypes) and give the bits that the reference in fxcompress/codecs/ defines.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// ---- element types: exact widening to fp32 bits, and rounding to nearest even ----

struct F32 {
    using Stored = u32;
    static constexpr float limit = 3.4028234663852886e38f;
    static inline float load(u32 x) { return bit_cast<float>(x); }
    static inline u32 store(float x) { return bit_cast<u32>(x); }
};

struct BF16 {
    using Stored = u16;
    static constexpr float limit = 3.3895313892515355e38f;
    static inline float load(u16 x) { return bit_cast<float>(u32(x) << 16); }
    static inline u16 store(float x) {
        u32 bits = bit_cast<u32>(x);
        u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return u16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
};

struct F16 {  // by integers and exact multiplications: vectorises on every target
    using Stored = u16;
    static constexpr float limit = 65504.0f;
    static inline float load(u16 x) {
        u32 magnitude = u32(x & 0x7fff) << 13, sign = u32(x & 0x8000) << 16;
        u32 finite = bit_cast<u32>(bit_cast<float>(magnitude) * 0x1p112f);  // denormals too
        u32 special = magnitude | 0x7f800000;  // Inf and NaN
        return bit_cast<float>((magnitude >= 0x0f800000 ? special : finite) | sign);
    }
    static inline u16 store(float x) {  // |x| <= limit or NaN
        u32 bits = bit_cast<u32>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
        // Below 2^-14 a half is a multiple of 2^-24; adding 0.5 makes fp32 round to just that.
        u32 small = bit_cast<u32>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
        u32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        u32 half = magnitude < 0x38800000 ? small : normal;
        return u16((magnitude > 0x7f800000 ? 0x7e00 : half) | sign);
    }
};

inline u32 mix(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

struct Keys {
    u32 a, b;
    inline u32 hash(u32 index) const { return mix(mix(index ^ a) + b); }
};

// ---- planar packing of one group of `size` (a multiple of 8) codes ----

template <int width, int shift>
inline void pack_section(const u8* __restrict q, u8* __restrict out, i64 plane) {
    constexpr u8 mask = u8((1 << width) - 1);
#pragma omp simd
    for (i64 k = 0; k < plane; k++) {
        u8 byte = 0;
        for (int j = 0; j < 8 / width; j++)
            byte |= u8(((q[k + j * plane] >> shift) & mask) << (j * width));
        out[k] = byte;
    }
}

template <int width, int shift, bool first>
inline void unpack_section(const u8* __restrict in, u8* __restrict q, i64 plane) {
    constexpr u8 mask = u8((1 << width) - 1);
    for (int j = 0; j < 8 / width; j++) {
        u8* __restrict lane = q + j * plane;
#pragma omp simd
        for (i64 k = 0; k < plane; k++) {
            u8 part = u8(((in[k] >> (j * width)) & mask) << shift);
            lane[k] = first ? part : u8(lane[k] | part);
        }
    }
}

template <int bits>
inline void pack(const u8* q, u8* out, i64 size) {
    const i64 eighth = size / 8;
    constexpr int after4 = bits & 4, after2 = bits & 6;
    if constexpr (bits == 8) return pack_section<8, 0>(q, out, size);
    if constexpr (bits & 4) pack_section<4, 0>(q, out, 4 * eighth);
    if constexpr (bits & 2) pack_section<2, after4>(q, out + after4 * eighth, 2 * eighth);
    if constexpr (bits & 1) pack_section<1, after2>(q, out + after2 * eighth, eighth);
}

template <int bits>
inline void unpack(const u8* in, u8* q, i64 size) {
    const i64 eighth = size / 8;
    constexpr int after4 = bits & 4, after2 = bits & 6;
    if constexpr (bits == 8) return unpack_section<8, 0, true>(in, q, size);
    if constexpr (bits & 4) unpack_section<4, 0, true>(in, q, 4 * eighth);
    if constexpr (bits & 2)
        unpack_section<2, after4, !after4>(in + after4 * eighth, q, 2 * eighth);
    if constexpr (bits & 1) unpack_section<1, after2, !after2>(in + after2 * eighth, q, eighth);
}

// Ask for huge pages under an output before it is written. A decoded tensor is fresh memory, and
// its first touch costs more than decoding: 64 MB took 70 ms in pages of 4 KB and 18 ms in pages of
// 2 MB (Zen 4, Linux 6.18, transparent_hugepage/enabled = madvise). Only whole pages within.
inline void want_huge_pages(void* start, i64 bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t huge = 1 << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + huge - 1) / huge * huge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / huge * huge;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Calls body(start, size, codes) for each group, over `threads`; codes is scratch for one group.
template <class Body>
inline void for_groups(i64 numel, i64 group, int threads, Body body) {
    const i64 groups = (numel + group - 1) / group;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<u8> codes(group);
#pragma omp for schedule(static)
        for (i64 g = 0; g < groups; g++) {
            const i64 start = g * group;
            body(start, numel - start < group ? numel - start : group, codes.data());
        }
    }
}

inline i64 up8(i64 size) { return (size + 7) / 8 * 8; }

// ---- run-time choice: call(Options{}) of the index-th option; false where there is none ----

template <class... Options, class Call>
bool choose(int index, Call call) {
    int i = 0;
    return ((index == i++ && call(Options{})) || ...);
}

template <int b>
using Int = std::integral_constant<int, b>;

template <class Call>
bool choose_bits(int bits, Call call) {
    return choose<Int<1>, Int<2>, Int<3>, Int<4>, Int<5>, Int<6>, Int<7>, Int<8>>(bits - 1, call);
}

template <class Call>  // call(type, bits)
bool choose_float(int type, int bits, Call call) {
    return choose<F32, BF16, F16>(
        type, [=](auto t) { return choose_bits(bits, [=](auto b) { return call(t, b); }); });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
