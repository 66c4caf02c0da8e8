// What the processor can do at the most: independent multiply-adds in registers. Benchmarks state it beside their figures.
#pragma once
#include "simd.h"

namespace NEURODE_NAMESPACE {

// Floating-point operations done in `rounds` rounds; the caller takes the time.
template <class R> double multiply_adds(int64_t rounds) {
    constexpr int CHAINS = 10; // more than latency times units, fewer than registers
    Vec<R> sum[CHAINS], factor = splat<R>(R(0.999)), term = splat<R>(R(1e-3));
    for (int k = 0; k < CHAINS; k++) sum[k] = splat<R>(R(k));
    for (int64_t i = 0; i < rounds; i++)
        for (int k = 0; k < CHAINS; k++) sum[k] = fused<R>(sum[k], factor, term);
    Vec<R> all = {};
    for (int k = 0; k < CHAINS; k++) all += sum[k];
    volatile R keep = all[0]; // or the compiler would leave it all out
    (void)keep;
    return 2.0 * LANES<R> * CHAINS * double(rounds);
}

} // namespace NEURODE_NAMESPACE
