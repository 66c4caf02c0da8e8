// Numbers of the flat program form: spaces, instructions, pointwise operations. Mirrors src/neurode/fused/program.py.
#pragma once
#include <cstdint>

constexpr int32_t PROGRAM_MAGIC = 0x4E4F4445, PROGRAM_VERSION = 1, PROGRAM_HEADER = 22;
constexpr int SPACE_SHIFT = 28;
constexpr int32_t ROW_MASK = (1 << SPACE_SHIFT) - 1;

enum Space { UNIFORM, SAVED, SCRATCH, COTANGENT, ROWDATA, NUM_SPACES };

enum Opcode { POINTWISE = 1, GEMM = 2, WGRAD = 3, RGRAD = 4, REDUCE = 5, SAMPLE_PRODUCT = 6 };

enum Fold { FOLD_SUM, FOLD_MAX, FOLD_MIN, FOLD_PRODUCT };

// clang-format off
enum Micro {
    COPY, ADD, SUB, MUL, DIV, MAX, MIN, POW, ATAN2, FMA, FNMA, NEG, ABS, SQRT, RSQRT, RECIPROCAL, EXP, EXPM1, LOG, LOG1P,
    TANH, SIGMOID, SOFTPLUS, SIN, COS, TAN, ERF, ATAN, SINH, COSH, RELU, SILU, GELU, SIGN, FLOOR, CEIL, TRUNC, ROUND, LOG2,
    EXP2, LT, LE, GT, GE, EQ, NE, AND, OR, NOT, WHERE, DTANH, DSIGMOID, DRELU, MOD, NUM_MICROS
};
// clang-format on

constexpr int arity_of(int op) {
    switch (op) {
    case ADD: case SUB: case MUL: case DIV: case MAX: case MIN: case POW: case ATAN2: case LT: case LE: case GT: case GE:
    case EQ: case NE: case AND: case OR: case DTANH: case DSIGMOID: case MOD:
        return 2;
    case FMA: case FNMA: case WHERE: case DRELU:
        return 3;
    default:
        return 1;
    }
}
