// What encoders do to a group as they read it, and decoders once they have written it. The
// definitions are in codecs/fused.py.

namespace {

// As in cpu.py; the pointers of the other kind are null.
struct Prologue {
    const void* fill;  // of x's type: x <= 0 becomes it, and `mask` is written
    u8* mask;
    const float *mean, *rstd;  // of `channels`, each of which runs for `inner` elements
    i64 channels, inner;
    const i64* rows;  // of a matrix of rows of `length`, which are coded one after the other
    i64 length;
};

constexpr i64 prepared = 256;  // elements of a group that has a prologue: those of a mask's groups

// c = where(x <= 0, fill, x), and the bytes of the mask; flags: scratch for one group.
template <class Type>
inline void fill_group(const typename Type::Stored* __restrict x, i64 size, float fill,
                       float* __restrict c, u8* __restrict flags, u8* __restrict mask) {
#pragma omp simd
    for (i64 i = 0; i < size; i++) {
        const float value = Type::load(x[i]);
        flags[i] = value <= 0 ? 1 : 0;
        c[i] = value <= 0 ? fill : value;
    }
    std::memset(flags + size, 0, up8(size) - size);
    pack<1>(flags, mask, up8(size));
}

// c = (x - mean) * rstd of elements from `start` on: in runs of one channel, or, where channels are
// the fastest axis, of channels one after the other.
template <class Type>
inline void standardise_group(const typename Type::Stored* __restrict x, i64 start, i64 size,
                              const Prologue& p, float* __restrict c) {
    const bool last = p.inner == 1;
    const i64 whole = last ? p.channels : p.inner;  // elements of a run
    i64 channel = start / p.inner % p.channels;
    i64 left = last ? p.channels - channel : p.inner - start % p.inner;  // of the run that is cut
    for (i64 at = 0; at < size;) {
        const i64 run = size - at < left ? size - at : left;
        const auto* __restrict in = x + at;
        const float *__restrict mean = p.mean + channel, *__restrict rstd = p.rstd + channel;
        float* __restrict out = c + at;
        if (last) {
#pragma omp simd
            for (i64 i = 0; i < run; i++) out[i] = (Type::load(in[i]) - mean[i]) * rstd[i];
            channel = 0;
        } else {
            const float m = *mean, r = *rstd;
#pragma omp simd
            for (i64 i = 0; i < run; i++) out[i] = (Type::load(in[i]) - m) * r;
            channel = channel + 1 < p.channels ? channel + 1 : 0;
        }
        at += run;
        left = whole;
    }
}

// c = elements from `start` on of some rows of x, one row after the other.
template <class Type>
inline void gather_group(const typename Type::Stored* __restrict x, i64 start, i64 size,
                         const Prologue& p, float* __restrict c) {
    i64 number = start / p.length, column = start % p.length;
    for (i64 at = 0; at < size; number++, column = 0) {
        const i64 run = std::min(size - at, p.length - column);
        const auto* __restrict in = x + p.rows[number] * p.length + column;
#pragma omp simd
        for (i64 i = 0; i < run; i++) c[at + i] = Type::load(in[i]);
        at += run;
    }
}

// A group of x as fp32, after its prologue. Not inlined: as clear_masked.
template <class Type>
__attribute__((noinline)) void prepare(const typename Type::Stored* x, i64 start, i64 size,
                                       const Prologue& p, float* c, u8* flags) {
    if (p.rows) {
        gather_group<Type>(x, start, size, p, c);
    } else if (p.fill) {
        const float fill = Type::load(*static_cast<const typename Type::Stored*>(p.fill));
        fill_group<Type>(x + start, size, fill, c, flags, p.mask + start / 8);
    } else {
        standardise_group<Type>(x + start, start, size, p, c);
    }
}

// Zero the elements of a group that are set in its part of a mask. Not inlined: for the kernels
// without one to stay as they are.
template <class Stored>
__attribute__((noinline)) void clear_masked(Stored* __restrict x, i64 size,
                                            const u8* __restrict mask) {
    const i64 eighth = up8(size) / 8;
    for (int j = 0; j < 8; j++, x += eighth, size -= eighth) {
        const i64 count = size < eighth ? size : eighth;
#pragma omp simd
        for (i64 k = 0; k < count; k++) x[k] &= Stored(Stored((mask[k] >> j) & 1) - 1);
    }
}

}  // namespace
