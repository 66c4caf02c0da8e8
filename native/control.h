// Which step next: the numbers of src/neurode/control (pid.py, rows.py, adaptive.py, first_step.py), for lanes and for one.
#pragma once
#include "abi.h"
#include "math_double.h"

namespace NEURODE_NAMESPACE {

typedef Vec<double> Doubles;
typedef Mask<double> Truths;

// PID control in logarithms, so that lanes go through it as vectors.
struct Controller {
    const nd_solve& s;
    explicit Controller(const nd_solve& solve) : s(solve) {}

    int memory() const { return s.derivative != 0 ? 2 : s.proportional != 0 ? 1 : 0; }
    // Whether the next length is a power of the last error ratio alone, the same after accepted and rejected attempts.
    bool elementary() const { return memory() == 0 && s.integral == 1 && s.order >= 1; }
    // What K vectors of error ratios make of the next lengths then, before limits.
    template <int K> INLINE void powers_of(D (&ratios)[K]) const {
        UNROLL for (int k = 0; k < K; k++) ratios[k] = greater<double>(d(1e-30), ratios[k]);
        powers(ratios, -1 / s.order);
        UNROLL for (int k = 0; k < K; k++) ratios[k] = d(s.safety) * ratios[k];
    }
    D grown(D factor) const { return clamp(factor, s.shrink_accepted ? s.min_factor : 1.0, s.max_factor); }
    D shrunk(D factor) const { return clamp(factor, s.min_factor, 1.0); }

    // What these error ratios make of the next length, after an accepted and after a rejected attempt, and their logarithms; given
    // the logarithms of the accepted ratios before.
    struct Factors {
        D grow, shrink, logs;
    };
    Factors factors(D ratio, D before, D earlier) const {
        double b1 = (s.proportional + s.integral + s.derivative) / s.order, b2 = (s.proportional + 2 * s.derivative) / s.order,
               b3 = s.derivative / s.order;
        D logs = vlog(choose<double>(ratio > d(1e-30), ratio, d(1e-30)));
        D up = vexp(d(b2) * before - d(b1) * logs - d(b3) * earlier);
        D down = any<double>(ratio > d(1)) ? vexp(d(-1 / s.order) * logs) : up; // of rejected attempts alone
        return {grown(d(s.safety) * up), shrunk(d(s.safety) * down), choose<double>(logs > d(LOG_FLOOR), logs, d(LOG_FLOOR))};
    }
    static constexpr double LOG_FLOOR = -9.210340371976182; // log 1e-4: the least ratio remembered (Hairer's `facold`)
};

// A vector of either kind as doubles in memory; and which lanes are not zero there, as a mask of either kind.
template <class R> INLINE void store_doubles(double* to, Vec<R> v) {
    if constexpr (sizeof(R) == 8) {
        store(to, v);
    } else {
        store(to, widen(v, 0));
        store(to + LANES<double>, widen(v, 1));
    }
}
template <class R> INLINE Mask<R> true_lanes(const double* flags) {
    if constexpr (sizeof(R) == 8) return load(flags) != splat<double>(0);
    else return narrow(load(flags), load(flags + LANES<double>)) != splat<float>(0);
}

INLINE D all_lanes(double x, D) { return d(x); }
INLINE double all_lanes(double x, double) { return x; }
template <class M, class V> INLINE V pick(M m, V yes, V no) { return m ? yes : no; }
INLINE bool both(bool a, bool b) { return a && b; }
INLINE Truths both(Truths a, Truths b) { return a & b; }
INLINE bool either(bool a, bool b) { return a || b; }
INLINE Truths either(Truths a, Truths b) { return a | b; }

// The way of one system through its span (V a double), or of as many as a vector has lanes.
template <class V> struct Pace {
    V t = {}, goal = {}, sign = {}, h = {}, end = {}, tiny = {};
    V history[2] = {}; // logarithms of the accepted ratios before
    V held = {};       // 1 after a rejection

    static V number(double x) { return all_lanes(x, V{}); }
    void propose(const nd_solve& s) {
        h = pick(h > number(s.min_step), h, number(s.min_step)); // a NaN becomes the least length
        h = pick(h < number(s.max_step), h, number(s.max_step));
        V far = (goal - t) * sign;
        end = pick(h * number(s.stretch) >= far, goal, t + h * sign);
    }
    V length() const { return (end - t) * sign; }
    auto accepts(const nd_solve& s, V ratio) const { // NaN: no
        auto accepted = ratio <= number(1);
        return s.min_step > 0 ? either(accepted, both(ratio < number(INF), length() <= number(s.min_step))) : accepted;
    }
    template <class M> void remember(M accepted, V log_ratio) {
        history[1] = pick(accepted, history[0], history[1]), history[0] = pick(accepted, log_ratio, history[0]);
    }
    template <class M> void judge(const nd_solve& s, M accepted, V grow, V shrink) {
        V one = number(1), most = pick(both(held != number(0), grow > one), one, grow);
        h = length() * pick(accepted, s.hold ? most : grow, shrink);
        held = pick(accepted, number(0), one);
        t = pick(accepted, end, t);
    }
    auto stuck() const { return both(held != number(0), h <= tiny); }
};

// A span's beginning: sets lane l of a pace, through references to its numbers.
inline void start_pace(double t0, double t1, double& t, double& goal, double& sign, double& tiny) {
    t = t0, goal = t1, sign = t1 >= t0 ? 1 : -1;
    tiny = 10 * 2.220446049250313e-16 * std::fmax(std::fabs(t0), std::fabs(t1));
}

// The first step (Hairer, Norsett & Wanner 1993, II.4) from the norms d0 of y0, d1 of f0: a trial length ...
inline double trial_step(double d0, double d1) {
    return d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / std::fmax(d1, 1e-300);
}
// ... and, with the norm d2 of f's change over it, divided by it, the step itself.
inline double first_step(double h0, double d1, double d2, double order) {
    double steepest = d2 > d1 || d2 != d2 ? d2 : d1;
    double h1 = steepest <= 1e-15 ? std::fmax(h0 * 1e-3, 1e-6) : std::pow(0.01 / std::fmax(steepest, 1e-300), 1.0 / order);
    if (steepest != steepest) return h0; // a NaN from f beyond the start says nothing about the start
    double h = std::fmin(100 * h0, h1);
    return h == h ? h : h0;
}

} // namespace NEURODE_NAMESPACE
