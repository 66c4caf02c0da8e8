// Random tile programs: every kind of instruction, operand and shape that the flat form allows, in an order that reads only what
// has been written. The backward section is linear in the cotangent, as every vector-Jacobian product is; it need not be that of
// the forward section, which neither the interpreter nor the adjoint can tell.
#pragma once
#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "../opcodes.h"

namespace reference {

class Random {
  public:
    explicit Random(uint64_t seed) : bits_(seed) {}
    int below(int n) { return n <= 1 ? 0 : int(bits_() % uint64_t(n)); }
    int between(int a, int b) { return a + below(b - a + 1); }
    bool chance(double p) { return uniform() < p; }
    double uniform() { return double(bits_() >> 11) * 0x1p-53; }
    double normal() { return std::normal_distribution<double>()(bits_); }
    template <class T> T of(std::initializer_list<T> list) { return list.begin()[below(int(list.size()))]; }
    // A size: mostly small, now and then across a block of the matrix kernels or a strip of the pointwise chains.
    int size(int most) { return std::min(most, chance(0.05) ? between(1, 70) : chance(0.2) ? between(1, 20) : between(1, 5)); }

  private:
    std::mt19937_64 bits_;
};

// What is generated: the words of a program, and what its numbers are.
struct Generated {
    std::vector<int32_t> words, maps;
    int size = 0, num_uniforms = 0, num_accumulators = 0, num_rowdata = 0;
};

class Generator {
  public:
    // `smooth`: a field that a solver can follow; else anything. `only`: one forward instruction of this kind (0: many of all).
    Generator(Random& random, bool smooth, int only = 0) : r(random), smooth_(smooth), only_(only) {}

    Generated program() {
        out_.size = r.size(40);
        out_.num_rowdata = r.chance(0.4) ? r.between(1, 4) : 0;
        out_.num_uniforms = r.between(1, 40);
        rows_[SAVED] = 1 + out_.size, rows_[COTANGENT] = out_.size, rows_[ROWDATA] = out_.num_rowdata;
        for (int i = 0; i < rows_[SAVED]; i++) free_.push_back(ref(SAVED, i));
        for (int i = 0; i < rows_[ROWDATA]; i++) free_.push_back(ref(ROWDATA, i));

        section_ = 0;
        int count = only_ ? 1 : r.between(0, 8);
        for (int i = 0; i < count; i++) forward_instruction();
        int32_t out = smooth_ ? tame(out_.size) : combination(out_.size, free_);
        rows_forward_ = rows_[SCRATCH];

        section_ = 1, rows_[SCRATCH] = 0, kept_.clear();
        erase_scratch(free_);
        for (int i = 0; i < out_.size; i++) linear_.push_back(ref(COTANGENT, i));
        count = r.between(0, 8);
        for (int i = 0; i < count; i++) backward_instruction();
        int32_t grad_y = r.chance(0.9) ? combination(out_.size, linear_) : NONE;
        int32_t grad_t = r.chance(0.7) ? combination(1, linear_) : NONE;
        int32_t grad_data = out_.num_rowdata && r.chance(0.8) ? combination(out_.num_rowdata, linear_) : NONE;

        section_ = 2;
        erase_scratch(free_), erase_scratch(linear_);
        count = r.between(0, 5);
        for (int i = 0; i < count; i++) gradient_instruction();

        assemble({out, grad_y, grad_t, grad_data});
        return out_;
    }

  private:
    static constexpr int32_t NONE = -1;
    static int32_t ref(int space, int row) { return space << SPACE_SHIFT | row; }
    static int space_of(int32_t x) { return x >> SPACE_SHIFT; }
    static int row_of(int32_t x) { return x & ROW_MASK; }
    typedef std::vector<int32_t> Refs;

    static void erase_scratch(Refs& refs) {
        refs.erase(std::remove_if(refs.begin(), refs.end(), [](int32_t x) { return space_of(x) == SCRATCH; }), refs.end());
    }

    // ---- operands; what they read is remembered in `read_`

    void push(std::initializer_list<int32_t> list) { now_.insert(now_.end(), list); }
    void lanes(int n, const Refs& from) {
        static const int strides[] = {1, 1, 1, 1, 0, 2, -1};
        std::set<int32_t> there(from.begin(), from.end());
        for (int attempt = 0; attempt < 6 && r.chance(0.8); attempt++) {
            int32_t first = from[r.below(int(from.size()))], stride = strides[r.below(7)];
            bool all = true;
            for (int i = 0; all && i < n; i++) {
                int row = row_of(first) + i * stride;
                all = row >= 0 && there.count(ref(space_of(first), row));
            }
            if (!all) continue;
            for (int i = 0; i < n; i++) read_.insert(first + i * stride);
            return push({space_of(first), row_of(first), stride});
        }
        push({-1, int32_t(out_.maps.size()), 0});
        for (int i = 0; i < n; i++) {
            out_.maps.push_back(from[r.below(int(from.size()))]);
            read_.insert(out_.maps.back());
        }
    }
    void uniforms(int n) {
        int stride = r.of({0, 1, 2});
        if ((n - 1) * stride < out_.num_uniforms && r.chance(0.7))
            return push({UNIFORM, r.below(out_.num_uniforms - (n - 1) * stride), stride});
        push({-1, int32_t(out_.maps.size()), 0});
        for (int i = 0; i < n; i++) out_.maps.push_back(ref(UNIFORM, r.below(out_.num_uniforms)));
    }

    // n rows to write: new ones, or rows of SCRATCH that hold something already and that this instruction does not read.
    int32_t place(int n, bool linear) {
        int space = section_ == 2 ? COTANGENT : r.chance(0.5) ? SCRATCH : section_ == 0 ? SAVED : COTANGENT;
        int row = rows_[space];
        if (space == SCRATCH && rows_[SCRATCH] >= n && r.chance(0.5)) {
            int first = r.below(rows_[SCRATCH] - n + 1);
            bool clear = true;
            for (int i = 0; i < n; i++) clear = clear && !read_.count(ref(SCRATCH, first + i)) && !kept_.count(first + i);
            if (clear) row = first;
        }
        rows_[space] = std::max(rows_[space], row + n);
        for (int i = 0; i < n; i++) {
            int32_t x = ref(space, row + i);
            read_.insert(x); // a second output of this instruction lies elsewhere
            free_.erase(std::remove(free_.begin(), free_.end(), x), free_.end());
            linear_.erase(std::remove(linear_.begin(), linear_.end(), x), linear_.end());
            fresh_.push_back({x, linear});
        }
        return ref(space, row);
    }
    void output(int n, bool linear) {
        int32_t x = place(n, linear);
        push({space_of(x), row_of(x)});
    }
    void begin(int opcode) {
        now_.clear(), read_.clear(), fresh_.clear();
        push({opcode, 0});
    }
    void end() {
        now_[1] = int32_t(now_.size());
        code_[section_].insert(code_[section_].end(), now_.begin(), now_.end());
        for (auto& made : fresh_) (made.second ? linear_ : free_).push_back(made.first);
    }
    void keep(int32_t first, int n) {
        for (int i = 0; i < n && space_of(first) == SCRATCH; i++) kept_.insert(row_of(first) + i);
    }

    // ---- instructions

    int micro() {
        static const int gentle[] = {COPY, ADD, SUB, MUL, NEG, TANH, SIGMOID, SIN, COS, ATAN, ERF, SOFTPLUS, SILU, GELU, FMA, FNMA};
        return smooth_ ? gentle[r.below(16)] : r.below(NUM_MICROS);
    }
    void forward_instruction() {
        switch (only_ ? only_ : r.of({POINTWISE, POINTWISE, GEMM, GEMM, REDUCE, SAMPLE_PRODUCT})) {
        case POINTWISE: pointwise(); break;
        case GEMM: gemm(false); break;
        case REDUCE: reduce(free_, false); break;
        default: sample_product(free_, free_, false);
        }
    }
    void pointwise() {
        int n = r.size(70), inputs = r.between(1, 4), steps = r.between(0, 6), outputs = r.between(1, 2);
        begin(POINTWISE);
        push({n, inputs, outputs, steps});
        for (int i = 0; i < inputs; i++) r.chance(0.3) ? uniforms(n) : lanes(n, free_);
        for (int i = 0; i < outputs; i++) {
            push({i == 0 ? inputs + steps - 1 : r.below(inputs + steps)});
            output(n, false);
        }
        for (int s = 0; s < steps; s++) push({micro(), r.below(inputs + s), r.below(inputs + s), r.below(inputs + s)});
        end();
    }
    void gemm(bool linear) {
        int count = r.of({1, 1, 2, 3}), O = r.size(70), K = r.size(70);
        int so = r.of({0, 1, 2}), sk = r.of({0, 1, 3}), bias_o = r.of({0, 1});
        bool bias = !linear && r.chance(0.6), add = r.chance(0.4);
        const Refs& from = linear ? linear_ : free_;
        int act = linear ? r.of({COPY, COPY, DTANH, DSIGMOID}) : r.chance(0.2) ? r.of({DTANH, DSIGMOID}) : unary();
        while (needs((O - 1) * so + (K - 1) * sk)) so = so / 2, sk = sk / 2;
        begin(GEMM);
        push({count, O, K, r.below(out_.num_uniforms - (O - 1) * so - (K - 1) * sk), so, sk});
        bias_o = needs((O - 1) * bias_o) ? 0 : bias_o;
        push({bias ? r.below(out_.num_uniforms - (O - 1) * bias_o) : -1, bias_o, act});
        lanes(count * K, from);
        size_t at = now_.size();
        if (add) lanes(count * O, from);
        else push({-2, 0, 0});
        if (arity_of(act) == 2) lanes(count * O, free_);
        else push({-2, 0, 0});
        int32_t out = place(count * O, linear);
        now_.insert(now_.begin() + long(at), {space_of(out), row_of(out)});
        end();
    }
    bool needs(int reach) { // more uniform numbers than are wanted
        if (reach < out_.num_uniforms) return false;
        if (reach > 6000) return true;
        out_.num_uniforms = reach + r.between(1, 20);
        return false;
    }
    int unary() {
        int op = micro();
        while (arity_of(op) != 1) op = micro();
        return op;
    }
    void reduce(const Refs& from, bool linear) {
        int kind = linear ? FOLD_SUM : smooth_ ? FOLD_SUM : r.below(4), n = r.size(20), m = r.size(20);
        begin(REDUCE);
        push({kind, n, m});
        lanes(n * m, from);
        output(n, linear);
        end();
    }
    void sample_product(const Refs& a, const Refs& b, bool linear) {
        int count = r.of({1, 1, 2}), I = r.size(9), K = r.size(9), J = r.size(9);
        begin(SAMPLE_PRODUCT);
        push({count, I, K, J});
        lanes(count * I * K, a), lanes(count * K * J, b);
        output(count * I * J, linear);
        end();
    }
    void backward_instruction() {
        switch (r.below(6)) {
        case 0: case 1: linear_chain(r.size(40), linear_); break;
        case 2: gemm(true); break;
        case 3: reduce(linear_, true); break;
        case 4: r.chance(0.5) ? sample_product(linear_, free_, true) : sample_product(free_, linear_, true); break;
        default: pointwise();
        }
    }
    // Registers 0, 1 linear, 2, 3 not: a chain of steps that keep linear what is.
    int32_t linear_chain(int n, const Refs& from) {
        begin(POINTWISE);
        int steps = r.between(1, 4);
        push({n, 4, 1, steps});
        lanes(n, from), lanes(n, from), r.chance(0.3) ? uniforms(n) : lanes(n, free_), lanes(n, free_);
        push({4 + steps - 1});
        int32_t at = place(n, true);
        push({space_of(at), row_of(at)});
        std::vector<int> good = {0, 1};
        for (int s = 0; s < steps; s++) {
            int a = good[r.below(int(good.size()))], b = good[r.below(int(good.size()))], v = r.between(2, 3);
            switch (r.below(9)) {
            case 0: push({ADD, a, b, -1}); break;
            case 1: push({SUB, a, b, -1}); break;
            case 2: push({MUL, v, a, -1}); break;
            case 3: push({FMA, a, v, b}); break;
            case 4: push({FNMA, v, a, b}); break;
            case 5: push({DTANH, a, v, -1}); break;
            case 6: push({DSIGMOID, a, v, -1}); break;
            case 7: push({DRELU, a, 2, 3}); break;
            default: push({smooth_ ? int32_t(NEG) : int32_t(WHERE), smooth_ ? a : v, a, b});
            }
            good.push_back(4 + s);
        }
        end();
        return at;
    }
    // n consecutive rows that nothing overwrites: what the header names.
    int32_t combination(int n, const Refs& from) {
        if (&from == &linear_) {
            int32_t at = linear_chain(n, from);
            return keep(at, n), at;
        }
        begin(POINTWISE);
        push({n, 1, 1, 0});
        lanes(n, from);
        push({0});
        int32_t at = place(n, false);
        push({space_of(at), row_of(at)});
        end();
        return keep(at, n), at;
    }
    int32_t tame(int n) { // a bounded field: sin of anything, times a number
        begin(POINTWISE);
        push({n, 2, 1, 2});
        lanes(n, free_), uniforms(n);
        push({3});
        int32_t at = place(n, false);
        push({space_of(at), row_of(at)});
        push({SIN, 0, -1, -1, MUL, 2, 1, -1});
        end();
        return keep(at, n), at;
    }
    void gradient_instruction() {
        if (r.chance(0.6)) {
            int count = r.of({1, 1, 2, 3}), O = r.size(70), K = r.size(70);
            bool turned = r.chance(0.5);
            begin(WGRAD);
            push({count, O, K, accumulators(O * K), turned ? 1 : K, turned ? O : 1});
            lanes(count * O, linear_), lanes(count * K, free_);
        } else {
            int n = r.size(40), m = r.size(10);
            begin(RGRAD);
            push({n, m, accumulators(n)});
            lanes(n * m, linear_);
        }
        end();
    }
    int accumulators(int n) { // new ones, or some that others add to as well
        if (out_.num_accumulators >= n && r.chance(0.3)) return r.below(out_.num_accumulators - n + 1);
        out_.num_accumulators += n;
        return out_.num_accumulators - n;
    }

    void assemble(std::initializer_list<int32_t> places) {
        auto& w = out_.words;
        w = {PROGRAM_MAGIC, PROGRAM_VERSION, out_.size, out_.num_uniforms, out_.num_accumulators, out_.num_rowdata,
             rows_[SAVED], rows_forward_, rows_[SCRATCH], rows_[COTANGENT]};
        for (int32_t x : places) w.push_back(x == NONE ? -1 : space_of(x)), w.push_back(x == NONE ? -1 : row_of(x));
        for (auto& code : code_) w.push_back(int32_t(code.size()));
        w.push_back(0);
        for (auto& code : code_) w.insert(w.end(), code.begin(), code.end());
    }

    Random& r;
    bool smooth_;
    int only_, section_ = 0, rows_[NUM_SPACES] = {}, rows_forward_ = 0;
    Generated out_;
    Refs free_, linear_, now_;
    std::set<int32_t> read_, kept_;
    std::vector<std::pair<int32_t, bool>> fresh_;
    std::vector<int32_t> code_[3];
};

} // namespace reference
