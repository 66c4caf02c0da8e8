// Matrix products over tiles: one matrix for all samples (weights packed once a solve), and weight gradients.
#pragma once
#include "simd.h"

namespace NEURODE_NAMESPACE {

// A micro-kernel keeps ROWS x COLUMNS vectors of results in registers: 24 of 32 registers, 12 of 16.
// With one column of vectors (tiles of one vector) as many rows as that; with two, half: fewer loads a product.
constexpr int ACCUMULATORS = MANY_REGISTERS ? 24 : 12;
constexpr int MOST_THIN = 8; // rows of the smaller factor of a weight gradient that needs no panels
constexpr int VECTOR_COLUMNS = 8; // sums beside each other where features lie in the lanes: as many as hide the latency
constexpr int WEIGHTS_AHEAD = 256; // numbers; weights of wide layers come from beyond the second-level cache

// Rows of a matrix are cut into blocks of nearly equal height, at most `most`; the first `taller` have one row more.
struct Blocks {
    int count, height, taller;
    Blocks(int rows, int most) {
        count = (rows + most - 1) / most;
        height = count ? rows / count : 0;
        taller = rows - height * count;
    }
    int rows_of(int block) const { return height + (block < taller); }
};

// Packs the O x K matrix with elements m[o so + k sk] block by block: for every k the block's rows beside each other.
template <class R> void pack(const R* m, int O, int K, ptrdiff_t so, ptrdiff_t sk, int most, R* to) {
    Blocks blocks(O, most);
    for (int b = 0, o = 0; b < blocks.count; o += blocks.rows_of(b), b++)
        for (int k = 0; k < K; k++)
            for (int r = 0; r < blocks.rows_of(b); r++) *to++ = m[(o + r) * so + k * sk];
}

// out[r][v] = bias[r] + sum_k w[k][r] x[k][v] for ROWS rows and COLUMNS vectors; T numbers from row to row of x and out.
// At every k it asks for the line at `ahead`, which moves on by `ahead_step` numbers: what somebody will need later.
template <class R, int ROWS, int COLUMNS>
void product_block(const R* __restrict w, const R* __restrict x, int K, int T, const R* bias, ptrdiff_t bias_step,
                   R* __restrict out, const R* ahead, ptrdiff_t ahead_step) {
    constexpr int L = LANES<R>;
    Vec<R> sum[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < ROWS; r++) {
        Vec<R> start = bias ? splat<R>(bias[r * bias_step]) : Vec<R>{};
        UNROLL for (int v = 0; v < COLUMNS; v++) sum[r][v] = start;
    }
    for (int k = 0; k < K; k++) {
        __builtin_prefetch(w + WEIGHTS_AHEAD);
        __builtin_prefetch(ahead);
        ahead += ahead_step;
        Vec<R> column[COLUMNS];
        UNROLL for (int v = 0; v < COLUMNS; v++) column[v] = load(x + v * L);
        UNROLL for (int r = 0; r < ROWS; r++) {
            Vec<R> weight = splat<R>(w[r]);
            UNROLL for (int v = 0; v < COLUMNS; v++) sum[r][v] += weight * column[v];
        }
        x += T;
        w += ROWS;
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < COLUMNS; v++) store(out + r * T + v * L, sum[r][v]);
}

// acc[r][v] += sum_k g[r][k] x[k][v]: ROWS rows of g (its numbers one after the other, `step` from row to row), one panel x of
// COLUMNS vectors. `slabs` of T numbers of g lie `slab` apart: the stages of a step. The sum of a step is formed before it meets
// the sum of all steps: long solves round less. `after` is what the next call reads of g.
template <class R, int ROWS, int COLUMNS>
void outer_block(const R* __restrict g, ptrdiff_t step, ptrdiff_t slab, int slabs, int T, const R* __restrict x,
                 R* __restrict acc, const R* after) {
    constexpr int L = LANES<R>, W = COLUMNS * L;
    Vec<R> sum[ROWS][COLUMNS] = {};
    prefetch(acc, ROWS * W);
    for (int s = 0; s < slabs; s++) {
        const R *row = g + s * slab, *next = s + 1 < slabs ? row + slab : after;
        for (int r = 0; T >= L && r < ROWS; r++) prefetch(next + r * step, T);
        for (int t = 0; t < T; t++) {
            Vec<R> column[COLUMNS];
            UNROLL for (int v = 0; v < COLUMNS; v++) column[v] = load(x + v * L);
            x += W;
            UNROLL for (int r = 0; r < ROWS; r++) {
                Vec<R> weight = splat<R>(row[r * step + t]);
                UNROLL for (int v = 0; v < COLUMNS; v++) sum[r][v] += weight * column[v];
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < COLUMNS; v++) store(acc + r * W + v * L, load(acc + r * W + v * L) + sum[r][v]);
}

// acc[c ROWS + r] += sum_k many[c][k] few[r][k], in every lane by itself: neither factor needs turning. Rows lie `*_step` apart, the
// stages of a step `*_slab`.
template <class R, int ROWS, int COLUMNS>
void thin_block(const R* __restrict few, ptrdiff_t few_step, ptrdiff_t few_slab, const R* __restrict many, ptrdiff_t many_step,
                ptrdiff_t many_slab, int slabs, int T, R* __restrict acc) {
    constexpr int L = LANES<R>;
    Vec<R> sum[COLUMNS][ROWS] = {};
    for (int s = 0; s < slabs; s++, few += few_slab, many += many_slab)
        for (int t = 0; t < T; t += L) {
            Vec<R> row[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++) row[r] = load(few + r * few_step + t);
            UNROLL for (int c = 0; c < COLUMNS; c++) {
                Vec<R> column = load(many + c * many_step + t);
                UNROLL for (int r = 0; r < ROWS; r++) sum[c][r] += column * row[r];
            }
        }
    UNROLL for (int c = 0; c < COLUMNS; c++)
        UNROLL for (int r = 0; r < ROWS; r++) {
            R* to = acc + (c * ROWS + r) * L;
            store(to, load(to) + sum[c][r]);
        }
}

// ---- one sample: features lie in the lanes

// out[o] = bias[o] + sum_k w[k][o] x[k] for COLUMNS vectors of outputs, the last `wanted` numbers of them at most. Few columns take
// several k at once, each into sums of their own: a sum alone would wait for itself.
template <class R, int COLUMNS>
void vector_block(const R* __restrict w, const R* __restrict x, int K, const R* bias, ptrdiff_t bias_step, int wanted,
                  R* __restrict out) {
    constexpr int L = LANES<R>, W = COLUMNS * L, AT_ONCE = VECTOR_COLUMNS / COLUMNS;
    Vec<R> sum[AT_ONCE][COLUMNS] = {};
    int k = 0;
    for (; k + AT_ONCE <= K; k += AT_ONCE, w += AT_ONCE * W)
        UNROLL for (int q = 0; q < AT_ONCE; q++) {
            Vec<R> number = splat<R>(x[k + q]);
            UNROLL for (int v = 0; v < COLUMNS; v++) sum[q][v] += number * load(w + q * W + v * L);
        }
    for (; k < K; k++, w += W)
        UNROLL for (int v = 0; v < COLUMNS; v++) sum[0][v] += splat<R>(x[k]) * load(w + v * L);
    for (int q = 1; q < AT_ONCE; q++)
        UNROLL for (int v = 0; v < COLUMNS; v++) sum[0][v] += sum[q][v];
    if (bias) {
        alignas(64) R start[W] = {};
        for (int o = 0; o < wanted; o++) start[o] = bias[o * bias_step];
        UNROLL for (int v = 0; v < COLUMNS; v++) sum[0][v] += load(start + v * L);
    }
    UNROLL for (int v = 0; v < COLUMNS - 1; v++) store_loose(out + v * L, sum[0][v]);
    int last = wanted - (COLUMNS - 1) * L;
    if (last == L) store_loose(out + (COLUMNS - 1) * L, sum[0][COLUMNS - 1]);
    else store_part(out + (COLUMNS - 1) * L, sum[0][COLUMNS - 1], last);
}

// Packs for it: blocks of VECTOR_COLUMNS vectors of outputs and a narrower last one, zeros where outputs end within a vector.
template <class R> int vector_columns(int O) { return (O + LANES<R> - 1) / LANES<R>; }
template <class R> void pack_vectors(const R* m, int O, int K, ptrdiff_t so, ptrdiff_t sk, R* to) {
    constexpr int L = LANES<R>;
    for (int v = 0; v < vector_columns<R>(O); v += VECTOR_COLUMNS) {
        int columns = vector_columns<R>(O) - v < VECTOR_COLUMNS ? vector_columns<R>(O) - v : VECTOR_COLUMNS;
        int wanted = O - v * L < columns * L ? O - v * L : columns * L;
        const R* from = m + ptrdiff_t(v) * L * so;
        for (int k = 0; k < K; k++, to += columns * L) {
            if (so == 1) std::memcpy(to, from + k * sk, wanted * sizeof(R));
            for (int o = so == 1 ? wanted : 0; o < columns * L; o++) to[o] = o < wanted ? from[o * so + k * sk] : R(0);
        }
    }
}

template <class R> using VectorBlock = void (*)(const R*, const R*, int, const R*, ptrdiff_t, int, R*);
template <class R>
using ProductBlock = void (*)(const R*, const R*, int, int, const R*, ptrdiff_t, R*, const R*, ptrdiff_t);
template <class R>
using OuterBlock = void (*)(const R*, ptrdiff_t, ptrdiff_t, int, int, const R*, R*, const R*);
template <class R>
using ThinBlock = void (*)(const R*, ptrdiff_t, ptrdiff_t, const R*, ptrdiff_t, ptrdiff_t, int, int, R*);

// The kernels of every height, for one column of vectors and for two. A constant, as the table of pointwise operations is.
template <class R> struct Kernels {
    ProductBlock<R> product[3][ACCUMULATORS + 1] = {};
    OuterBlock<R> outer[3][ACCUMULATORS + 1] = {};
    VectorBlock<R> vector[VECTOR_COLUMNS + 1] = {};
    ThinBlock<R> thin[MOST_THIN + 1] = {}, thin_rest[MOST_THIN + 1] = {}; // of ACCUMULATORS / rows columns, of one
    constexpr Kernels() {
        fill_vector<VECTOR_COLUMNS>();
        fill_thin<MOST_THIN>();
        fill<ACCUMULATORS, 1>();
        fill<ACCUMULATORS / 2, 2>();
    }

  private:
    template <int COLUMNS> constexpr void fill_vector() {
        vector[COLUMNS] = vector_block<R, COLUMNS>;
        if constexpr (COLUMNS > 1) fill_vector<COLUMNS - 1>();
    }
    template <int ROWS> constexpr void fill_thin() {
        thin[ROWS] = thin_block<R, ROWS, ACCUMULATORS / ROWS>;
        thin_rest[ROWS] = thin_block<R, ROWS, 1>;
        if constexpr (ROWS > 1) fill_thin<ROWS - 1>();
    }
    template <int ROWS, int COLUMNS> constexpr void fill() {
        product[COLUMNS][ROWS] = product_block<R, ROWS, COLUMNS>;
        outer[COLUMNS][ROWS] = outer_block<R, ROWS, COLUMNS>;
        if constexpr (ROWS > 1) fill<ROWS - 1, COLUMNS>();
    }
};
template <class R> constexpr Kernels<R> KERNELS;

// Most rows of a block for a tile of T samples: the packing depends on it.
template <class R> int block_height(int T) { return T % (2 * LANES<R>) == 0 ? ACCUMULATORS / 2 : ACCUMULATORS; }

// ---- panels: rows of a tile turned so that features lie side by side

template <class R> constexpr int PANEL = 2 * LANES<R>; // features of a panel

template <class R> int num_panels(int features) { return (features + PANEL<R> - 1) / PANEL<R>; }

// Rows at `from`, `step` apart, as one panel: `features` of them (at most PANEL), zeros beyond. T is a whole number of vectors.
template <class R> void even_panel(const R* from, ptrdiff_t step, int features, int T, R* to) {
    constexpr int Q = square(R{}), P = PANEL<R>;
    for (int j = 0; j < P; j += Q) {
        if (j + Q <= features) {
            for (int t = 0; t < T; t += Q) transpose_square(from + j * step + t, step, to + t * P + j, P);
            continue;
        }
        for (int i = 0; i < Q; i++)
            for (int t = 0; t < T; t++) to[t * P + j + i] = j + i < features ? from[(j + i) * step + t] : R(0);
    }
}

// The same of rows that lie anywhere: `row(i)` is row i.
template <class R, class Row> void uneven_panel(Row row, int features, int T, R* to) {
    constexpr int P = PANEL<R>;
    for (int i = 0; i < P; i++) {
        const R* from = i < features ? row(i) : nullptr;
        for (int t = 0; t < T; t++) to[t * P + i] = from ? from[t] : R(0);
    }
}

} // namespace NEURODE_NAMESPACE
