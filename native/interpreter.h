// Runs the sections of a tile program on one tile of T samples.
#pragma once
#include "micro.h"
#include "product.h"
#include "program.h"
#include "workspace.h"

namespace NEURODE_NAMESPACE {

using neurode::Instruction;
using neurode::Operand;
using neurode::Place;
using neurode::Program;
using neurode::Section;

// Where the rows of every space begin. UNIFORM is one number a row, the others T.
template <class R> struct Bases {
    R* at[NUM_SPACES] = {};
    R*& operator[](int space) { return at[space]; }
    R* operator[](int space) const { return at[space]; }
};

constexpr size_t THIN_BYTES = 64 * 1024; // what a weight gradient may take that is summed lane by lane
constexpr int STRIP = 512; // numbers that one step of a pointwise chain takes through at a time: a few of them fit L1

template <class R> class Interpreter {
  public:
    // Tile width, and the packed weights of the sections that will run. `work` must have `bytes(...)`.
    Interpreter(const Program& program, const R* u, int T, int stages, bool backward, Workspace& work)
        : program_(program), u_(u), T_(T), height_(block_height<R>(T)) {
        forward_ = pack_section(program.forward, work);
        if (backward) backward_ = pack_section(program.backward, work);
        registers_ = work.take<R>(size_t(program.max_registers) * strip());
        gathered_ = work.take<R>(gather_size(program, T, stages));
        if (backward) {
            panel_ = work.take<R>(size_t(PANEL<R>) * stages * T);
        }
    }

    static size_t bytes(const Program& p, int T, int stages, bool backward) {
        size_t n = packed_bytes(p.forward, T) + Workspace::size_of<R>(size_t(p.max_registers) * strip(T)) +
                   Workspace::size_of<R>(gather_size(p, T, stages));
        if (backward)
            n += packed_bytes(p.backward, T) + Workspace::size_of<R>(size_t(PANEL<R>) * stages * T);
        return n;
    }

    int T() const { return T_; }
    R* row(const Bases<R>& bases, Place p) const { return bases[p.space] + ptrdiff_t(p.row) * T_; }

    void forward(const Bases<R>& bases) { run(program_.forward, forward_, bases); }
    void backward(const Bases<R>& bases) { run(program_.backward, backward_, bases); }

    // Adds the parameter gradients of all `stages` of a step; SAVED and COTANGENT of a stage lie `saved_step`, `cot_step` apart.
    // `sums` (sums_size numbers, aligned) are in the tile's own layout.
    void gradient(const Bases<R>& bases, int stages, ptrdiff_t saved_step, ptrdiff_t cot_step, R* sums) {
        ptrdiff_t steps[NUM_SPACES] = {0, saved_step, 0, cot_step, 0};
        for (const Instruction& i : program_.gradient) {
            if (i.opcode == WGRAD) {
                if (is_thin(i, T_)) thin_gradient(i, bases, stages, steps, sums);
                else weight_gradient(i, bases, stages, steps, sums);
                sums += wgrad_size(i, T_);
            } else {
                row_gradient(i, bases, stages, steps, sums);
                sums += ptrdiff_t(i.n) * LANES<R>;
            }
        }
    }

    // Adds what `gradient` has gathered on tiles of T samples to the program's accumulators.
    static void flush(const Program& program, int T, const R* sums, R* acc) {
        for (const Instruction& i : program.gradient) {
            if (i.opcode == WGRAD && is_thin(i, T)) {
                bool outputs = outputs_are_few(i);
                int rows = outputs ? i.O : i.K, features = outputs ? i.K : i.O;
                for (int f = 0; f < features; f++)
                    for (int r = 0; r < rows; r++, sums += LANES<R>) {
                        int o = outputs ? r : f, k = outputs ? f : r;
                        R sum = 0;
                        for (int l = 0; l < LANES<R>; l++) sum += sums[l];
                        acc[i.acc + ptrdiff_t(o) * i.acc_o + ptrdiff_t(k) * i.acc_k] += sum;
                    }
            } else if (i.opcode == WGRAD) {
                bool turned = panels_of_first(i);
                int rows = turned ? i.K : i.O, features = turned ? i.O : i.K;
                for (int p = 0; p < num_panels<R>(features); p++)
                    for (int r = 0; r < rows; r++)
                        for (int j = 0; j < PANEL<R>; j++, sums++) {
                            int feature = p * PANEL<R> + j;
                            if (feature >= features) continue;
                            int o = turned ? feature : r, k = turned ? r : feature;
                            acc[i.acc + ptrdiff_t(o) * i.acc_o + ptrdiff_t(k) * i.acc_k] += *sums;
                        }
            } else {
                for (int k = 0; k < i.n; k++)
                    for (int l = 0; l < LANES<R>; l++) acc[i.acc + k] += *sums++;
            }
        }
    }

    static size_t sums_size(const Program& p, int T) {
        size_t n = 0;
        for (const Instruction& i : p.gradient) n += i.opcode == WGRAD ? wgrad_size(i, T) : size_t(i.n) * LANES<R>;
        return n;
    }

  private:
    // ---- operands

    const R* lane_row(const Operand& x, const Bases<R>& bases, int i) const {
        if (!x.mapped()) return bases[x.space] + (ptrdiff_t(x.row) + ptrdiff_t(i) * x.stride) * T_;
        return bases[x.map[i] >> SPACE_SHIFT] + ptrdiff_t(x.map[i] & ROW_MASK) * T_;
    }

    // Rows [first, first + n) of a lane operand one after the other: in place, or copied to `to`.
    const R* rows_of(const Operand& x, const Bases<R>& bases, int first, int n, R* to) const {
        if (x.contiguous()) return lane_row(x, bases, first);
        if (T_ == 1) {
            for (int i = 0; i < n; i++) to[i] = *lane_row(x, bases, first + i);
            return to;
        }
        for (int i = 0; i < n; i++) std::memcpy(to + ptrdiff_t(i) * T_, lane_row(x, bases, first + i), T_ * sizeof(R));
        return to;
    }

    void spread(const Operand& x, int first, int n, R* to) const { // uniform numbers as rows
        for (int i = 0; i < n; i++) {
            R number = u_[x.ref(first + i) & ROW_MASK];
            if (T_ == 1) {
                to[i] = number;
                continue;
            }
            Vec<R> v = splat<R>(number);
            for (int t = 0; t < T_; t += LANES<R>) store(to + ptrdiff_t(i) * T_ + t, v);
        }
    }

    // ---- sections

    void run(const Section& section, R* const* packed, const Bases<R>& bases) {
        int product = 0;
        for (const Instruction& i : section) {
            switch (i.opcode) {
            case POINTWISE: pointwise(i, bases); break;
            case GEMM:
                if (T_ == 1) vector_of(i, packed[product++], bases);
                else product_of(i, packed[product++], bases);
                break;
            case REDUCE: reduce(i, bases); break;
            case SAMPLE_PRODUCT: sample_product(i, bases); break;
            default: break;
            }
        }
    }

    void pointwise(const Instruction& i, const Bases<R>& bases) {
        int most = strip() / T_;
        const R* inputs[neurode::MAX_REGISTERS];
        R* results[neurode::MAX_REGISTERS];
        int size = strip();
        for (int first = 0; first < i.n; first += most) {
            int rows = i.n - first < most ? i.n - first : most;
            ptrdiff_t numbers = ptrdiff_t(rows) * T_;
            for (int k = 0; k < i.num_inputs; k++) {
                R* to = registers_ + ptrdiff_t(k) * size;
                const Operand& x = i.inputs[k];
                inputs[k] = to;
                if (!x.uniform()) inputs[k] = rows_of(x, bases, first, rows, to);
                else if (first == 0 || x.stride != 0 || x.mapped()) spread(x, first, rows, to);
            }
            for (int s = 0; s < i.num_steps; s++) results[s] = registers_ + ptrdiff_t(i.num_inputs + s) * size;
            for (int k = i.num_outputs - 1; k >= 0; k--) { // a result goes straight to where it is wanted
                int s = i.outputs[k].reg - i.num_inputs;
                if (s >= 0) results[s] = row(bases, i.outputs[k].at) + ptrdiff_t(first) * T_;
            }
            auto reg = [&](int r) -> const R* { return r < 0 ? nullptr : r < i.num_inputs ? inputs[r] : results[r - i.num_inputs]; };
            for (int s = 0; s < i.num_steps; s++) {
                const auto& step = i.steps[s];
                micro<R>(step.micro)(results[s], reg(step.a), reg(step.b), reg(step.c), numbers);
            }
            for (int k = 0; k < i.num_outputs; k++) {
                R* to = row(bases, i.outputs[k].at) + ptrdiff_t(first) * T_;
                const R* from = reg(i.outputs[k].reg);
                if (from != to) std::memcpy(to, from, numbers * sizeof(R));
            }
        }
    }

    void product_of(const Instruction& i, const R* packed, const Bases<R>& bases) {
        const Kernels<R>& k = KERNELS<R>;
        int columns = height_ == ACCUMULATORS ? 1 : 2, width = columns * LANES<R>;
        Blocks blocks(i.O, height_);
        for (int c = 0; c < i.count; c++) {
            const R* x = rows_of(i.x, bases, c * i.K, i.K, gathered_);
            R* out = row(bases, i.out) + ptrdiff_t(c) * i.O * T_;
            const R* w = packed;
            for (int b = 0, o = 0; b < blocks.count; b++) {
                int rows = blocks.rows_of(b);
                look_ahead(i, bases, c * i.O, b == 0 ? 0 : o + 2 * height_, b == 0 ? 3 * height_ : height_);
                const R* bias = i.bias < 0 ? nullptr : u_ + i.bias + ptrdiff_t(o) * i.bias_o;
                R* to = out + ptrdiff_t(o) * T_;
                for (int t = 0; t < T_; t += width) {
                    ptrdiff_t step = fetched_a_turn(rows * columns);
                    k.product[columns][rows](w, x + t, i.K, T_, bias, i.bias_o, to + t, step ? ahead_ : x, step);
                    ahead_ += step * i.K;
                }
                epilogue(i, bases, c * i.O + o, rows, to);
                w += ptrdiff_t(rows) * i.K;
                o += rows;
            }
        }
    }

    void vector_of(const Instruction& i, const R* packed, const Bases<R>& bases) {
        const Kernels<R>& k = KERNELS<R>;
        int all = vector_columns<R>(i.O);
        for (int c = 0; c < i.count; c++) {
            const R *x = rows_of(i.x, bases, c * i.K, i.K, gathered_), *w = packed;
            R* out = row(bases, i.out) + ptrdiff_t(c) * i.O;
            for (int v = 0; v < all; v += VECTOR_COLUMNS) {
                int columns = all - v < VECTOR_COLUMNS ? all - v : VECTOR_COLUMNS, o = v * LANES<R>;
                int wanted = i.O - o < columns * LANES<R> ? i.O - o : columns * LANES<R>;
                const R* bias = i.bias < 0 ? nullptr : u_ + i.bias + ptrdiff_t(o) * i.bias_o;
                k.vector[columns](w, x, i.K, bias, i.bias_o, wanted, out + o);
                w += ptrdiff_t(columns) * LANES<R> * i.K;
            }
            epilogue(i, bases, c * i.O, i.O, out);
        }
    }

  public:
    // Memory that the next run will touch, where a stage's values are kept or were kept: it is fetched little by little while the
    // products run, so that nobody waits for it.
    void fetch_meanwhile(const R* from, ptrdiff_t numbers) { ahead_ = from, ahead_end_ = from + numbers; }

  private:
    // Numbers that a kernel asks for at every turn of so many multiply-adds of vectors: a line every 32, until all are on their way.
    INLINE ptrdiff_t fetched_a_turn(int operations) const {
        return ahead_ < ahead_end_ ? operations * ptrdiff_t(64 / sizeof(R)) / 32 : 0;
    }

    // Rows that an epilogue reads, on their way from memory while the products before it run.
    void look_ahead(const Instruction& i, const Bases<R>& bases, int base, int first, int rows) const {
        const Operand* read[] = {&i.add, &i.aux};
        for (const Operand* x : read)
            for (int r = first; !x->absent() && r < first + rows && r < i.O; r++)
                prefetch(lane_row(*x, bases, base + r), T_);
    }

    void epilogue(const Instruction& i, const Bases<R>& bases, int first, int rows, R* out) {
        auto by_rows = [&](int op, const Operand& x) {
            if (x.contiguous() || T_ == 1)
                return micro<R>(op)(out, out, rows_of(x, bases, first, rows, gathered_), nullptr, ptrdiff_t(rows) * T_);
            for (int r = 0; r < rows; r++) {
                R* at = out + ptrdiff_t(r) * T_;
                micro<R>(op)(at, at, lane_row(x, bases, first + r), nullptr, T_);
            }
        };
        if (!i.add.absent()) by_rows(ADD, i.add);
        if (arity_of(i.act) == 2) by_rows(i.act, i.aux);
        else if (i.act != COPY) micro<R>(i.act)(out, out, nullptr, nullptr, ptrdiff_t(rows) * T_);
    }

    static R folded(int kind, R a, R b) {
        switch (kind) {
        case FOLD_SUM: return a + b;
        case FOLD_MAX: return a > b || a != a ? a : b;
        case FOLD_MIN: return a < b || a != a ? a : b;
        default: return a * b;
        }
    }

    void reduce(const Instruction& i, const Bases<R>& bases) {
        if (T_ == 1) {
            for (int k = 0; k < i.n; k++) {
                R sum = *lane_row(i.x, bases, k * i.m);
                for (int j = 1; j < i.m; j++) sum = folded(i.kind, sum, *lane_row(i.x, bases, k * i.m + j));
                row(bases, i.out)[k] = sum;
            }
            return;
        }
        static const int ops[] = {ADD, MAX, MIN, MUL};
        Function<R> fold = micro<R>(ops[i.kind]);
        for (int k = 0; k < i.n; k++) {
            R* out = row(bases, i.out) + ptrdiff_t(k) * T_;
            std::memcpy(out, lane_row(i.x, bases, k * i.m), T_ * sizeof(R));
            for (int j = 1; j < i.m; j++) fold(out, out, lane_row(i.x, bases, k * i.m + j), nullptr, T_);
        }
    }

    void sample_product(const Instruction& i, const Bases<R>& bases) {
        if (T_ == 1) return sample_product_of_one(i, bases);
        constexpr int L = LANES<R>;
        for (int b = 0; b < i.count; b++)
            for (int r = 0; r < i.O; r++) {
                R* out = row(bases, i.out) + ptrdiff_t(b * i.O + r) * i.J * T_;
                for (int j = 0; j < i.J; j += 4) {
                    int wide = i.J - j < 4 ? i.J - j : 4;
                    for (int t = 0; t < T_; t += L) {
                        Vec<R> sum[4] = {};
                        for (int k = 0; k < i.K; k++) {
                            Vec<R> x = load(lane_row(i.x, bases, (b * i.O + r) * i.K + k) + t);
                            for (int q = 0; q < wide; q++)
                                sum[q] += x * load(lane_row(i.z, bases, (b * i.K + k) * i.J + j + q) + t);
                        }
                        for (int q = 0; q < wide; q++) store(out + ptrdiff_t(j + q) * T_ + t, sum[q]);
                    }
                }
            }
    }

    void sample_product_of_one(const Instruction& i, const Bases<R>& bases) {
        R* out = row(bases, i.out);
        for (int b = 0; b < i.count; b++)
            for (int r = 0; r < i.O; r++)
                for (int j = 0; j < i.J; j++) {
                    R sum = 0;
                    for (int k = 0; k < i.K; k++)
                        sum += *lane_row(i.x, bases, (b * i.O + r) * i.K + k) * *lane_row(i.z, bases, (b * i.K + k) * i.J + j);
                    *out++ = sum;
                }
    }

    // ---- gradients of parameters

    // Which factor of a weight gradient is turned into panels: the one that wastes less of them.
    static bool panels_of_first(const Instruction& i) {
        return int64_t(num_panels<R>(i.O)) * i.K < int64_t(num_panels<R>(i.K)) * i.O;
    }
    static bool outputs_are_few(const Instruction& i) { return i.O <= i.K; }
    // Whether one factor has so few rows that products are summed lane by lane: what that takes instead of panels must stay in the
    // caches, and the other factor must lie evenly.
    static bool is_thin(const Instruction& i, int T) {
        bool outputs = outputs_are_few(i);
        return T >= LANES<R> && (outputs ? i.O : i.K) <= MOST_THIN && !(outputs ? i.z : i.x).mapped() &&
               size_t(i.O) * i.K * LANES<R> * sizeof(R) <= THIN_BYTES;
    }
    static size_t wgrad_size(const Instruction& i, int T) {
        if (is_thin(i, T)) return size_t(i.O) * i.K * LANES<R>;
        bool turned = panels_of_first(i);
        return size_t(num_panels<R>(turned ? i.O : i.K)) * PANEL<R> * (turned ? i.K : i.O);
    }

    Bases<R> stage_bases(const Bases<R>& bases, int stage, const ptrdiff_t* steps) const {
        Bases<R> moved = bases;
        for (int s = 0; s < NUM_SPACES; s++) moved[s] += stage * steps[s];
        return moved;
    }

    // Rows of all stages of a step: `step` from row to row, `slab` from stage to stage.
    struct StageRows {
        const R* at;
        ptrdiff_t step, slab;
    };
    StageRows rows_of_stages(const Operand& x, const Bases<R>& bases, int first, int n, int stages, const ptrdiff_t* steps) {
        if (!x.mapped()) return {lane_row(x, bases, first), ptrdiff_t(x.stride) * T_, steps[x.space]};
        ptrdiff_t slab = ptrdiff_t(n) * T_;
        for (int s = 0; s < stages; s++) rows_of(x, stage_bases(bases, s, steps), first, n, gathered_ + s * slab);
        return {gathered_, T_, slab};
    }

    void thin_gradient(const Instruction& i, const Bases<R>& bases, int stages, const ptrdiff_t* steps, R* sums) {
        bool outputs = outputs_are_few(i);
        int rows = outputs ? i.O : i.K, features = outputs ? i.K : i.O, columns = ACCUMULATORS / rows;
        for (int c = 0; c < i.count; c++) {
            StageRows few = rows_of_stages(outputs ? i.x : i.z, bases, c * rows, rows, stages, steps);
            StageRows many = rows_of_stages(outputs ? i.z : i.x, bases, c * features, features, stages, steps);
            R* acc = sums;
            for (int f = 0; f < features;) {
                int taken = f + columns <= features ? columns : 1;
                ThinBlock<R> block = taken == columns ? KERNELS<R>.thin[rows] : KERNELS<R>.thin_rest[rows];
                block(few.at, few.step, few.slab, many.at + f * many.step, many.step, many.slab, stages, T_, acc);
                f += taken, acc += ptrdiff_t(taken) * rows * LANES<R>;
            }
        }
    }

    void weight_gradient(const Instruction& i, const Bases<R>& bases, int stages, const ptrdiff_t* steps, R* sums) {
        bool turned = panels_of_first(i);
        const Operand &side = turned ? i.z : i.x, &wide = turned ? i.x : i.z; // `wide` becomes panels
        int rows = turned ? i.K : i.O, features = turned ? i.O : i.K;
        Blocks blocks(rows, ACCUMULATORS / 2);
        for (int c = 0; c < i.count; c++) {
            StageRows g = rows_of_stages(side, bases, c * rows, rows, stages, steps);
            R* acc = sums;
            for (int p = 0; p < num_panels<R>(features); p++) {
                int first = p * PANEL<R>, wanted = features - first < PANEL<R> ? features - first : PANEL<R>;
                make_panels(wide, bases, stages, steps, c * features + first, wanted);
                for (int b = 0, r = 0; b < blocks.count; b++) {
                    int height = blocks.rows_of(b);
                    const R* block = g.at + r * g.step;
                    r += height;
                    const R* after = b + 1 < blocks.count ? g.at + r * g.step : g.at;
                    KERNELS<R>.outer[2][height](block, g.step, g.slab, stages, T_, panel_, acc, after);
                    acc += ptrdiff_t(height) * PANEL<R>;
                }
            }
        }
    }

    // Rows [first, first + wanted) of all stages as panels, one after the other.
    void make_panels(const Operand& x, const Bases<R>& bases, int stages, const ptrdiff_t* steps, int first, int wanted) {
        R* to = panel_;
        if (x.mapped() || T_ == 1) {
            for (int s = 0; s < stages; s++, to += ptrdiff_t(T_) * PANEL<R>) {
                Bases<R> here = stage_bases(bases, s, steps);
                uneven_panel<R>([&](int j) { return lane_row(x, here, first + j); }, wanted, T_, to);
            }
            return;
        }
        const R* from = lane_row(x, bases, first);
        ptrdiff_t row = ptrdiff_t(x.stride) * T_, slab = steps[x.space];
        for (int s = 0; s < stages; s++, from += slab, to += ptrdiff_t(T_) * PANEL<R>) {
            for (int j = 0; s + 1 < stages && j < wanted; j++) prefetch(from + slab + j * row, T_);
            even_panel<R>(from, row, wanted, T_, to);
        }
    }

    void row_gradient(const Instruction& i, const Bases<R>& bases, int stages, const ptrdiff_t* steps, R* sums) {
        if (T_ == 1) {
            for (int k = 0; k < i.n; k++)
                for (int j = 0; j < i.m; j++) {
                    const R* g = lane_row(i.x, bases, k * i.m + j);
                    ptrdiff_t step = steps[i.x.mapped() ? i.x.map[k * i.m + j] >> SPACE_SHIFT : i.x.space];
                    for (int s = 0; s < stages; s++) sums[ptrdiff_t(k) * LANES<R>] += g[s * step];
                }
            return;
        }
        if (i.x.contiguous() && i.m == 1) { // biases
            const R* g = lane_row(i.x, bases, 0);
            ptrdiff_t step = steps[i.x.space];
            for (int k = 0; k < i.n; k++, g += T_) {
                Vec<R> sum = {}, odd = {}; // two: a sum alone would wait for itself
                for (int t = 0; t < T_; t += LANES<R>) {
                    const R* at = g + t;
                    int s = 0;
                    for (; s + 2 <= stages; s += 2, at += 2 * step) sum += load(at), odd += load(at + step);
                    if (s < stages) sum += load(at);
                }
                store(sums + ptrdiff_t(k) * LANES<R>, load(sums + ptrdiff_t(k) * LANES<R>) + (sum + odd));
            }
            return;
        }
        for (int s = 0; s < stages; s++) {
            Bases<R> here = stage_bases(bases, s, steps);
            for (int k = 0; k < i.n; k++) {
                Vec<R> sum = load(sums + ptrdiff_t(k) * LANES<R>);
                for (int j = 0; j < i.m; j++) {
                    const R* g = lane_row(i.x, here, k * i.m + j);
                    for (int t = 0; t < T_; t += LANES<R>) sum += load(g + t);
                }
                store(sums + ptrdiff_t(k) * LANES<R>, sum);
            }
        }
    }

    // ---- memory

    static int strip(int T) { return T > STRIP ? T : STRIP / T * T; }
    int strip() const { return strip(T_); }

    static size_t packed_size(const Instruction& i, int T) {
        return size_t(i.K) * (T == 1 ? vector_columns<R>(i.O) * LANES<R> : i.O);
    }
    static size_t packed_bytes(const Section& section, int T) {
        size_t n = 0, products = 0;
        for (const Instruction& i : section)
            if (i.opcode == GEMM) n += Workspace::size_of<R>(packed_size(i, T)), products++;
        return n + Workspace::size_of<R*>(products);
    }
    R** pack_section(const Section& section, Workspace& work) {
        size_t products = 0;
        for (const Instruction& i : section) products += i.opcode == GEMM;
        R** packed = work.take<R*>(products);
        products = 0;
        for (const Instruction& i : section) {
            if (i.opcode != GEMM) continue;
            R* to = packed[products++] = work.take<R>(packed_size(i, T_));
            if (T_ == 1) pack_vectors(u_ + i.weight, i.O, i.K, i.weight_o, i.weight_k, to);
            else pack(u_ + i.weight, i.O, i.K, i.weight_o, i.weight_k, height_, to);
        }
        return packed;
    }

    static size_t gather_size(const Program& p, int T, int stages) {
        size_t most = 0;
        const Section sections[3] = {p.forward, p.backward, p.gradient};
        for (const Section& section : sections)
            for (const Instruction& i : section) {
                size_t n = i.opcode == GEMM ? (T == 1 && i.O > i.K ? i.O : i.K) : i.opcode == WGRAD ? size_t(i.O > i.K ? i.O : i.K) * stages : 0;
                most = n > most ? n : most;
            }
        return most * T;
    }
    const Program& program_;
    const R* u_;
    int T_, height_;
    R **forward_ = nullptr, **backward_ = nullptr;
    R *registers_, *gathered_, *panel_ = nullptr;
    const R *ahead_ = nullptr, *ahead_end_ = nullptr;
};

} // namespace NEURODE_NAMESPACE
