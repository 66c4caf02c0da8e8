// Vectors of the processor as values. This is the only file that knows compiler extensions and intrinsics: everything above
// it is plain C++ on `Vec<R>` and `Mask<R>`. Compiled once per instruction set: NEURODE_NAMESPACE keeps the copies apart
// (an inline function shared between them could leave a 512-bit copy to a machine that has no such registers).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(NEURODE_NEON)
#include <arm_neon.h>
#endif

#ifndef NEURODE_VECTOR_BYTES
#define NEURODE_VECTOR_BYTES 16
#endif
#ifndef NEURODE_NAMESPACE
#define NEURODE_NAMESPACE baseline
#endif
#define INLINE inline __attribute__((always_inline))

// Before a loop of few turns, known at compile time: write all of them out.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

// Numbers of two vectors by position, a's first. GCC has it under Clang's name from 12 on.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

namespace NEURODE_NAMESPACE {

constexpr int VECTOR_BYTES = NEURODE_VECTOR_BYTES;

// Whether the processor has 32 vector registers; otherwise 16.
#if NEURODE_VECTOR_BYTES == 64 || defined(NEURODE_NEON)
constexpr bool MANY_REGISTERS = true;
#else
constexpr bool MANY_REGISTERS = false;
#endif

template <class R> struct Types;
template <> struct Types<float> {
    typedef int32_t Int;
    typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef float Loose __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
    typedef int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Types<double> {
    typedef int64_t Int;
    typedef double Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Loose __attribute__((vector_size(VECTOR_BYTES), aligned(8)));
    typedef int64_t Mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <class R> using Vec = typename Types<R>::Vec;
template <class R> using Mask = typename Types<R>::Mask; // integers as wide as R; a truth is all bits set
template <class R> using Int = typename Types<R>::Int;
template <class R> constexpr int LANES = VECTOR_BYTES / int(sizeof(R));

template <class R> INLINE Vec<R> load(const R* p) { return *reinterpret_cast<const Vec<R>*>(p); }
template <class R> INLINE Vec<R> load_loose(const R* p) {
    return *reinterpret_cast<const typename Types<R>::Loose*>(p);
}
template <class R> INLINE void store(R* p, Vec<R> v) { *reinterpret_cast<Vec<R>*>(p) = v; }

template <class R> INLINE void store_loose(R* p, Vec<R> v) { *reinterpret_cast<typename Types<R>::Loose*>(p) = v; }

// The first n numbers of a vector, n < LANES.
template <class R> INLINE void store_part(R* p, Vec<R> v, int n) {
#if NEURODE_VECTOR_BYTES == 64
    if constexpr (sizeof(R) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
    else return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#else
    for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

// Asks for n numbers to be in the first-level cache when they are needed.
template <class R> INLINE void prefetch(const R* p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += ptrdiff_t(64 / sizeof(R))) __builtin_prefetch(p + i);
}

// A number in all lanes. `Vec{} + x` would cost an addition; the intrinsic folds into the product that uses it.
template <class R> INLINE Vec<R> splat(R x) {
    if constexpr (sizeof(R) == 4) {
#if NEURODE_VECTOR_BYTES == 64
        return (Vec<R>)_mm512_set1_ps(x);
#elif NEURODE_VECTOR_BYTES == 32
        return (Vec<R>)_mm256_set1_ps(x);
#else
        return Vec<R>{x, x, x, x};
#endif
    } else {
#if NEURODE_VECTOR_BYTES == 64
        return (Vec<R>)_mm512_set1_pd(x);
#elif NEURODE_VECTOR_BYTES == 32
        return (Vec<R>)_mm256_set1_pd(x);
#else
        return Vec<R>{x, x};
#endif
    }
}

template <class R> INLINE Mask<R> bits(Vec<R> v) { return (Mask<R>)v; }
template <class R> INLINE Vec<R> from_bits(Mask<R> m) { return (Vec<R>)m; }
template <class R> INLINE Vec<R> choose(Mask<R> m, Vec<R> yes, Vec<R> no) { return m ? yes : no; }
template <class R> INLINE bool any(Mask<R> m) {
#if NEURODE_VECTOR_BYTES == 64
    return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#elif NEURODE_VECTOR_BYTES == 32
    return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#endif
    Int<R> found = 0;
    for (int i = 0; i < LANES<R>; i++) found |= m[i];
    return found != 0;
}

// Numbers of R's own kind: the place of the sign, and of the exponent.
template <class R> struct Float;
template <> struct Float<float> {
    static constexpr int mantissa = 23, bias = 127;
    static constexpr int32_t sign = INT32_MIN;
    static constexpr float shifter = 12582912.0f; // 1.5 2^23: adding it leaves the nearest integer in the low bits
    static constexpr float infinity = __builtin_inff();
};
template <> struct Float<double> {
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr int64_t sign = INT64_MIN;
    static constexpr double shifter = 6755399441055744.0; // 1.5 2^52
    static constexpr double infinity = __builtin_inf();
};

template <class R> INLINE Vec<R> magnitude(Vec<R> v) { return from_bits<R>(bits<R>(v) & ~Float<R>::sign); }
template <class R> INLINE Mask<R> sign_of(Vec<R> v) { return bits<R>(v) & Float<R>::sign; }
template <class R> INLINE Vec<R> with_sign(Vec<R> v, Mask<R> sign) { return from_bits<R>(bits<R>(v) | sign); }

// a < b ? a : b, and so b where either is NaN, in one instruction.
template <class R> INLINE Vec<R> lesser(Vec<R> a, Vec<R> b) {
#if NEURODE_VECTOR_BYTES == 64
    if constexpr (sizeof(R) == 4) return (Vec<R>)_mm512_min_ps((__m512)a, (__m512)b);
    else return (Vec<R>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif NEURODE_VECTOR_BYTES == 32
    if constexpr (sizeof(R) == 4) return (Vec<R>)_mm256_min_ps((__m256)a, (__m256)b);
    else return (Vec<R>)_mm256_min_pd((__m256d)a, (__m256d)b);
#endif
    return a < b ? a : b;
}

// a > b ? a : b, and so b where either is NaN, in one instruction.
template <class R> INLINE Vec<R> greater(Vec<R> a, Vec<R> b) {
#if NEURODE_VECTOR_BYTES == 64
    if constexpr (sizeof(R) == 4) return (Vec<R>)_mm512_max_ps((__m512)a, (__m512)b);
    else return (Vec<R>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif NEURODE_VECTOR_BYTES == 32
    if constexpr (sizeof(R) == 4) return (Vec<R>)_mm256_max_ps((__m256)a, (__m256)b);
    else return (Vec<R>)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
    return a > b ? a : b;
}

// a b + c and c - a b, rounded once where the processor can.
template <class R> INLINE Vec<R> fused(Vec<R> a, Vec<R> b, Vec<R> c) {
#if NEURODE_VECTOR_BYTES == 64
    if constexpr (sizeof(R) == 4) return (Vec<R>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else return (Vec<R>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif NEURODE_VECTOR_BYTES == 32
    if constexpr (sizeof(R) == 4) return (Vec<R>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else return (Vec<R>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(NEURODE_NEON)
    if constexpr (sizeof(R) == 4) return (Vec<R>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else return (Vec<R>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}
template <class R> INLINE Vec<R> fused_minus(Vec<R> a, Vec<R> b, Vec<R> c) { return fused<R>(-a, b, c); }

// 1 / x to at least half of R's bits; the caller improves it. 512-bit divisions of floats are slow enough to avoid.
template <class R> INLINE Vec<R> reciprocal_estimate(Vec<R> x) {
#if NEURODE_VECTOR_BYTES == 64
    if constexpr (sizeof(R) == 4) return (Vec<R>)_mm512_rcp14_ps((__m512)x);
#endif
    return splat<R>(1) / x;
}

// table[index] of 32 numbers, by the low five bits of the index. One instruction, so only where there is that instruction.
#if NEURODE_VECTOR_BYTES == 64
constexpr bool HAS_LOOKUP = true;
INLINE Vec<float> lookup(const float* table, Mask<float> index) {
    return (Vec<float>)_mm512_permutex2var_ps((__m512)load(table), (__m512i)index, (__m512)load(table + 16));
}
#else
constexpr bool HAS_LOOKUP = false;
INLINE Vec<float> lookup(const float*, Mask<float>) { return Vec<float>{}; }
#endif

// Halves of a vector of floats as doubles, and back.
typedef float HalfFloats __attribute__((vector_size(VECTOR_BYTES / 2)));
INLINE Vec<double> widen(Vec<float> v, int half) {
    HalfFloats part;
    std::memcpy(&part, reinterpret_cast<const char*>(&v) + half * (VECTOR_BYTES / 2), sizeof part);
    return __builtin_convertvector(part, Vec<double>);
}
INLINE Vec<float> narrow(Vec<double> low, Vec<double> high) {
    HalfFloats parts[2] = {__builtin_convertvector(low, HalfFloats), __builtin_convertvector(high, HalfFloats)};
    Vec<float> v;
    std::memcpy(&v, parts, sizeof v);
    return v;
}

// LANES<double> numbers at p as doubles, and back.
template <class R> INLINE Vec<double> load_doubles(const R* p) {
    if constexpr (sizeof(R) == 8) return load(p);
    HalfFloats part;
    std::memcpy(&part, p, sizeof part);
    return __builtin_convertvector(part, Vec<double>);
}
template <class R> INLINE void store_narrow(R* p, Vec<double> v) {
    if constexpr (sizeof(R) == 8) return store(p, v);
    HalfFloats part = __builtin_convertvector(v, HalfFloats);
    std::memcpy(p, &part, sizeof part);
}

// Transposes a square block: lanes of `from` rows become rows of `to`. 8 x 8 floats (16 x 16 of 512 bits), 4 x 4 doubles.
typedef float Eight __attribute__((vector_size(32)));
typedef Eight EightLoose __attribute__((aligned(4)));
typedef double Four __attribute__((vector_size(32)));
typedef Four FourLoose __attribute__((aligned(8)));
constexpr int square(float) { return VECTOR_BYTES == 64 ? 16 : 8; }
constexpr int square(double) { return 4; }

#if NEURODE_VECTOR_BYTES == 64
// Whole cache lines on both sides: pairs within quarters of the vectors, then the quarters.
INLINE void transpose_square(const float* from, ptrdiff_t step, float* to, ptrdiff_t to_step) {
    Vec<float> r[16], s[16];
    UNROLL for (int i = 0; i < 16; i++) r[i] = load_loose(from + i * step);
    UNROLL for (int i = 0; i < 8; i++) { // rows 2 i, 2 i + 1 interleaved
        Vec<float> a = r[2 * i], b = r[2 * i + 1];
        s[2 * i] = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        s[2 * i + 1] = SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    UNROLL for (int i = 0; i < 4; i++) // r[4 i + j]: column j of every quarter, rows 4 i ... 4 i + 3
        UNROLL for (int j = 0; j < 2; j++) {
            Vec<float> a = s[4 * i + j], b = s[4 * i + 2 + j];
            r[4 * i + 2 * j] = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            r[4 * i + 2 * j + 1] = SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    UNROLL for (int j = 0; j < 4; j++) { // quarters of four vectors: a 4 x 4 transpose of quarters
        Vec<float> a = r[j], b = r[4 + j], c = r[8 + j], d = r[12 + j];
        Vec<float> ab = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        Vec<float> cd = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        Vec<float> AB = SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        Vec<float> CD = SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        // ab: quarters a0 a2 b0 b2; AB: a1 a3 b1 b3
        store_loose(to + j * to_step,
                    SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27));
        store_loose(to + (4 + j) * to_step,
                    SHUFFLE(AB, CD, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27));
        store_loose(to + (8 + j) * to_step,
                    SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
        store_loose(to + (12 + j) * to_step,
                    SHUFFLE(AB, CD, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
    }
}
#else
INLINE void transpose_square(const float* from, ptrdiff_t step, float* to, ptrdiff_t to_step) {
    Eight r[8], s[8];
    UNROLL for (int i = 0; i < 8; i++) r[i] = *reinterpret_cast<const EightLoose*>(from + i * step);
    UNROLL for (int i = 0; i < 4; i++) {
        s[2 * i] = SHUFFLE(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[2 * i + 1] = SHUFFLE(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLL for (int i = 0; i < 2; i++)
        UNROLL for (int j = 0; j < 2; j++) {
            r[4 * i + 2 * j] = SHUFFLE(s[4 * i + j], s[4 * i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
            r[4 * i + 2 * j + 1] = SHUFFLE(s[4 * i + j], s[4 * i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        *reinterpret_cast<EightLoose*>(to + i * to_step) =
            SHUFFLE(r[i], r[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
        *reinterpret_cast<EightLoose*>(to + (4 + i) * to_step) =
            SHUFFLE(r[i], r[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

#endif

INLINE void transpose_square(const double* from, ptrdiff_t step, double* to, ptrdiff_t to_step) {
    Four r[4], s[4];
    UNROLL for (int i = 0; i < 4; i++) r[i] = *reinterpret_cast<const FourLoose*>(from + i * step);
    UNROLL for (int i = 0; i < 2; i++) {
        s[2 * i] = SHUFFLE(r[2 * i], r[2 * i + 1], 0, 4, 2, 6);
        s[2 * i + 1] = SHUFFLE(r[2 * i], r[2 * i + 1], 1, 5, 3, 7);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        *reinterpret_cast<FourLoose*>(to + i * to_step) = SHUFFLE(s[i], s[2 + i], 0, 1, 4, 5);
        *reinterpret_cast<FourLoose*>(to + (2 + i) * to_step) = SHUFFLE(s[i], s[2 + i], 2, 3, 6, 7);
    }
}

} // namespace NEURODE_NAMESPACE
