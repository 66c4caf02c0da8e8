// The operations of straight lists on rows of V vectors, and linear combinations of stages.
#pragma once
#include "micro.h"
#include "straight.h"

namespace NEURODE_NAMESPACE {

// One entry of a tape: an operation and the rows that it reads and writes, which stay where they are during a solve.
template <class R> struct Entry {
    struct Term {
        const R* x;
        R w;
    };
    void (*run)(const Entry&);
    R* out;
    const R *a, *b, *c;
    const Term* terms; // of a combination
    Function<R> micro; // of an operation without a kernel of its own
    int32_t count, n;  // terms; numbers of a row
};
template <class R> using Kernel = void (*)(const Entry<R>&);

template <class R, int OP> INLINE Vec<R> line_op(Vec<R> a, Vec<R> b, Vec<R> c) {
    if constexpr (OP == neurode::FMS) return a * b - c;
    else return apply<R, OP>(a, b, c);
}

// OP over V vectors. Operands whose bit is set in ONE are one number for all lanes.
template <class R, int OP, int ONE, int V> void over_row(const Entry<R>& e) {
    constexpr int L = LANES<R>, arity = OP == neurode::FMS ? 3 : arity_of(OP);
    Vec<R> a = {}, b = {}, c = {};
    if constexpr (ONE & 1) a = splat<R>(*e.a);
    if constexpr (ONE & 2) b = splat<R>(*e.b);
    if constexpr (ONE & 4) c = splat<R>(*e.c);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
        if constexpr (!(ONE & 1)) a = load(e.a + v * L);
        if constexpr (arity > 1 && !(ONE & 2)) b = load(e.b + v * L);
        if constexpr (arity > 2 && !(ONE & 4)) c = load(e.c + v * L);
        store(e.out + v * L, line_op<R, OP>(a, b, c));
    }
}
template <class R> void row_by_micro(const Entry<R>& e) { e.micro(e.out, e.a, e.b, e.c, e.n); }

template <class R, int V> Kernel<R> row_kernel_for(int op, int one) {
#define NEURODE_ROW(OP, ONE) \
    if (op == OP && one == ONE) return over_row<R, OP, ONE, V>;
    NEURODE_ROW(COPY, 0) NEURODE_ROW(COPY, 1) NEURODE_ROW(NEG, 0) NEURODE_ROW(ADD, 0) NEURODE_ROW(ADD, 2)
    NEURODE_ROW(SUB, 0) NEURODE_ROW(SUB, 1) NEURODE_ROW(SUB, 2) NEURODE_ROW(MUL, 0) NEURODE_ROW(MUL, 2)
    NEURODE_ROW(DIV, 0) NEURODE_ROW(DIV, 1) NEURODE_ROW(DIV, 2) NEURODE_ROW(FMA, 0) NEURODE_ROW(FMA, 2)
    NEURODE_ROW(FMA, 4) NEURODE_ROW(FMA, 6) NEURODE_ROW(FNMA, 0) NEURODE_ROW(FNMA, 2) NEURODE_ROW(FNMA, 4)
    NEURODE_ROW(FNMA, 6) NEURODE_ROW(neurode::FMS, 0) NEURODE_ROW(neurode::FMS, 2) NEURODE_ROW(neurode::FMS, 4)
    NEURODE_ROW(neurode::FMS, 6)
#undef NEURODE_ROW
    return nullptr;
}
template <class R> struct RowKernels {
    Kernel<R> of[4][neurode::NUM_LINE_OPS][8];
    RowKernels() {
        for (int op = 0; op < neurode::NUM_LINE_OPS; op++)
            for (int one = 0; one < 8; one++) {
                of[0][op][one] = row_kernel_for<R, 1>(op, one), of[1][op][one] = row_kernel_for<R, 2>(op, one);
                of[2][op][one] = row_kernel_for<R, 4>(op, one), of[3][op][one] = row_kernel_for<R, 8>(op, one);
            }
    }
};
// For rows of 1, 2, 4 or 8 vectors. Null where there is none: then the operands must be rows, and `row_by_micro` does it.
template <class R> INLINE Kernel<R> row_kernel(int op, int one, int vectors) {
    static const RowKernels<R> all;
    return all.of[vectors == 8 ? 3 : vectors / 2][op][one];
}

// Linear combinations of N rows (0: of as many as `count` says): sum_j w_j x_j, times the row b where SCALED, plus the row a where
// ADDED. The weights stay in registers.
template <class R, int N, bool SCALED, bool ADDED> void combination(const Entry<R>& e) {
    constexpr int L = LANES<R>;
    const typename Entry<R>::Term* t = e.terms;
    Vec<R> w[N ? N : 1];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) w[j] = splat<R>(t[j].w);
#pragma GCC unroll 2
    for (int i = 0; i < e.n; i += L) {
        Vec<R> sum = (N ? w[0] : splat<R>(t[0].w)) * load(t[0].x + i);
        if constexpr (N > 0) {
#pragma GCC unroll 8
            for (int j = 1; j < N; j++) sum += w[j] * load(t[j].x + i);
        } else {
            for (int j = 1; j < e.count; j++) sum += splat<R>(t[j].w) * load(t[j].x + i);
        }
        if constexpr (SCALED && ADDED) sum = load(e.a + i) + load(e.b + i) * sum;
        else if constexpr (SCALED) sum = load(e.b + i) * sum;
        else if constexpr (ADDED) sum = load(e.a + i) + sum;
        store(e.out + i, sum);
    }
}
template <class R, bool SCALED, bool ADDED> Kernel<R> combination_for(int count) {
    static const Kernel<R> by_count[] = {
        combination<R, 0, SCALED, ADDED>, combination<R, 1, SCALED, ADDED>, combination<R, 2, SCALED, ADDED>,
        combination<R, 3, SCALED, ADDED>, combination<R, 4, SCALED, ADDED>, combination<R, 5, SCALED, ADDED>,
        combination<R, 6, SCALED, ADDED>, combination<R, 7, SCALED, ADDED>};
    return by_count[count < 8 ? count : 0];
}

} // namespace NEURODE_NAMESPACE
