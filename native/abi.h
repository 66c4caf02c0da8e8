/* The plain C interface of the library. All fields are 8 bytes wide, so that no compiler pads them.
   Arrays named `void` hold numbers of the program's dtype; all others as written. Rows are the samples of the batch. */
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define NEURODE_EXPORT __declspec(dllexport)
#else
#define NEURODE_EXPORT __attribute__((visibility("default")))
#endif

#define NEURODE_ABI 6

enum { ND_SUCCESS = 0, ND_MAX_STEPS = 2, ND_UNDERFLOW = 3, ND_NON_FINITE = 4 }; /* Status.code of _solution.py */

typedef struct nd_solve {
    /* ---- the problem */
    int64_t rows;
    int64_t threads;      /* the most that may be used; small work stays on one */
    const void* uniforms; /* num_uniforms */
    const void* y0;       /* rows x D */
    const void* rowdata;  /* rows x num_rowdata, or null */
    const double *t0, *t1;
    int64_t t0_step, t1_step; /* 0: one for all, 1: one a row */
    /* ---- the method: `stages` rows, then `extra` rows evaluated only for dense output */
    int64_t stages, extra, degree, fsal; /* fsal: the last of `stages` is f at the new point */
    const double* a;                     /* (stages + extra) x (stages + extra) */
    const double* c;                     /* stages + extra */
    const double* b;                     /* stages */
    const double *e, *e2;                /* stages; e2 or both may be null */
    const double* p;                     /* (stages + extra) x degree: powers 1 ... degree; null without t_eval */
    /* ---- a fixed grid; null: adaptive */
    const double* grid;
    int64_t points, grid_point_step, grid_row_step;
    /* ---- control */
    int64_t joint; /* one step size for all rows, one error norm over all of them */
    double order;  /* of the error estimate, plus one */
    double rtol, atol;
    const void *rtols, *atols; /* or null: tolerances by row and feature */
    int64_t rtols_row_step, rtols_step, atols_row_step, atols_step;
    double proportional, integral, derivative, safety, min_factor, max_factor;
    int64_t hold, shrink_accepted;
    double first_step, min_step, max_step; /* first_step <= 0: automatic */
    double stretch; /* a step that reaches so many times its length to the end takes it all */
    int64_t num_groups;    /* joint: the error norm is the largest root mean square of these many groups of features; */
    const int64_t* groups; /* ends of the groups, the last D */
    int64_t max_steps;
    /* ---- outputs */
    const double* t_eval; /* or null */
    int64_t num_eval, eval_point_step, eval_row_step;
    void* y1;      /* rows x D */
    void* ys;      /* num_eval x rows x D */
    double* t_end; /* rows */
    int64_t *status, *evaluations, *accepted, *rejected; /* rows */
    /* ---- the way back */
    int64_t keep;   /* record steps for nd_backward */
    int64_t memory; /* bytes that stages may take; where they do not fit they are computed again */
    void* trace;    /* set by nd_forward where keep; freed by nd_trace_free */
    const void* grad_y1; /* rows x D or null */
    const void* grad_ys; /* num_eval x rows x D or null */
    void* grad_y0;       /* rows x D */
    void* grad_rowdata;  /* rows x num_rowdata or null */
    void* accumulators;  /* num_accumulators; written */
    double *grad_t0, *grad_t1;   /* rows, or null (adaptive) */
    double* grad_grid;           /* points x rows, or null (fixed grid) */
    double* grad_eval;           /* num_eval x rows, or null */
    int64_t backward_evaluations; /* set: evaluations of f by tiles, times live lanes */
    int64_t backward_products;    /* the same for vector-Jacobian products */
    /* ---- set by nd_forward: the largest of all rows */
    int64_t most_status, most_evaluations, most_accepted, most_rejected;
} nd_solve;

#ifdef __cplusplus
extern "C" {
#endif
NEURODE_EXPORT int64_t nd_abi(void);
NEURODE_EXPORT int64_t nd_sizeof_solve(void);
/* The instruction set in use, empty where NEURODE_ISA names none of this machine; those there, with commas between. */
NEURODE_EXPORT const char* nd_isa(void);
NEURODE_EXPORT const char* nd_isas(void);
NEURODE_EXPORT const char* nd_team(void); /* where threads come from */
/* Python's PyEval_SaveThread, PyEval_RestoreThread and PyErr_CheckSignals. Given once, every call that computes must be made with
   the interpreter held, lets go of it while it computes, and ends early with ND_STOPPED where a signal's handler raised: the
   exception is set then. Without them the interpreter is not touched and nothing ends a solve early. */
NEURODE_EXPORT void nd_python(void* (*save)(void), void (*restore)(void*), int (*check)(void));
/* dtype: 0 float, 1 double. Null if the words are not a program of this version; nd_error() says why. */
NEURODE_EXPORT void* nd_program_new(const int32_t* words, int64_t n, const int32_t* maps, int64_t num_maps, int64_t dtype);
NEURODE_EXPORT void nd_program_free(void* program);
NEURODE_EXPORT const char* nd_error(void);
/* What all that compute return; nd_error() says why it failed. */
enum { ND_DONE = 0, ND_FAILED = 1, ND_STOPPED = 2 };
/* out (rows x D) = f(t, y) for every row. */
NEURODE_EXPORT int64_t nd_eval(void* program, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata,
                            void* out);
/* Vector-Jacobian products with g (rows x D); grad_t (rows, of the dtype), grad_rowdata, accumulators may be null. */
NEURODE_EXPORT int64_t nd_vjp(void* program, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata,
                           const void* g, void* grad_y, void* grad_t, void* grad_rowdata, void* accumulators);
NEURODE_EXPORT int64_t nd_forward(void* program, nd_solve* s);
NEURODE_EXPORT int64_t nd_backward(void* program, nd_solve* s);
NEURODE_EXPORT void nd_trace_free(void* program, void* trace);
/* One array of several, `bytes` of each, without a look at what they hold. */
NEURODE_EXPORT void nd_gather(const void* const* from, const int64_t* bytes, int64_t n, void* to);
/* Whether n Python dictionaries hold the `count` entries given, each by the addresses of its key and value, in their order; a pair
   of nulls ends each dictionary's. `next` is PyDict_Next; the interpreter must be held. */
NEURODE_EXPORT int64_t nd_same(int (*next)(void*, intptr_t*, void**, void**), void* const* dicts, int64_t n,
                            void* const* entries, int64_t count);
/* Whether n times run from t0 to t1 in order, none outside and none NaN. */
NEURODE_EXPORT int64_t nd_ordered(const double* times, int64_t n, double t0, double t1);
/* For tests: one pointwise operation over n numbers (aligned to 64 bytes, n a multiple of 64). */
NEURODE_EXPORT void nd_micro(int64_t dtype, int64_t op, void* out, const void* a, const void* b, const void* c, int64_t n);
/* For benchmarks: independent multiply-adds in registers; returns how many floating-point operations that were. */
NEURODE_EXPORT double nd_peak(int64_t dtype, int64_t rounds);
#ifdef __cplusplus
}
#endif
