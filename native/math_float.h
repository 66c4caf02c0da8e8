// Elementary functions of vectors of floats. The few that networks have hot (tanh, exp, sigmoid) are computed in floats;
// the rest in doubles, which costs two to three times as much and leaves only the last rounding's error.
#pragma once
#include "math_double.h"
#include "tanh_table.h"

namespace NEURODE_NAMESPACE {

typedef Vec<float> F;
typedef Mask<float> N;

INLINE F f(float x) { return splat<float>(x); }

template <class G> INLINE F in_double(F x, G g) { return narrow(g(widen(x, 0)), g(widen(x, 1))); }
template <class G> INLINE F in_double(F x, F y, G g) {
    return narrow(g(widen(x, 0), widen(y, 0)), g(widen(x, 1), widen(y, 1)));
}

// e^r - 1 for r = x - n ln 2, |r| <= ln 2 / 2. ln 2 in two parts as in [Cephes expf.c]; r + r^2 p(r) with p of degree 4 fitted
// to the least maximum error relative to e^r - 1 (Lawson's iteration): 1.3e-8, a fifth of an ulp.
struct ReducedFloat {
    F expm1;
    N exponent;
};
INLINE ReducedFloat reduce_exp(F x) {
    static const float c[] = {0.4999999701976776f, 0.1666654348373413f, 0.04166720062494278f, 0.008366547524929047f,
                              0.0013882516650483012f};
    F shifted = x * f(1.44269504088896341f) + f(Float<float>::shifter), n = shifted - f(Float<float>::shifter);
    F r = (x - n * f(0.693359375f)) - n * f(-2.12194440e-4f);
    return {r + r * r * horner(c, r), bits<float>(shifted) - bits<float>(f(Float<float>::shifter))};
}

INLINE F power_of_two(N n) { return from_bits<float>((n + Float<float>::bias) << Float<float>::mantissa); }

INLINE F vexp(F x) {
    F c = choose<float>(x < f(-105), f(-105), x); // e^-105 rounds to 0, e^89 overflows
    c = choose<float>(c > f(89), f(89), c);
    ReducedFloat r = reduce_exp(c);
    N half = r.exponent >> 1; // two factors: results among the denormals, and near overflow
    F y = (f(1) + r.expm1) * power_of_two(half) * power_of_two(r.exponent - half);
    return choose<float>(x == x, y, x);
}

// tanh decides the speed of many networks, so both ways to it count instructions. And both take K vectors through every
// operation together, which hides the latency that one vector after the other would wait for.

// By table: which of 32 intervals, from the bits of |x| + 5/8; a polynomial around its middle (fit_tanh.py).
template <int K> INLINE void tanh_by_table(F (&x)[K]) {
    F r[K], p[K];
    N index[K];
    for (int k = 0; k < K; k++) r[k] = lesser<float>(f(9.3f), magnitude<float>(x[k])); // a NaN stays
    for (int k = 0; k < K; k++) index[k] = bits<float>(r[k] + f(0.625f)) >> 20;
    for (int k = 0; k < K; k++) r[k] = r[k] - lookup(TANH_TABLE[0], index[k]);
    for (int k = 0; k < K; k++) p[k] = lookup(TANH_TABLE[5], index[k]);
    for (int i = 4; i >= 1; i--)
        for (int k = 0; k < K; k++) p[k] = p[k] * r[k] + lookup(TANH_TABLE[i], index[k]);
    for (int k = 0; k < K; k++) x[k] = with_sign<float>(p[k], sign_of<float>(x[k]));
}

// By e^2x: 127 rides in the shifter and arrives as the bias of 2^n; one part of ln 2 is enough, because an error of the
// exponent counts (1 - tanh^2) / 2 times.
template <int K> INLINE void tanh_by_exp(F (&x)[K]) {
    static const float c[] = {0.4999999701976776f * 4, 0.1666654348373413f * 8, 0.04166720062494278f * 16,
                              0.008366547524929047f * 32, 0.0013882516650483012f * 64}; // as above, of 2 r
    F r[K], e[K], s[K];
    for (int k = 0; k < K; k++) r[k] = lesser<float>(f(10), magnitude<float>(x[k])); // tanh 10 = 1 - 4e-9; a NaN stays
    for (int k = 0; k < K; k++) s[k] = r[k] * f(2.88539008177792681f) + f(Float<float>::shifter + 127);
    for (int k = 0; k < K; k++) r[k] = r[k] - (s[k] - f(Float<float>::shifter + 127)) * f(0.34657359027997264f);
    for (int k = 0; k < K; k++) s[k] = from_bits<float>(bits<float>(s[k]) << 23);
    for (int k = 0; k < K; k++) e[k] = r[k] * f(c[4]) + f(c[3]);
    for (int i = 2; i >= 0; i--)
        for (int k = 0; k < K; k++) e[k] = e[k] * r[k] + f(c[i]);
    for (int k = 0; k < K; k++) e[k] = (r[k] + r[k]) + r[k] * r[k] * e[k];
    for (int k = 0; k < K; k++) e[k] = e[k] * s[k] + (s[k] - f(1));
    for (int k = 0; k < K; k++) x[k] = with_sign<float>(over_plus_two<float>(e[k]), sign_of<float>(x[k]));
}
template <int K> INLINE void tanh_of(F (&x)[K]) {
    if constexpr (HAS_LOOKUP) tanh_by_table(x);
    else tanh_by_exp(x);
}
INLINE F vtanh(F x) {
    F one[1] = {x};
    tanh_of(one);
    return one[0];
}

INLINE F vsigmoid(F x) {
    F e = vexp(-magnitude<float>(x)), q = f(1) / (f(1) + e);
    return choose<float>(x >= f(0), q, e * q);
}

#define NEURODE_IN_DOUBLE(name) \
    INLINE F name(F x) { return in_double(x, [](D v) { return name(v); }); }
NEURODE_IN_DOUBLE(vexp2)
NEURODE_IN_DOUBLE(vexpm1)
NEURODE_IN_DOUBLE(vlog)
NEURODE_IN_DOUBLE(vlog2)
NEURODE_IN_DOUBLE(vlog1p)
NEURODE_IN_DOUBLE(vsin)
NEURODE_IN_DOUBLE(vcos)
NEURODE_IN_DOUBLE(vtan)
NEURODE_IN_DOUBLE(vsinh)
NEURODE_IN_DOUBLE(vcosh)
NEURODE_IN_DOUBLE(vsoftplus)
NEURODE_IN_DOUBLE(vatan)
NEURODE_IN_DOUBLE(verf)
#undef NEURODE_IN_DOUBLE

INLINE F vsqrt(F x) {
    F y;
    for (int i = 0; i < LANES<float>; i++) y[i] = __builtin_sqrtf(x[i]);
    return y;
}

// ---- functions of both kinds of numbers

INLINE D vpow(D x, D y) {
    return by_lane(x, y, [](double a, double b) { return std::pow(a, b); });
}
INLINE F vpow(F x, F y) { // |x|^y = e^(y log |x|) has room to spare in doubles; the rest is signs and special values
    return in_double(x, y, [](D a, D b) {
        D size = magnitude<double>(a), p = vexp(b * vlog(size));
        D whole = choose<double>(magnitude<double>(b) < d(4e15), (b + d(Float<double>::shifter)) - d(Float<double>::shifter), b);
        D half = d(0.5) * b;
        D even = choose<double>(magnitude<double>(half) < d(2e15), (half + d(Float<double>::shifter)) - d(Float<double>::shifter), half);
        M negative = sign_of<double>(a) != 0, integer = whole == b, odd = integer & (even != half);
        p = choose<double>(negative & odd, -p, p);
        p = choose<double>((a < d(0)) & ~integer & (size < d(INF)), d(__builtin_nan("")), p);
        p = choose<double>((size == d(1)) & (magnitude<double>(b) == d(INF)), d(1), p);
        return choose<double>((b == d(0)) | (a == d(1)), d(1), p);
    });
}
template <class R> INLINE Vec<R> vatan2(Vec<R> y, Vec<R> x) {
    Vec<R> out;
    for (int i = 0; i < LANES<R>; i++) out[i] = std::atan2(y[i], x[i]);
    return out;
}

// As in PyTorch, both are NaN at minus infinity.
template <class R> INLINE Vec<R> vsilu(Vec<R> x) { return x * vsigmoid(x); }
INLINE D vgelu(D x) { return d(0.5) * x * (d(1) + verf(x * d(0.70710678118654752440))); }
INLINE F vgelu(F x) { return in_double(x, [](D v) { return vgelu(v); }); }

// Rounding, lane by lane: the builtins are one instruction where the processor has it.
#define NEURODE_ROUNDING(name, builtin)                                        \
    template <class R> INLINE Vec<R> name(Vec<R> x) {                          \
        Vec<R> y;                                                              \
        for (int i = 0; i < LANES<R>; i++) y[i] = builtin(x[i]);               \
        return y;                                                              \
    }
NEURODE_ROUNDING(vround, std::nearbyint)
NEURODE_ROUNDING(vfloor, std::floor)
NEURODE_ROUNDING(vceil, std::ceil)
NEURODE_ROUNDING(vtrunc, std::trunc)
#undef NEURODE_ROUNDING

} // namespace NEURODE_NAMESPACE
