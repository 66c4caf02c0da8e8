// The functions of one instruction set, for one dtype: what abi.cpp chooses from at run time.
#pragma once
#include "abi.h"
#include "program.h"
#include "threads.h"

namespace neurode {

struct Engine {
    void (*eval)(const Program&, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata, void* out);
    void (*vjp)(const Program&, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata, const void* g,
                void* grad_y, void* grad_t, void* grad_rowdata, void* accumulators);
    void (*forward)(const Program&, nd_solve&, Watch&);
    void (*backward)(const Program&, nd_solve&, Watch&);
    void (*free_trace)(void*);
    void (*micro)(int op, void* out, const void* a, const void* b, const void* c, int64_t n);
    double (*multiply_adds)(int64_t rounds);
};

// By dtype: 0 float, 1 double.
const Engine* engine_baseline(int dtype);
const Engine* engine_avx2(int dtype);
const Engine* engine_avx512(int dtype);
const Engine* engine_neon(int dtype);

} // namespace neurode
