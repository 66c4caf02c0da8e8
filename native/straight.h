// A program of few operations as one straight list of operations on single rows: copies gone, common values shared, products
// and sums joined. Made once when a program is decoded, for every processor; tape.h runs it.
#pragma once
#include <cstdint>
#include <vector>

#include "program.h"

namespace neurode {

// Operations that only straight lists know, numbered after those of programs.
enum LineOp : int32_t { FMS = NUM_MICROS /* a b - c */, NUM_LINE_OPS };

// A row of a step, by what it is: the step's own rows, numbers for all lanes, and rows for what is in between.
struct LineRow {
    enum Kind : int32_t {
        NONE,
        TIME,     // of the stage
        STATE,    // of the stage, by feature
        DATA,     // of the sample
        NUMBER,   // a uniform number
        SPARE,    // lives within a list
        OUT,      // dy/dt of the stage
        // of the way back:
        KEPT,       // a value of the stage's f that its vector-Jacobian product reads
        COTANGENT,  // of dy/dt, by feature
        GRAD,       // cotangent of the state, by feature
        GRAD_DATA,  // of the sample's data: a sum over stages and steps
        SUM,        // what the stage adds to a parameter's gradient, by lane: a sum over stages, steps and samples
    } kind = NONE;
    int32_t index = 0;
};
struct Line {
    int32_t op;
    LineRow out, operands[3];
};

// The values of f (and of its vector-Jacobian product), and the lists that compute them. A value's operands stand before it.
struct Straight {
    struct Value {
        int32_t op, a, b, c; // LEAF: row b of space a (uniform number b where the space is UNIFORM); else operands, -1: none
    };
    static constexpr int32_t LEAF = -1;

    std::vector<Value> values;
    std::vector<int32_t> out; // D values: dy/dt
    std::vector<Line> forward;
    int32_t num_spare = 0, num_uniform = 0;

    // Of the way back alone. Values from `num_forward` on are the vector-Jacobian product's.
    struct Term { // adds a b (a alone where b is -1) to an accumulator's sum
        int32_t sum, a, b;
    };
    int32_t num_forward = 0, num_kept = 0;
    std::vector<int32_t> grad, grad_data; // values: cotangents of the state and of the sample's data
    std::vector<Term> terms;
    std::vector<int32_t> accumulators;    // by sum
    std::vector<Line> backward;
    bool reads_time = false;

    static int arity(int op) { return op == FMS ? 3 : arity_of(op); }
    bool is(int v, int op) const { return values[v].op == op; }
};

// The straight list of the way forward, or false where it has too many operations, or matrices, for one.
bool straighten(const Program& program, Straight& to);
// The lists of the way back: f with what is kept of it, its vector-Jacobian product and the gradients of parameters.
bool straighten_back(const Program& program, Straight& to);

} // namespace neurode
