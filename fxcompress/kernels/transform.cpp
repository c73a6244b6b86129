// Kernels of codecs/transform.py: both changes of basis in one pass over the tensor.
//
// A tile is `tile` blocks of neighbours of one block of channels, every place in a block of
// neighbours: [places][channels][tile] in fp32, which stays in the cache. The transform over space
// adds and subtracts along the first axis, in registers; the one over channels is a product with
// one small matrix for each frequency. Coefficients are written band by band as they come; which
// rate a band gets follows from all of them, so that the coders gather bands by rows (prologue.cpp).
//
// On one Zen 4 core the product, 128 operations an element, runs at 1.1 ns an element.

namespace {

constexpr i64 tile = 64, most_places = 16, widest = 64;

// Products may contract to FMA: coefficients are rounded as each device rounds them.
#if defined(__clang__)
#define FXC_CONTRACT _Pragma("clang fp contract(fast)")
#else
#define FXC_CONTRACT
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

#ifdef __AVX512F__
constexpr int lanes = 16, most_rows = 8;  // 16 of 32 registers add up
#else
constexpr int lanes = 8, most_rows = 4;  // 8 of 16
#endif
typedef float Lanes __attribute__((vector_size(4 * lanes), may_alias));
typedef float Loose __attribute__((vector_size(4 * lanes), may_alias, aligned(4)));

// `rows` rows of matrix [., width] times a [width][tile]; out: aligned, [rows][tile].
template <int rows>
inline void multiply_rows(const float* __restrict matrix, i64 width, const float* __restrict a,
                          float* __restrict out) {
    FXC_CONTRACT
    for (i64 p = 0; p < tile; p += 2 * lanes) {
        Lanes sum[rows][2] = {};
        for (i64 c = 0; c < width; c++) {
            const Lanes* b = reinterpret_cast<const Lanes*>(a + c * tile + p);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                sum[r][0] += matrix[r * width + c] * b[0];
                sum[r][1] += matrix[r * width + c] * b[1];
            }
        }
        for (int r = 0; r < rows; r++) {
            Lanes* to = reinterpret_cast<Lanes*>(out + r * tile + p);
            to[0] = sum[r][0];
            to[1] = sum[r][1];
        }
    }
}

// out = matrix [width, width] times a [width][tile]
__attribute__((noinline)) void multiply(const float* __restrict matrix, i64 width,
                                        const float* __restrict a, float* __restrict out) {
    i64 r = 0;
    for (; r + most_rows <= width; r += most_rows)
        multiply_rows<most_rows>(matrix + r * width, width, a, out + r * tile);
    for (; r < width; r++) multiply_rows<1>(matrix + r * width, width, a, out + r * tile);
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif

// ---- over space: Walsh-Hadamard along the first axis of a [count][size], all in registers ----

template <int count>
inline void over_space(float* __restrict a, i64 size, float scale) {
    for (i64 i = 0; i < size; i += lanes) {
        Lanes v[count];
#pragma GCC unroll 16
        for (int k = 0; k < count; k++) v[k] = *reinterpret_cast<Lanes*>(a + k * size + i);
#pragma GCC unroll 4
        for (int h = 1; h < count; h *= 2)
#pragma GCC unroll 16
            for (int k = 0; k < count; k++)
                if (!(k & h)) {
                    const Lanes sum = v[k] + v[k + h];
                    v[k + h] = v[k] - v[k + h];
                    v[k] = sum;
                }
#pragma GCC unroll 16
        for (int k = 0; k < count; k++) *reinterpret_cast<Lanes*>(a + k * size + i) = v[k] * scale;
    }
}

inline void over_space(float* a, i64 count, i64 size) {
    const float scale = 1.0f / __builtin_sqrtf(float(count));
    if (count == 2) over_space<2>(a, size, scale);
    if (count == 4) over_space<4>(a, size, scale);
    if (count == 8) over_space<8>(a, size, scale);
    if (count == 16) over_space<16>(a, size, scale);
}

// ---- where elements are ----

struct Place {  // as kernels/place.py
    i64 blocks[2], sides[2], strides[4], positions, channels, width;
    i64 count() const { return sides[0] * sides[1]; }
    i64 tiles() const { return (positions + tile - 1) / tile; }
    i64 bands() const { return count() * channels; }
};

struct Tile {  // element k of a block of neighbours p is at base[p] + within[k]
    i64 size, base[tile], within[most_places];
    bool dense;  // neighbouring blocks are neighbours in memory
    Tile(const Place& place, i64 first) {
        const auto [lead, down, along, channel] = place.strides;
        const i64 high = place.sides[0], wide = place.sides[1];
        size = std::min(tile, place.positions - first);
        dense = true;
        i64 column = first % place.blocks[1], row = first / place.blocks[1] % place.blocks[0];
        i64 sample = first / place.blocks[1] / place.blocks[0];
        for (i64 p = 0; p < size; p++) {
            base[p] = sample * lead + row * high * down + column * wide * along;
            dense &= base[p] == base[0] + p;
            if (++column == place.blocks[1]) column = 0, row++;
            if (row == place.blocks[0]) row = 0, sample++;
        }
        for (i64 k = 0; k < high * wide; k++) within[k] = k / wide * down + k % wide * along;
    }
};

template <class Type>
inline Lanes load_lanes(const typename Type::Stored* __restrict x) {
    alignas(sizeof(Lanes)) float v[lanes];
#pragma omp simd
    for (int i = 0; i < lanes; i++) v[i] = Type::load(x[i]);
    return *reinterpret_cast<Lanes*>(v);
}

template <class Type>
inline typename Type::Stored bounded(float value) {
    value = value > Type::limit ? Type::limit : value;
    value = value < -Type::limit ? -Type::limit : value;
    return Type::store(value);
}

template <class Type>
inline void store_lanes(Lanes values, typename Type::Stored* __restrict x) {
    alignas(sizeof(Lanes)) float v[lanes];
    *reinterpret_cast<Lanes*>(v) = values;
#pragma omp simd
    for (int i = 0; i < lanes; i++) x[i] = bounded<Type>(v[i]);
}

// Rows of a square of vectors become its columns: squares of half the size change places, and so on.
template <int h = lanes / 2, int... k>
inline void transpose(Lanes* rows, std::integer_sequence<int, k...> all) {
    if constexpr (h) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; i++)
            if (!(i & h)) {
                const Lanes a = rows[i], b = rows[i + h];
                rows[i] = Lanes{(k & h ? b[k ^ h] : a[k])...};
                rows[i + h] = Lanes{(k & h ? b[k] : a[k ^ h])...};
            }
        transpose<h / 2>(rows, all);
    }
}

inline void transpose(Lanes* rows) { transpose(rows, std::make_integer_sequence<int, lanes>{}); }

// to[c][p] = x - mean, of `size` positions at x + at[p] and `width` channels side by side.
template <class Type>
inline void load_positions(const typename Type::Stored* __restrict x, const i64* at, i64 size,
                           i64 width, const float* __restrict mean, float* __restrict to) {
    const i64 whole = width / lanes * lanes;
    i64 p = 0;
    for (; p + lanes <= size; p += lanes) {
        for (i64 c = 0; c < whole; c += lanes) {
            const Lanes m = *reinterpret_cast<const Loose*>(mean + c);
            Lanes square[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) square[i] = load_lanes<Type>(x + at[p + i] + c) - m;
            transpose(square);
            for (int i = 0; i < lanes; i++)
                *reinterpret_cast<Lanes*>(to + (c + i) * tile + p) = square[i];
        }
        for (i64 i = p; i < p + lanes; i++)
            for (i64 c = whole; c < width; c++)
                to[c * tile + i] = Type::load(x[at[i] + c]) - mean[c];
    }
    for (; p < size; p++)
        for (i64 c = 0; c < width; c++) to[c * tile + p] = Type::load(x[at[p] + c]) - mean[c];
}

// The inverse.
template <class Type>
inline void store_positions(const float* __restrict from, const i64* at, i64 size, i64 width,
                            const float* __restrict mean, typename Type::Stored* __restrict x) {
    const i64 whole = width / lanes * lanes;
    i64 p = 0;
    for (; p + lanes <= size; p += lanes) {
        for (i64 c = 0; c < whole; c += lanes) {
            const Lanes m = *reinterpret_cast<const Loose*>(mean + c);
            Lanes square[lanes];
            for (int i = 0; i < lanes; i++)
                square[i] = *reinterpret_cast<const Lanes*>(from + (c + i) * tile + p);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) store_lanes<Type>(square[i] + m, x + at[p + i] + c);
        }
        for (i64 i = p; i < p + lanes; i++)
            for (i64 c = whole; c < width; c++)
                x[at[i] + c] = bounded<Type>(from[c * tile + i] + mean[c]);
    }
    for (; p < size; p++)
        for (i64 c = 0; c < width; c++) x[at[p] + c] = bounded<Type>(from[c * tile + p] + mean[c]);
}

// row[p] = x - mean of one channel.
template <class Type>
inline void load_channel(const typename Type::Stored* __restrict x, const Tile& t, float mean,
                         float* __restrict row) {
    if (t.dense) {
#pragma omp simd
        for (i64 p = 0; p < t.size; p++) row[p] = Type::load(x[t.base[0] + p]) - mean;
    } else {
        for (i64 p = 0; p < t.size; p++) row[p] = Type::load(x[t.base[p]]) - mean;
    }
}

// The inverse.
template <class Type>
inline void store_channel(const float* __restrict row, const Tile& t, float mean,
                          typename Type::Stored* __restrict x) {
    if (t.dense) {
#pragma omp simd
        for (i64 p = 0; p < t.size; p++) x[t.base[0] + p] = bounded<Type>(row[p] + mean);
    } else {
        for (i64 p = 0; p < t.size; p++) x[t.base[p]] = bounded<Type>(row[p] + mean);
    }
}

// a[k][c][p] = x - mean, of a tile and a block of channels that begins at x; zeros beyond its end.
template <class Type>
inline void load_tile(const typename Type::Stored* __restrict x, const Tile& t, i64 count,
                      i64 width, i64 channel, const float* __restrict mean, float* __restrict a) {
    for (i64 k = 0; k < count; k++, a += width * tile) {
        const auto* from = x + t.within[k];
        if (channel == 1)
            load_positions<Type>(from, t.base, t.size, width, mean, a);
        else
            for (i64 c = 0; c < width; c++)
                load_channel<Type>(from + c * channel, t, mean[c], a + c * tile);
        for (i64 c = 0; c < width && t.size < tile; c++)
            std::memset(a + c * tile + t.size, 0, (tile - t.size) * sizeof(float));
    }
}

// The inverse.
template <class Type>
inline void store_tile(const float* __restrict a, const Tile& t, i64 count, i64 width, i64 channel,
                       const float* __restrict mean, typename Type::Stored* __restrict x) {
    for (i64 k = 0; k < count; k++, a += width * tile) {
        auto* to = x + t.within[k];
        if (channel == 1)
            store_positions<Type>(a, t.base, t.size, width, mean, to);
        else
            for (i64 c = 0; c < width; c++)
                store_channel<Type>(a + c * tile, t, mean[c], to + c * channel);
    }
}

// Calls body(tile number, block of channels, two buffers of a tile's size) over `threads`.
template <class Body>
inline void for_tiles(const Place& place, int threads, Body body) {
    const i64 tiles = place.tiles(), blocks = place.channels / place.width;
    const i64 size = place.count() * place.width * tile;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const std::unique_ptr<float[]> memory(new float[size + place.width * tile + lanes]);
        const auto at = reinterpret_cast<uintptr_t>(memory.get());
        float* a = memory.get() + (-at % sizeof(Lanes)) / sizeof(float);
#pragma omp for collapse(2) schedule(static)
        for (i64 t = 0; t < tiles; t++)
            for (i64 b = 0; b < blocks; b++) body(t, b, a, a + size);
    }
}

template <class Type>
void analyse(const typename Type::Stored* x, const float* mean, const float* matrices,
             const Place& place, float* z, float* energies, int threads) {
    const i64 count = place.count(), width = place.width, channel = place.strides[3];
    for_tiles(place, threads, [=, &place](i64 number, i64 block, float* a, float* out) {
        const Tile t(place, number * tile);
        const i64 first = block * width;
        load_tile<Type>(x + first * channel, t, count, width, channel, mean + first, a);
        over_space(a, count, width * tile);
        for (i64 k = 0; k < count; k++) {
            multiply(matrices + first * width, width, a + k * width * tile, out);
            for (i64 c = 0; c < width; c++) {
                const float* __restrict row = out + c * tile;
                const i64 band = k * place.channels + first + c;
                std::memcpy(z + band * place.positions + number * tile, row, t.size * sizeof(*z));
                float sum = 0;
                Lanes squares = {};
                for (i64 p = 0; p < tile; p += lanes) {
                    const Lanes v = *reinterpret_cast<const Lanes*>(row + p);
                    squares += v * v;
                }
                for (int i = 0; i < lanes; i++) sum += squares[i];
                energies[number * place.bands() + band] = sum;
            }
        }
    });
}

template <class Type>
void synthesise(const float* z, const i64* rows, i64 coded, const float* mean,
                const float* matrices, const Place& place, typename Type::Stored* x, int threads) {
    const i64 count = place.count(), width = place.width, channel = place.strides[3];
    want_huge_pages(x, place.positions * place.bands() * i64(sizeof(*x)));
    for_tiles(place, threads, [=, &place](i64 number, i64 block, float* a, float* in) {
        const Tile t(place, number * tile);
        const i64 first = block * width;
        for (i64 k = 0; k < count; k++) {
            for (i64 c = 0; c < width; c++) {
                const i64 row = rows[k * place.channels + first + c];
                const i64 known = row < coded ? t.size : 0;  // what is dropped is 0
                std::memcpy(in + c * tile, z + row * place.positions + number * tile,
                            known * sizeof(*z));
                std::memset(in + c * tile + known, 0, (tile - known) * sizeof(*z));
            }
            multiply(matrices + first * width, width, in, a + k * width * tile);
        }
        over_space(a, count, width * tile);
        store_tile<Type>(a, t, count, width, channel, mean + first, x + first * channel);
    });
}

inline int number_of(const u8* numbers, i64 band) { return numbers[band / 2] >> band % 2 * 4 & 15; }

// Calls body(place, band) for bands from the highest number to the lowest, equal ones as they are.
template <class Body>
inline void in_order(const u8* numbers, i64 bands, Body body) {
    i64 starts[17] = {};
    for (i64 i = 0; i < bands; i++) starts[15 - number_of(numbers, i) + 1]++;
    for (int n = 0; n < 16; n++) starts[n + 1] += starts[n];
    for (i64 i = 0; i < bands; i++) body(starts[15 - number_of(numbers, i)]++, i);
}

// Numbers of rates by need (energies [tiles, bands], added up, times weight), two a byte, and the
// bands in their order. `ranked`: the numbers, the highest first.
void rank(const float* energies, i64 tiles, i64 bands, const double* weight, const u8* ranked,
          u8* numbers, i64* order) {
    std::vector<double> need(bands);
    for (i64 t = 0; t < tiles; t++)
        for (i64 i = 0; i < bands; i++) need[i] += double(energies[t * bands + i]);
    for (i64 i = 0; i < bands; i++) {
        need[i] *= weight[i];
        if (!(need[i] == need[i])) need[i] = HUGE_VAL;
    }
    std::iota(order, order + bands, i64(0));
    std::stable_sort(order, order + bands, [&](i64 a, i64 b) { return need[a] > need[b]; });
    std::memset(numbers, 0, (bands + 1) / 2);
    for (i64 i = 0; i < bands; i++)
        numbers[order[i] / 2] |= u8(ranked[i] << order[i] % 2 * 4);
    in_order(numbers, bands, [=](i64 at, i64 band) { order[at] = band; });
}

// ---- the bands of one rate after the other ----

struct Coder {  // as in cpu.py
    i64 kind, bits;  // rotate, dither, or subsample, of which `bits` is the block
    i64 number, count, at;  // of the rate; bands it has; where in the payload they are
    const int32_t* levels;
    void *encode, *decode;  // the kernels of that family, which are compiled elsewhere
};

using EncodeRotate = bool(const void*, u8*, i64, const int32_t*, int, i64, int, int, int,
                          const Prologue*, u32, u32, int);
using DecodeRotate = bool(const u8*, void*, i64, const int32_t*, int, i64, int, int, const u8*, u32,
                          u32, int);
using EncodeAffine = bool(const void*, u8*, i64, i64, int, int, const Prologue*, u32, u32, int);
using DecodeDither = bool(const u8*, void*, i64, i64, int, int, const u8*, u32, u32, int);
using EncodeSubsample = bool(const void*, u8*, i64, const int32_t*, int, int, const Prologue*, u32,
                             u32, int);
using DecodeSubsample = bool(const u8*, void*, i64, const int32_t*, int, int, u32, u32, int);

constexpr i64 coded_group = 256, numbers_at = 4;  // in the payload
constexpr i64 few = 1 << 16;  // elements: waking other threads for them costs more than it saves

// As rng.stream_keys, of a stream of its own for each coder of a tensor.
inline Keys keys_of(const i64* key, i64 tensor, i64 number) {
    u32 h = mix(u32(key[0]) ^ mix(u32((tensor + 1) * 4096 + number) + 0x9e3779b9u));
    for (u32 word : {u32(key[0] >> 32), u32(key[1]), u32(key[1] >> 32)}) h = mix(h ^ word);
    return {h, mix(h ^ 0x85ebca6bu)};
}

// Calls body(coder, numel, keys, threads) for each.
template <class Body>
inline void for_coders(const Coder* coders, i64 number, const Place& place, const i64* key,
                       i64 stream, int threads, Body body) {
    for (i64 i = 0; i < number; i++) {
        const i64 numel = coders[i].count * place.positions;
        body(coders[i], numel, keys_of(key, stream, coders[i].number), numel < few ? 1 : threads);
    }
}

// Of bands z[order[.]]. Type 0 is fp32.
inline void encode_bands(const float* z, const i64* order, const Coder& coder, i64 numel,
                         i64 length, u8* payload, Keys keys, int threads) {
    Prologue gathered = {};
    gathered.rows = order;
    gathered.length = length;
    const int bits = int(coder.bits);
    if (coder.kind == 0)
        reinterpret_cast<EncodeRotate*>(coder.encode)(z, payload, numel, coder.levels, bits,
                                                      coded_group, true, false, 0, &gathered, keys.a,
                                                      keys.b, threads);
    if (coder.kind == 1)
        reinterpret_cast<EncodeAffine*>(coder.encode)(z, payload, numel, coded_group, bits, 0,
                                                      &gathered, keys.a, keys.b, threads);
    if (coder.kind == 2)
        reinterpret_cast<EncodeSubsample*>(coder.encode)(z, payload, numel, coder.levels, bits, 0,
                                                         &gathered, keys.a, keys.b, threads);
}

// Into bands that are side by side.
inline void decode_bands(const u8* payload, float* z, const Coder& coder, i64 numel, Keys keys,
                         int threads) {
    const int bits = int(coder.bits);
    if (coder.kind == 0)
        reinterpret_cast<DecodeRotate*>(coder.decode)(payload, z, numel, coder.levels, bits,
                                                      coded_group, false, 0, nullptr, keys.a, keys.b,
                                                      threads);
    if (coder.kind == 1)
        reinterpret_cast<DecodeDither*>(coder.decode)(payload, z, numel, coded_group, bits, 0,
                                                      nullptr, keys.a, keys.b, threads);
    if (coder.kind == 2)
        reinterpret_cast<DecodeSubsample*>(coder.decode)(payload, z, numel, coder.levels, bits, 0,
                                                         keys.a, keys.b, threads);
}

}  // namespace

EXPORT i64 fxc_transform_tile() { return tile; }

EXPORT void fxc_transform_want_huge_pages(void* start, i64 bytes) { want_huge_pages(start, bytes); }

// All of a payload but the version of its basis and its means. Scratch: z [bands, positions],
// energies [tiles, bands].
EXPORT bool fxc_transform_encode(const void* x, u8* payload, i64 bytes, const float* mean,
                                 const float* matrices, const double* weight, const u8* ranked,
                                 const Place* place, const Coder* coders, i64 number, float* z,
                                 float* energies, const i64* key, i64 stream, int type,
                                 int threads) {
    return choose<F32, BF16, F16>(type, [=](auto t) {
        auto* in = static_cast<const typename decltype(t)::Stored*>(x);
        std::memset(payload, 0, bytes);
        want_huge_pages(z, place->bands() * place->positions * i64(sizeof(*z)));
        analyse<decltype(t)>(in, mean, matrices, *place, z, energies, threads);
        std::vector<i64> order(place->bands());
        rank(energies, place->tiles(), place->bands(), weight, ranked, payload + numbers_at,
             order.data());
        const i64* next = order.data();
        for_coders(coders, number, *place, key, stream, threads,
                   [&](const Coder& coder, i64 numel, Keys keys, int own) {
                       encode_bands(z, next, coder, numel, place->positions, payload + coder.at,
                                    keys, own);
                       next += coder.count;
                   });
        return true;
    });
}

// Scratch: z, of as many bands as are coded.
EXPORT bool fxc_transform_decode(const u8* payload, void* x, const float* mean,
                                 const float* matrices, const Place* place, const Coder* coders,
                                 i64 number, float* z, const i64* key, i64 stream, int type,
                                 int threads) {
    return choose<F32, BF16, F16>(type, [=](auto t) {
        auto* out = static_cast<typename decltype(t)::Stored*>(x);
        i64 coded = 0;
        for_coders(coders, number, *place, key, stream, threads,
                   [&](const Coder& coder, i64 numel, Keys keys, int own) {
                       float* bands = z + coded * place->positions;
                       decode_bands(payload + coder.at, bands, coder, numel, keys, own);
                       coded += coder.count;
                   });
        std::vector<i64> rows(place->bands());
        in_order(payload + numbers_at, place->bands(), [&](i64 at, i64 band) { rows[band] = at; });
        synthesise<decltype(t)>(z, rows.data(), coded, mean, matrices, *place, out, threads);
        return true;
    });
}
