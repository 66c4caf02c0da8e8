// A tile program, decoded from its flat form (src/neurode/fused/program.py, docs/fused.md).
#pragma once
#include "opcodes.h"

namespace neurode {

constexpr int MAX_REGISTERS = 256; // of a pointwise chain

// n rows of a space: `row + i stride`, or anywhere by a map.
struct Operand {
    int32_t space = ABSENT, row = 0, stride = 0;
    const int32_t* map = nullptr;
    static constexpr int32_t MAPPED = -1, ABSENT = -2;
    bool absent() const { return space == ABSENT; }
    bool mapped() const { return space == MAPPED; }
    bool uniform() const { return mapped() ? (map[0] >> SPACE_SHIFT) == UNIFORM : space == UNIFORM; }
    bool contiguous() const { return space > UNIFORM && stride == 1; } // lane rows one after the other
    int32_t ref(int i) const { return mapped() ? map[i] : (space << SPACE_SHIFT | (row + i * stride)); }
};

struct Place {
    int32_t space = -1, row = -1;
    bool present() const { return space >= 0; }
};

struct Chain { // one operation of a pointwise instruction, on registers
    int32_t micro, a, b, c;
};
struct Output {
    int32_t reg;
    Place at;
};

// One instruction of any kind; a kind uses the fields that its row in docs/fused.md names.
struct Instruction {
    int32_t opcode = 0;
    int32_t n = 0, m = 0, kind = 0;                            // REDUCE, RGRAD; n also POINTWISE
    int32_t count = 0, O = 0, K = 0, J = 0;                    // products: O x K (I x K for SAMPLE_PRODUCT, then K x J)
    int32_t weight = 0, weight_o = 0, weight_k = 0, bias = -1, bias_o = 0, act = 0; // GEMM
    int32_t acc = 0, acc_o = 0, acc_k = 0;                     // WGRAD, RGRAD
    Operand x, z, add, aux;                                    // z: second factor; g of WGRAD is x, its x is z
    Place out;
    int32_t num_inputs = 0, num_outputs = 0, num_steps = 0;    // POINTWISE
    const Operand* inputs = nullptr;
    const Output* outputs = nullptr;
    const Chain* steps = nullptr;
};

struct Section {
    const Instruction* first = nullptr;
    int32_t size = 0;
    const Instruction* begin() const { return first; }
    const Instruction* end() const { return first + size; }
};

struct Straight;

struct Program {
    int32_t dtype = 0, size = 0, num_uniforms = 0, num_accumulators = 0, num_rowdata = 0;
    int32_t rows_saved = 0, rows_forward = 0, rows_backward = 0, rows_cotangent = 0;
    Place out, grad_y, grad_t, grad_rowdata;
    Section forward, backward, gradient;
    bool has_products = false; // of matrices: decides the tile's width
    int32_t max_registers = 0; // of a pointwise chain: inputs and steps
    const Straight* straight = nullptr;      // the same as a straight list, where it has few operations
    const Straight* straight_back = nullptr; // the way back likewise
};

// Returns null and sets `*error` where the words are not a program that this library knows.
Program* decode(const int32_t* words, int64_t n, const int32_t* maps, int64_t num_maps, int32_t dtype, const char** error);
void release(Program* program);

} // namespace neurode
