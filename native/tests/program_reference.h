// One sample through a tile program, instruction by instruction as docs/fused.md defines them.
#pragma once
#include <vector>

#include "../program.h"
#include "bounded.h"

namespace reference {

using neurode::Instruction;
using neurode::Operand;
using neurode::Place;
using neurode::Program;
using neurode::Section;

template <class R> class Sample {
  public:
    typedef Bounded<R> B;

    Sample(const Program& program, const std::vector<R>& uniforms) : p_(program) {
        for (R u : uniforms) at_[UNIFORM].push_back(B(u));
    }

    // dy/dt at (t, y); `backward` may follow.
    std::vector<B> forward(B t, const std::vector<B>& y, const std::vector<R>& data) {
        at_[SAVED].assign(p_.rows_saved, B::unknown());
        at_[SCRATCH].assign(p_.rows_forward, B::unknown());
        at_[ROWDATA].clear();
        for (R x : data) at_[ROWDATA].push_back(B(x));
        at_[SAVED][0] = t;
        for (size_t i = 0; i < y.size(); i++) at_[SAVED][1 + i] = y[i];
        run(p_.forward);
        return read(p_.out, p_.size);
    }
    struct Cotangents {
        std::vector<B> y, t, data;
    };
    // The cotangents for g at the last point of `forward`; adds to the accumulators.
    Cotangents backward(const std::vector<B>& g, std::vector<Sum<R>>& accumulators) {
        at_[SCRATCH].assign(p_.rows_backward, B::unknown());
        at_[COTANGENT].assign(p_.rows_cotangent, B::unknown());
        for (size_t i = 0; i < g.size(); i++) at_[COTANGENT][i] = g[i];
        run(p_.backward);
        for (const Instruction& i : p_.gradient) accumulate(i, accumulators);
        return {read(p_.grad_y, p_.size), read(p_.grad_t, 1), read(p_.grad_rowdata, p_.num_rowdata)};
    }

  private:
    std::vector<B> read(Place at, int n) const {
        std::vector<B> rows(n, B(0));
        for (int i = 0; i < n && at.present(); i++) rows[i] = at_[at.space][at.row + i];
        return rows;
    }
    B row(const Operand& x, int i) const {
        int32_t ref = x.ref(i);
        return at_[ref >> SPACE_SHIFT][ref & ROW_MASK];
    }
    B& row(Place at, int i) { return at_[at.space][at.row + i]; }

    void run(const Section& section) {
        for (const Instruction& i : section) {
            if (i.opcode == POINTWISE) pointwise(i);
            if (i.opcode == GEMM) gemm(i);
            if (i.opcode == REDUCE) reduce(i);
            if (i.opcode == SAMPLE_PRODUCT) sample_product(i);
        }
    }
    void pointwise(const Instruction& i) {
        std::vector<B> registers(i.num_inputs + i.num_steps);
        for (int r = 0; r < i.n; r++) {
            for (int k = 0; k < i.num_inputs; k++) registers[k] = row(i.inputs[k], r);
            for (int s = 0; s < i.num_steps; s++) {
                const auto& step = i.steps[s];
                auto operand = [&](int32_t reg) { return reg < 0 ? B(0) : registers[reg]; };
                registers[i.num_inputs + s] = apply<R>(step.micro, operand(step.a), operand(step.b), operand(step.c));
            }
            for (int k = 0; k < i.num_outputs; k++) row(i.outputs[k].at, r) = registers[i.outputs[k].reg];
        }
    }
    void gemm(const Instruction& i) {
        std::vector<B> made(i.count * i.O);
        for (int c = 0; c < i.count; c++)
            for (int o = 0; o < i.O; o++) {
                Sum<R> sum;
                auto u = [&](int32_t place) { return at_[UNIFORM][place]; };
                for (int k = 0; k < i.K; k++) sum.add(u(i.weight + o * i.weight_o + k * i.weight_k) * row(i.x, c * i.K + k));
                if (i.bias >= 0) sum.add(u(i.bias + o * i.bias_o));
                B s = sum.value();
                if (!i.add.absent()) s = s + row(i.add, c * i.O + o);
                made[c * i.O + o] = arity_of(i.act) == 2 ? apply<R>(i.act, s, row(i.aux, c * i.O + o)) : apply<R>(i.act, s);
            }
        for (size_t k = 0; k < made.size(); k++) row(i.out, int(k)) = made[k];
    }
    void reduce(const Instruction& i) {
        static const int folds[] = {ADD, MAX, MIN, MUL};
        for (int k = 0; k < i.n; k++) {
            B folded = row(i.x, k * i.m);
            for (int j = 1; j < i.m; j++) folded = apply<R>(folds[i.kind], folded, row(i.x, k * i.m + j));
            row(i.out, k) = folded;
        }
    }
    void sample_product(const Instruction& i) {
        std::vector<B> made;
        for (int b = 0; b < i.count; b++)
            for (int r = 0; r < i.O; r++)
                for (int j = 0; j < i.J; j++) {
                    Sum<R> sum;
                    for (int k = 0; k < i.K; k++) sum.add(row(i.x, (b * i.O + r) * i.K + k) * row(i.z, (b * i.K + k) * i.J + j));
                    made.push_back(sum.value());
                }
        for (size_t k = 0; k < made.size(); k++) row(i.out, int(k)) = made[k];
    }
    void accumulate(const Instruction& i, std::vector<Sum<R>>& acc) const {
        if (i.opcode == WGRAD) {
            for (int c = 0; c < i.count; c++)
                for (int o = 0; o < i.O; o++)
                    for (int k = 0; k < i.K; k++)
                        acc[i.acc + o * i.acc_o + k * i.acc_k].add(row(i.x, c * i.O + o) * row(i.z, c * i.K + k));
        } else {
            for (int k = 0; k < i.n; k++)
                for (int j = 0; j < i.m; j++) acc[i.acc + k].add(row(i.x, k * i.m + j));
        }
    }

    const Program& p_;
    std::vector<B> at_[NUM_SPACES];
};

} // namespace reference
