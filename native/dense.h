// The dense output of one lane's step, as polynomials of the fraction of the step that has passed.
#pragma once
#include "abi.h"
#include "simd.h"
#include "workspace.h"

namespace NEURODE_NAMESPACE {

// Outputs are many and steps are few, so a step's polynomials are formed once: y0 + h sum_j x^j Q_j, Q_j = sum_i p_ij k_i. The
// weights p_ij cancel, hence doubles, whatever the state's numbers are. Vectors run over the powers j (or the stages i).
class DenseOutput {
  public:
    DenseOutput(const nd_solve& s, int D, Workspace& work)
        : D_(D), all_(int(s.stages + s.extra)), degree_(s.p ? int(s.degree) : 0), powers_(padded(degree_)), rows_(padded(all_)) {
        by_power_ = work.take<double>(size_t(all_) * powers_);
        by_stage_ = work.take<double>(size_t(powers_) * rows_);
        q_ = work.take<double>(size_t(D) * powers_);
        x_ = work.take<double>(powers_);
        gk_ = work.take<double>(rows_);
        lanes_ = work.take<double>(size_t(D) * powers_ * L);
        for (int i = 0; i < all_ * powers_; i++) by_power_[i] = 0;
        for (int i = 0; i < powers_ * rows_; i++) by_stage_[i] = 0;
        for (int j = 0; j < powers_; j++) x_[j] = 0;
        for (int i = 0; i < all_; i++)
            for (int j = 0; j < degree_; j++) by_power_[i * powers_ + j] = by_stage_[j * rows_ + i] = s.p[i * degree_ + j];
    }
    static size_t bytes(const nd_solve& s, int D) {
        size_t powers = padded(s.p ? int(s.degree) : 0), rows = padded(int(s.stages + s.extra));
        return Workspace::size_of<double>(rows * powers) * 2 + Workspace::size_of<double>(D * powers) +
               Workspace::size_of<double>(powers) + Workspace::size_of<double>(rows) +
               Workspace::size_of<double>(size_t(D) * powers * L);
    }

    // Forms the polynomials of a lane: `k` is its first number, `row` apart are its features, `stage` apart the stages.
    template <class R> void form(const R* k, ptrdiff_t row, ptrdiff_t stage) {
        for (int d = 0; d < D_; d++)
            for (int j = 0; j < powers_; j += L) {
                Vec<double> sum = {};
                for (int i = 0; i < all_; i++) sum += load(by_power_ + i * powers_ + j) * splat<double>(k[d * row + i * stage]);
                store(q_ + d * powers_ + j, sum);
            }
    }
    // sum_j x^j Q_j of a feature, to be multiplied by h; and its derivative by x.
    double at(int d, double x) const {
        const double* q = q_ + d * powers_;
        double sum = 0;
        for (int j = degree_ - 1; j >= 0; j--) sum = (sum + q[j]) * x;
        return sum;
    }
    double slope(int d, double x) const {
        const double* q = q_ + d * powers_;
        double sum = 0;
        for (int j = degree_ - 1; j >= 0; j--) sum = sum * x + (j + 1) * q[j];
        return sum;
    }

    // The way back, for the same lane: gathers M_j = sum x^j g over the outputs of a step ...
    void clear() {
        for (int i = 0; i < D_ * powers_; i++) q_[i] = 0;
    }
    template <class R> void gather(double x, const R* g) {
        double power = 1;
        for (int j = 0; j < degree_; j++) x_[j] = power *= x;
        for (int d = 0; d < D_; d++)
            for (int j = 0; j < powers_; j += L)
                store(q_ + d * powers_ + j, load(q_ + d * powers_ + j) + load(x_ + j) * splat<double>(g[d]));
    }
    // ... and adds h sum_j p_ij M_j to the cotangents of the stages.
    template <class R> void scatter(double h, R* gk, ptrdiff_t row, ptrdiff_t stage) const {
        for (int d = 0; d < D_; d++) {
            for (int i = 0; i < rows_; i += L) {
                Vec<double> sum = {};
                for (int j = 0; j < degree_; j++)
                    sum += load(by_stage_ + j * rows_ + i) * splat<double>(q_[d * powers_ + j]);
                store(gk_ + i, sum * splat<double>(h));
            }
            for (int i = 0; i < all_; i++) gk[d * row + i * stage] += R(gk_[i]);
        }
    }

    // ---- L lanes at once: pointers are to the first one's number

    static constexpr int L = LANES<double>;

    template <class R> void form_lanes(const R* k, ptrdiff_t row, ptrdiff_t stage) {
        for (int d = 0; d < D_; d++)
            for (int j = 0; j < powers_; j += AT_ONCE) {
                Vec<double> sum[AT_ONCE] = {};
                for (int i = 0; i < all_; i++) {
                    Vec<double> number = load_doubles(k + d * row + i * stage);
                    UNROLL for (int q = 0; q < AT_ONCE; q++) sum[q] += splat<double>(by_power_[i * powers_ + j + q]) * number;
                }
                UNROLL for (int q = 0; q < AT_ONCE; q++) store(lanes_ + (d * powers_ + j + q) * L, sum[q]);
            }
    }
    Vec<double> at_lanes(int d, Vec<double> x) const {
        Vec<double> sum = {};
        for (int j = degree_ - 1; j >= 0; j--) sum = (sum + load(lanes_ + (d * powers_ + j) * L)) * x;
        return sum;
    }
    void clear_lanes() {
        for (int i = 0; i < D_ * powers_ * L; i++) lanes_[i] = 0;
    }
    void gather_lanes(int d, Vec<double> x, Vec<double> g) {
        for (int j = 0; j < degree_; j++) {
            g *= x;
            double* to = lanes_ + (d * powers_ + j) * L;
            store(to, load(to) + g);
        }
    }
    template <class R> void scatter_lanes(Vec<double> h, R* gk, ptrdiff_t row, ptrdiff_t stage) const {
        for (int d = 0; d < D_; d++)
            for (int i = 0; i < all_; i++) {
                Vec<double> sum = {};
                for (int j = 0; j < degree_; j++)
                    sum += splat<double>(by_power_[i * powers_ + j]) * load(lanes_ + (d * powers_ + j) * L);
                R* to = gk + d * row + i * stage;
                store_narrow(to, load_doubles(to) + h * sum);
            }
    }

  private:
    static constexpr int AT_ONCE = 4; // powers: sums that do not wait for each other
    static constexpr int padded(int n) {
        constexpr int P = L > AT_ONCE ? L : AT_ONCE;
        return (n + P - 1) / P * P;
    }
    int D_, all_, degree_, powers_, rows_;
    double *by_power_, *by_stage_; // p, padded with zeros, and turned
    double *q_, *x_, *gk_;
    double* lanes_; // q_ of L lanes
};

} // namespace NEURODE_NAMESPACE
