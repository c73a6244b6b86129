// Kernels of codecs/rotate.py; subsample.cpp uses the parts that work on one group.
// Measured on one Zen 4 core, 64 MB of fp32, 2 bits: encode 21 ms, decode 13 ms into memory in use
// and 39 ms into fresh small pages, where a clone takes 31. Of 256 elements the two transforms take
// 90 of encode's 210 ns in int32, and 75 of decode's 130, where the first one is in int16.

#include <utility>

namespace {

constexpr i64 most = 512, smallest = 32;  // elements of a group, and of a padded last one
constexpr u32 second_signs = 1u << 30, scale_hashes = 1u << 31;

inline i64 padded(i64 size) {
    i64 n = smallest;
    while (n < size) n *= 2;
    return n;
}

inline float power(u32 exponent) { return bit_cast<float>(exponent << 23); }

// ---- Walsh-Hadamard in place: the first stages inside vectors, the others across ----

template <class T>
struct Vector {  // 32 bytes: one AVX2 or two NEON registers; 64 were slower on Zen 4
    static constexpr int lanes = 32 / sizeof(T);
    typedef T type __attribute__((vector_size(32), may_alias));
};

template <class T, int h, int... k>
inline typename Vector<T>::type transform_lanes(typename Vector<T>::type v,
                                                std::integer_sequence<int, k...> all) {
    if constexpr (h < Vector<T>::lanes) {
        using V = typename Vector<T>::type;
        const V other = {v[k ^ h]...}, upper = {(k & h ? T(-1) : T(0))...};
        return transform_lanes<T, 2 * h>(upper ? other - v : other + v, all);
    } else {
        return v;
    }
}

template <class V>  // two stages for the loads and stores of one
inline void butterfly_four(V* v, i64 h, V a, V b, V c, V d) {
    const V e = a + b, f = a - b, g = c + d, i = c - d;
    v[0] = e + g;
    v[h] = f + i;
    v[2 * h] = e - g;
    v[3 * h] = f - i;
}

template <class T>
inline void hadamard(T* y, i64 n) {
    using V = typename Vector<T>::type;
    V* v = reinterpret_cast<V*>(y);
    constexpr int lanes = Vector<T>::lanes;
    const auto within = [](V a) {
        return transform_lanes<T, 1>(a, std::make_integer_sequence<int, lanes>{});
    };
    const i64 count = n / lanes;
    i64 h = 1;
    if (count < 4) {
        for (i64 k = 0; k < count; k++) v[k] = within(v[k]);
    } else {
        for (i64 k = 0; k < count; k += 4)
            butterfly_four(v + k, 1, within(v[k]), within(v[k + 1]), within(v[k + 2]),
                           within(v[k + 3]));
        h = 4;
    }
    for (; 4 * h <= count; h *= 4)
        for (i64 start = 0; start < count; start += 4 * h)
            for (i64 k = start; k < start + h; k++)
                butterfly_four(v + k, h, v[k], v[k + h], v[k + 2 * h], v[k + 3 * h]);
    if (2 * h <= count)
        for (i64 k = 0; k < h; k++) {
            const V a = v[k], b = v[k + h];
            v[k] = a + b;
            v[k + h] = a - b;
        }
}

// ---- signs ----

struct Signs {  // of one group: bit i%32 of words[i/32], from the hash of `word` on
    u32 words[most / 32];
    Signs(u32 word, Keys keys) {  // always for the longest group: one fixed vector loop
#pragma omp simd
        for (u32 i = 0; i < most / 32; i++) words[i] = keys.hash(word + i);
    }
};

// to = sign * from
template <class From>
inline void apply_signs(const From* from, int32_t* to, i64 n, u32 word, Keys keys) {
    const Signs signs(word, keys);
    for (i64 i = 0; i < n / 32; i++) {
#pragma omp simd
        for (int k = 0; k < 32; k++) {
            const int32_t minus = int32_t(signs.words[i] << (31 - k)) >> 31;
            to[32 * i + k] = (from[32 * i + k] ^ minus) - minus;
        }
    }
}

// ---- one group ----

template <int bits>
struct Levels {
    static constexpr int count = 1 << (bits - 1);
    int32_t levels[count], edges[count];  // edges[0] unused
    explicit Levels(const int32_t* table) {
        for (int k = 0; k < count; k++) {
            levels[k] = table[k];
            edges[k] = k ? table[count + k - 1] : 0;
        }
    }
};

// The field of the largest exponent of c: 255 where one is NaN or Inf.
inline u32 exponent(const float* c, i64 size) {
    u32 largest = 0;
#pragma omp simd reduction(max : largest)
    for (i64 i = 0; i < size; i++) {
        const u32 magnitude = bit_cast<u32>(c[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest >> 23;
}

struct Centre {
    float mean, unit;  // unit is NaN where the group is not finite
};

// c becomes c*f - mean*f.
inline Centre centre(float* c, i64 size, bool subtract) {
    u32 field = exponent(c, size);
    if (field == 255) return {0.0f, bit_cast<float>(0x7fc00000u)};
    field = field < 1 ? 1 : field > 253 ? 253 : field;
    const float f = power(254 - field), unit = power(field);
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (i64 i = 0; i < size; i++) {
        c[i] = c[i] * f;
        total += int32_t(c[i] * 0x1p16f);
    }
    if (!subtract) return {0.0f, unit};
    float mean = float(total) / (float(size) * 0x1p16f) * unit;
    mean = mean > BF16::limit ? BF16::limit : mean < -BF16::limit ? -BF16::limit : mean;
    mean = BF16::load(BF16::store(mean));
    const float shift = mean * f;
#pragma omp simd
    for (i64 i = 0; i < size; i++) c[i] = c[i] - shift;
    return {mean, unit};
}

struct Sums {
    int32_t tt, tq, qq;
};

// Codes of n normals w * r, and the sums over T and its levels q.
template <int bits>
inline Sums find_levels(const int32_t* __restrict w, float r, const Levels<bits> table,
                        u8* __restrict codes, i64 n) {
    int32_t tt = 0, tq = 0, qq = 0;
#pragma omp simd reduction(+ : tt, tq, qq)
    for (i64 i = 0; i < n; i++) {
        const int32_t t = (int32_t(float(w[i]) * r) + 8) >> 4;
        const int32_t size = t < 0 ? -t : t;
        int32_t number = 0, q = table.levels[0];
#pragma GCC unroll 16
        for (int k = 1; k < Levels<bits>::count; k++) {
            number += size >= table.edges[k] ? 1 : 0;
            q += size >= table.edges[k] ? table.levels[k] - table.levels[k - 1] : 0;
        }
        tt += size * size;
        tq += size * q;
        qq += q * q;
        codes[i] = u8(number | (t < 0 ? 1 << (bits - 1) : 0));
    }
    return {tt, tq, qq};
}

// Codes of one group, padded, from what `centre` left; returns its scale, times `gain`, as bf16.
// word: the index of the group's first hash; group: its number. Not inlined: for compile time.
template <int bits>
__attribute__((noinline)) u16 quantise(const float* c, i64 size, float unit,
                                       const Levels<bits>& table, bool eden, float gain, u32 word,
                                       u32 group, Keys keys, u8* codes) {
    const i64 n = padded(size);
    std::memset(codes, 0, n);
    if (!(unit == unit)) return 0x7fc0;
    const u32 field = exponent(c, size);
    const float e = power(254 - field);
    alignas(32) int32_t w[most];
    int32_t energy = 0;
#pragma omp simd reduction(+ : energy)
    for (i64 i = 0; i < size; i++) {
        w[i] = int32_t(c[i] * e * 0x1p16f);
        const int32_t coarse = (w[i] + 64) >> 7;
        energy += coarse * coarse;
    }
    if (!energy) return 0;
    std::memset(w + size, 0, (n - size) * sizeof(*w));
    apply_signs(w, w, n, word, keys);
    hadamard(w, n);
    apply_signs(w, w, n, second_signs + word, keys);
    hadamard(w, n);
    const float s = __builtin_sqrtf(float(energy) * float(n)) * 0x1p-9f;
    const Sums sums = find_levels<bits>(w, 0.25f / s, table, codes, n);
    const float ratio = eden ? float(sums.tt) / float(sums.tq) : float(sums.tq) / float(sums.qq);
    const float scale = s * ratio * (gain / (1024.0f * float(n) * float(n))) * power(field) * unit;
    return u16((bit_cast<u32>(scale) + (keys.hash(scale_hashes + group) >> 16)) >> 16);
}

// H(b H q) of the levels q of n codes.
template <int bits>
__attribute__((noinline)) void dequantise(const u8* __restrict codes, const Levels<bits> table,
                                          i64 n, u32 word, Keys keys, int32_t* __restrict h) {
    constexpr int count = Levels<bits>::count;
    alignas(32) int16_t q[most];
    u8 steps[count];
    for (int k = 0; k < count; k++) steps[k] = u8(table.levels[k] - (k ? table.levels[k - 1] : 0));
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        const u8 number = codes[i] & u8(count - 1);
        u8 level = steps[0];
#pragma GCC unroll 16
        for (int k = 1; k < count; k++) level = u8(level + (number >= u8(k) ? steps[k] : u8(0)));
        q[i] = int16_t(number == codes[i] ? int16_t(level) : -int16_t(level));
    }
    if (n <= 256) {  // 256 levels of at most 127 add up in 16 bits
        hadamard(q, n);
        apply_signs(q, h, n, second_signs + word, keys);
    } else {
        for (i64 i = 0; i < n; i++) h[i] = q[i];
        hadamard(h, n);
        apply_signs(h, h, n, second_signs + word, keys);
    }
    hadamard(h, n);
}

// out = mean + sign * (scale * h), rounded to its type; `clamp` where that may leave its range.
template <class Type, bool clamp>
inline void store_values(const int32_t* __restrict h, typename Type::Stored* __restrict out,
                         i64 size, float mean, float scale, const Signs signs) {
    const auto decoded = [=](i64 i, u32 sign) {
        const u32 product = bit_cast<u32>(float(h[i]) * scale) ^ (sign & 0x80000000u);
        float value = bit_cast<float>(product) + mean;
        if constexpr (clamp) {
            value = value > Type::limit ? Type::limit : value;
            value = value < -Type::limit ? -Type::limit : value;
        }
        return Type::store(value);
    };
    for (i64 i = 0; i < size / 32; i++) {
#pragma omp simd
        for (int k = 0; k < 32; k++)
            out[32 * i + k] = decoded(32 * i + k, signs.words[i] << (31 - k));
    }
    for (i64 i = size / 32 * 32; i < size; i++)
        out[i] = decoded(i, signs.words[i / 32] << (31 - i % 32));
}

template <class Type>
inline void store_group(const int32_t* h, typename Type::Stored* out, i64 size, float mean,
                        float scale, u32 word, Keys keys) {
    const Signs signs(word, keys);
    const float furthest = (mean < 0 ? -mean : mean) + 0x1p21f * scale;  // |h| <= 127 * n^1.5
    if (furthest < Type::limit)
        store_values<Type, false>(h, out, size, mean, scale, signs);
    else
        store_values<Type, true>(h, out, size, mean, scale, signs);
}

// ---- the tensor ----

// As for_groups, over an output: a fresh one faults at every page, and in the midst of a group's
// work faults cost more than by themselves. Without huge pages, with a block of pages touched
// ahead, decode at 2 bits took 39 instead of 44 ms for 64 MB, and a clone 31 (one Zen 4 core).
template <class T, class Body>
inline void for_output_groups(T* x, i64 numel, i64 group, int threads, Body body) {
    want_huge_pages(x, numel * i64(sizeof(T)));
    constexpr i64 block = 1 << 14, page = 4096 / sizeof(T);  // a multiple of every group
    for_groups(numel, block, threads, [=](i64 first, i64 size, u8* codes) {
        for (i64 i = first; i < first + size; i += page) const_cast<volatile T*>(x)[i] = 0;
        for (i64 start = first; start < first + size; start += group)
            body(start, numel - start < group ? numel - start : group, codes);
    });
}

template <int bits>
struct Sections {
    u16 *scales, *means;
    Sections(u8* payload, i64 numel, i64 group) {
        const i64 whole = numel / group, tail = numel - whole * group;
        const i64 codes = (whole * group + (tail ? padded(tail) : 0)) / 8 * bits;
        scales = reinterpret_cast<u16*>(payload + codes);
        means = scales + whole + (tail ? 1 : 0);
    }
};

template <class Type, int bits>
void encode_rotate(const typename Type::Stored* x, u8* payload, const int32_t* levels, i64 numel,
                   i64 group, bool eden, bool centred, const Prologue* before, Keys keys,
                   int threads) {
    const Levels<bits> table(levels);
    const Sections<bits> sections(payload, numel, group);
    for_groups(numel, group, threads, [=](i64 start, i64 size, u8* codes) {
        alignas(32) float c[most];
        if (before) {
            prepare<Type>(x, start, size, *before, c, codes);
        } else {
#pragma omp simd
            for (i64 i = 0; i < size; i++) c[i] = Type::load(x[start + i]);
        }
        const Centre found = centre(c, size, centred);
        const i64 g = start / group;
        sections.scales[g] = quantise<bits>(c, size, found.unit, table, eden, 1.0f,
                                            u32(start / 32), u32(g), keys, codes);
        if (centred) sections.means[g] = u16(bit_cast<u32>(found.mean) >> 16);
        pack<bits>(codes, payload + start / 8 * bits, padded(size));
    });
}

template <class Type, int bits>
void decode_rotate(const u8* payload, typename Type::Stored* x, const int32_t* levels, i64 numel,
                   i64 group, bool centred, const u8* mask, Keys keys, int threads) {
    const Levels<bits> table(levels);
    const Sections<bits> sections(const_cast<u8*>(payload), numel, group);
    for_output_groups(x, numel, group, threads, [=](i64 start, i64 size, u8* codes) {
        alignas(32) int32_t h[most];
        const i64 g = start / group;
        const u32 word = u32(start / 32);
        unpack<bits>(payload + start / 8 * bits, codes, padded(size));
        dequantise<bits>(codes, table, padded(size), word, keys, h);
        const float mean = centred ? BF16::load(sections.means[g]) : -0.0f;  // keeps a zero's sign
        const float scale = BF16::load(sections.scales[g]);
        store_group<Type>(h, x + start, size, mean, scale, word, keys);
        if (mask) clear_masked(x + start, size, mask + start / 8);
    });
}

template <class Call>
bool choose_rotation(int type, int bits, Call call) {
    return choose<F32, BF16, F16>(type, [=](auto t) {
        return choose<Int<1>, Int<2>, Int<3>, Int<4>, Int<5>>(bits - 1,
                                                              [=](auto b) { return call(t, b); });
    });
}

}  // namespace

EXPORT bool fxc_rotate_encode(const void* x, u8* payload, i64 numel, const int32_t* levels,
                              int bits, i64 group, int eden, int centred, int type,
                              const Prologue* before, u32 k_a, u32 k_b, int threads) {
    return choose_rotation(type, bits, [=](auto t, auto b) {
        auto* in = static_cast<const typename decltype(t)::Stored*>(x);
        encode_rotate<decltype(t), b()>(in, payload, levels, numel, group, eden, centred, before,
                                        Keys{k_a, k_b}, threads);
        return true;
    });
}

EXPORT bool fxc_rotate_decode(const u8* payload, void* x, i64 numel, const int32_t* levels,
                              int bits, i64 group, int centred, int type, const u8* mask,
                              u32 k_a, u32 k_b, int threads) {
    return choose_rotation(type, bits, [=](auto t, auto b) {
        auto* out = static_cast<typename decltype(t)::Stored*>(x);
        decode_rotate<decltype(t), b()>(payload, out, levels, numel, group, centred, mask,
                                        Keys{k_a, k_b}, threads);
        return true;
    });
}
