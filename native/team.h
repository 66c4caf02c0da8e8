// What the loops of one thread need to run beside others of their kind.
#pragma once
#include "program.h"
#include "simd.h"
#include "threads.h"

namespace NEURODE_NAMESPACE {

// Calls work(worker) on a team of threads.
template <class Work> void team(int threads, neurode::Watch& watch, Work work) {
    neurode::on_team(threads, watch, [](void* data, int worker) { (*static_cast<Work*>(data))(worker); }, &work);
}

// Looks up from the work every few milliseconds: the clock is read after a number of steps that follows their length.
class Patience {
  public:
    explicit Patience(neurode::Watch& watch) : watch_(watch), last_(neurode::microseconds()) {}
    // Once a step. Throws Stopped where the solve is to end.
    INLINE void step() {
        if (--left_ <= 0) look();
    }

  private:
    __attribute__((noinline)) void look() {
        int64_t now = neurode::microseconds(), passed = now - last_;
        if (passed < 2'000) interval_ *= 2;
        else if (passed > 10'000 && interval_ > 1) interval_ /= 2;
        left_ = interval_, last_ = now;
        if (watch_.poll()) neurode::stop();
    }
    neurode::Watch& watch_;
    int64_t last_, left_ = 1, interval_ = 1;
};

// Floating-point operations of one evaluation for one sample, roughly: what decides whether threads pay.
inline double cost_of(const neurode::Section& section) {
    double cost = 0;
    for (const neurode::Instruction& i : section) {
        if (i.opcode == GEMM || i.opcode == WGRAD) cost += 2.0 * i.count * i.O * i.K;
        else if (i.opcode == SAMPLE_PRODUCT) cost += 4.0 * i.count * i.O * i.K * i.J;
        else if (i.opcode == POINTWISE) cost += 4.0 * i.n * i.num_steps;
        else cost += double(i.n) * i.m;
    }
    return cost;
}
constexpr double WORTH_A_THREAD = 3e6; // operations: some hundred microseconds; waking a team costs a few to a few tens

// Threads for `units` pieces of work that cost so much in all.
inline int threads_for(int64_t asked, int64_t units, double cost) {
    double worth = cost / WORTH_A_THREAD;
    int64_t most = asked < units ? asked : units;
    if (most > worth) most = int64_t(worth);
    return most < 1 ? 1 : int(most < 256 ? most : 256);
}

} // namespace NEURODE_NAMESPACE
