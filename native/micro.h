// The pointwise operations: `micro(op)` is a function that applies one of them to arrays of whole vectors.
// Numbers and meaning as in src/neurode/fused/program.py (class Micro) and docs/fused.md.
#pragma once
#include "math_float.h"
#include "opcodes.h"

namespace NEURODE_NAMESPACE {

// out[i] = op(a[i], b[i], c[i]) for i < n; `out` may be one of the operands, and no array need be aligned.
// Operands that the operation does not have are not read.
template <class R> using Function = void (*)(R* out, const R* a, const R* b, const R* c, ptrdiff_t n);

// The last n numbers, fewer than a vector, by way of a whole one: only tiles of one sample have such.
template <class R> void over_rest(Function<R> f, int arity, R* out, const R* a, const R* b, const R* c, ptrdiff_t n) {
    alignas(64) R operands[3][LANES<R>] = {}, result[LANES<R>];
    const R* from[3] = {a, b, c};
    for (int k = 0; k < arity; k++)
        for (int i = 0; i < LANES<R>; i++) operands[k][i] = from[k][i < n ? i : 0];
    f(result, operands[0], operands[1], operands[2], LANES<R>);
    for (int i = 0; i < n; i++) out[i] = result[i];
}

template <class R> INLINE Vec<R> truth(Mask<R> m) { return from_bits<R>(m & bits<R>(splat<R>(1))); }
template <class R> INLINE Mask<R> is_true(Vec<R> v) { return v != splat<R>(0); }

template <class R> INLINE Vec<R> vmax(Vec<R> a, Vec<R> b) { // NaN where either is
    return choose<R>((a > b) | (a != a), a, b);
}
template <class R> INLINE Vec<R> vmin(Vec<R> a, Vec<R> b) { return choose<R>((a < b) | (a != a), a, b); }

template <class R> INLINE Vec<R> vsign(Vec<R> a) {
    Vec<R> one = truth<R>(a != splat<R>(0));
    return choose<R>(a == a, with_sign<R>(one, sign_of<R>(a)) * truth<R>(a != splat<R>(0)), a);
}
template <class R> INLINE Vec<R> vmod(Vec<R> a, Vec<R> b) {
    Vec<R> out;
    for (int i = 0; i < LANES<R>; i++) {
        R r = std::fmod(a[i], b[i]);
        out[i] = r != 0 && (r < 0) != (b[i] < 0) ? r + b[i] : r;
    }
    return out;
}

template <class R, int OP> INLINE Vec<R> apply(Vec<R> a, Vec<R> b, Vec<R> c) {
    if constexpr (OP == COPY) return a;
    if constexpr (OP == ADD) return a + b;
    if constexpr (OP == SUB) return a - b;
    if constexpr (OP == MUL) return a * b;
    if constexpr (OP == DIV) return a / b;
    if constexpr (OP == MAX) return vmax<R>(a, b);
    if constexpr (OP == MIN) return vmin<R>(a, b);
    if constexpr (OP == POW) return vpow(a, b);
    if constexpr (OP == ATAN2) return vatan2<R>(a, b);
    if constexpr (OP == FMA) return a * b + c;
    if constexpr (OP == FNMA) return c - a * b;
    if constexpr (OP == NEG) return from_bits<R>(bits<R>(a) ^ Float<R>::sign);
    if constexpr (OP == ABS) return magnitude<R>(a);
    if constexpr (OP == SQRT) return vsqrt(a);
    if constexpr (OP == RSQRT) return splat<R>(1) / vsqrt(a);
    if constexpr (OP == RECIPROCAL) return splat<R>(1) / a;
    if constexpr (OP == EXP) return vexp(a);
    if constexpr (OP == EXPM1) return vexpm1(a);
    if constexpr (OP == LOG) return vlog(a);
    if constexpr (OP == LOG1P) return vlog1p(a);
    if constexpr (OP == TANH) return vtanh(a);
    if constexpr (OP == SIGMOID) return vsigmoid(a);
    if constexpr (OP == SOFTPLUS) return vsoftplus(a);
    if constexpr (OP == SIN) return vsin(a);
    if constexpr (OP == COS) return vcos(a);
    if constexpr (OP == TAN) return vtan(a);
    if constexpr (OP == ERF) return verf(a);
    if constexpr (OP == ATAN) return vatan(a);
    if constexpr (OP == SINH) return vsinh(a);
    if constexpr (OP == COSH) return vcosh(a);
    if constexpr (OP == RELU) return choose<R>(a <= splat<R>(0), splat<R>(0), a);
    if constexpr (OP == SILU) return vsilu<R>(a);
    if constexpr (OP == GELU) return vgelu(a);
    if constexpr (OP == SIGN) return vsign<R>(a);
    if constexpr (OP == FLOOR) return vfloor<R>(a);
    if constexpr (OP == CEIL) return vceil<R>(a);
    if constexpr (OP == TRUNC) return vtrunc<R>(a);
    if constexpr (OP == ROUND) return vround<R>(a);
    if constexpr (OP == LOG2) return vlog2(a);
    if constexpr (OP == EXP2) return vexp2(a);
    if constexpr (OP == LT) return truth<R>(a < b);
    if constexpr (OP == LE) return truth<R>(a <= b);
    if constexpr (OP == GT) return truth<R>(a > b);
    if constexpr (OP == GE) return truth<R>(a >= b);
    if constexpr (OP == EQ) return truth<R>(a == b);
    if constexpr (OP == NE) return truth<R>(a != b);
    if constexpr (OP == AND) return truth<R>(is_true<R>(a) & is_true<R>(b));
    if constexpr (OP == OR) return truth<R>(is_true<R>(a) | is_true<R>(b));
    if constexpr (OP == NOT) return truth<R>(a == splat<R>(0));
    if constexpr (OP == WHERE) return choose<R>(is_true<R>(a), b, c);
    if constexpr (OP == DTANH) return a - a * b * b;
    if constexpr (OP == DSIGMOID) return a * b * (splat<R>(1) - b);
    if constexpr (OP == DRELU) return choose<R>(b <= c, splat<R>(0), a);
    if constexpr (OP == MOD) return vmod<R>(a, b);
}

template <class R, int OP> void over(R* out, const R* a, const R* b, const R* c, ptrdiff_t n) {
    constexpr int arity = arity_of(OP), L = LANES<R>;
    ptrdiff_t i = 0;
    for (; i + L <= n; i += L) {
        Vec<R> x = load_loose(a + i), y = x, z = x;
        if constexpr (arity > 1) y = load_loose(b + i);
        if constexpr (arity > 2) z = load_loose(c + i);
        store_loose(out + i, apply<R, OP>(x, y, z));
    }
    if (i < n) over_rest<R>(over<R, OP>, arity, out + i, a + i, arity > 1 ? b + i : b, arity > 2 ? c + i : c, n - i);
}

template <> inline void over<float, TANH>(float* out, const float* a, const float*, const float*, ptrdiff_t n) {
    constexpr int L = LANES<float>, K = HAS_LOOKUP ? 2 : 4; // measured: registers run short beyond
    ptrdiff_t i = 0;
    for (; i + K * L <= n; i += K * L) {
        F x[K];
        for (int k = 0; k < K; k++) x[k] = load_loose(a + i + k * L);
        tanh_of(x);
        for (int k = 0; k < K; k++) store_loose(out + i + k * L, x[k]);
    }
    for (; i + L <= n; i += L) store_loose(out + i, vtanh(load_loose(a + i)));
    if (i < n) over_rest<float>(over<float, TANH>, 1, out + i, a + i, nullptr, nullptr, n - i);
}

// All of them by number. The table is a constant: one made at the first call would be asked for at every call.
template <class R> struct Micros {
    Function<R> functions[NUM_MICROS] = {};
    constexpr Micros() { fill<NUM_MICROS - 1>(); }

  private:
    template <int OP> constexpr void fill() {
        functions[OP] = over<R, OP>;
        if constexpr (OP > 0) fill<OP - 1>();
    }
};
template <class R> constexpr Micros<R> MICROS;

template <class R> INLINE Function<R> micro(int op) { return MICROS<R>.functions[op]; }

} // namespace NEURODE_NAMESPACE
