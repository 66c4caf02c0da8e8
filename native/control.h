// Which step next: the numbers of src/neurode/control (pid.py, rows.py, adaptive.py, first_step.py), for lanes and for one.
#pragma once
#include "abi.h"
#include "math_double.h"

namespace NEURODE_NAMESPACE {

constexpr double STRETCH = 1.01; // a step that would leave less than 1 % of itself takes the rest too, as in DOPRI5

// PID control in logarithms, so that lanes go through it as vectors. Arrays of T lanes, T a multiple of the vector length.
struct Controller {
    const nd_solve& s;
    explicit Controller(const nd_solve& solve) : s(solve) {}

    int memory() const { return s.derivative != 0 ? 2 : s.proportional != 0 ? 1 : 0; }

    // The factors after an accepted and after a rejected attempt with these error ratios, and the logarithms of the ratios.
    void factors(int T, const double* ratio, const double* before, const double* earlier, double* grow, double* shrink,
                 double* logs) const {
        double b1 = (s.proportional + s.integral + s.derivative) / s.order, b2 = (s.proportional + 2 * s.derivative) / s.order,
               b3 = s.derivative / s.order;
        for (int l = 0; l < T; l += LANES<double>) {
            D r = load(ratio + l), lr = vlog(choose<double>(r > d(1e-30), r, d(1e-30)));
            D up = vexp(d(b2) * load(before + l) - d(b1) * lr - d(b3) * load(earlier + l)), down = vexp(d(-1 / s.order) * lr);
            store(grow + l, clamp(d(s.safety) * up, s.shrink_accepted ? s.min_factor : 1.0, s.max_factor));
            store(shrink + l, clamp(d(s.safety) * down, s.min_factor, 1.0));
            store(logs + l, choose<double>(lr > d(LOG_FLOOR), lr, d(LOG_FLOOR)));
        }
    }
    static constexpr double LOG_FLOOR = -9.210340371976182; // log 1e-4: the least ratio remembered (Hairer's `facold`)
};

// One lane's way through its span.
struct Pace {
    double t = 0, goal = 0, sign = 1, h = 0, end = 0, tiny = 0;
    double history[2] = {0, 0}; // logarithms of the accepted ratios before
    bool held = false;

    void start(double t0, double t1) {
        *this = Pace();
        t = t0, goal = t1, sign = t1 >= t0 ? 1 : -1;
        tiny = 10 * 2.220446049250313e-16 * std::fmax(std::fabs(t0), std::fabs(t1));
    }
    void propose(const nd_solve& s) {
        h = std::fmin(std::fmax(h, s.min_step), s.max_step);
        double far = (goal - t) * sign;
        end = h * STRETCH >= far ? goal : t + h * sign;
    }
    double length() const { return (end - t) * sign; }
    bool accepts(const nd_solve& s, double ratio) const { // NaN: no
        return ratio <= 1 || (s.min_step > 0 && ratio < INF && length() <= s.min_step);
    }
    void accept(const nd_solve& s, double grow, double log_ratio) {
        h = length() * (s.hold && held ? std::fmin(grow, 1.0) : grow);
        history[1] = history[0], history[0] = log_ratio;
        held = false;
        t = end;
    }
    void reject(double shrink) {
        h = length() * shrink;
        held = true;
    }
    bool stuck() const { return held && h <= tiny; }
};

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
