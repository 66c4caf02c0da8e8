// The adaptive way forward where the whole batch is one system: one error norm over all rows, one step for all of them.
// Tiles are taken in turn; after each round of them the step is judged (src/neurode/control/adaptive.py, JointPace).
#pragma once
#include "forward.h"

namespace NEURODE_NAMESPACE {

template <class R> class Joint {
  public:
    Joint(Forward<R>& forward, Trace<R>* trace)
        : f(forward), s(forward.s), trace_(trace), slabs_(trace ? trace->slabs : nullptr), T(f.T), D(f.D), N(f.tile.N), num_tiles_((s.rows + T - 1) / T),
          work_(num_tiles_ * slot_bytes() + 64) {
        slots_ = work_.take<Slot>(num_tiles_);
        for (int64_t i = 0; i < num_tiles_; i++) {
            slots_[i].rows = {work_.take<R>(N), work_.take<R>(N), work_.take<R>(N * f.method.all),
                              work_.take<R>(size_t(f.batch.A) * T)};
            slots_[i].tape = f.tile.make_tape(slots_[i].rows, work_);
        }
    }

    void solve() {
        start_pace(f.batch.t0(0), f.batch.t1(0), pace_.t, pace_.goal, pace_.sign, pace_.tiny);
        span_ = std::fabs(pace_.goal - pace_.t);
        for (int64_t i = 0; i < num_tiles_; i++) load(i);
        outputs_at_start();
        if (pace_.t != pace_.goal) status_ = begin();
        else status_ = ND_SUCCESS;
        while (status_ == RUNNING) {
            f.patience.step();
            attempt();
            judge();
        }
        finish();
    }

  private:
    static constexpr int64_t RUNNING = -1;
    struct Slot {
        Frame<R> rows;
        const StepTape<R>* tape;
    };
    size_t slot_bytes() const {
        return Workspace::size_of<Slot>(1) + 2 * Workspace::size_of<R>(N) + Workspace::size_of<R>(N * f.method.all) +
               Workspace::size_of<R>(size_t(f.batch.A) * T) + Tile<R>::tape_bytes(f.p, s);
    }

    int live(int64_t i) const { return int(s.rows - i * T < T ? s.rows - i * T : T); }
    void select(int64_t i) {
        const Frame<R>& rows = slots_[i].rows;
        f.tile.y = rows.y, f.tile.y1 = rows.y1, f.tile.k = rows.k, f.tile.rowdata = rows.rowdata, f.tile.tape = slots_[i].tape;
    }
    void load(int64_t i) {
        select(i);
        for (int l = 0; l < T; l++) f.load_lane(l, i * T + (l < live(i) ? l : 0), true);
    }
    void set_interval(double t0, double t1) {
        f.tile.set_interval(t0, t1);
    }
    // Sums of the live lanes of all tiles, as a root mean square over the state's elements; of several groups the largest.
    template <class Sums> double norm(Sums sums) {
        double largest = 0;
        f.group_end = 0;
        for (int64_t g = 0; g < (s.num_groups ? s.num_groups : 1); g++) {
            f.group_begin = f.group_end, f.group_end = s.num_groups ? int(s.groups[g]) : D;
            double r = std::sqrt(total(sums) / (double(s.rows) * (f.group_end - f.group_begin)));
            if (largest == largest && !(r <= largest)) largest = r; // a NaN stays
        }
        f.group_begin = 0, f.group_end = D;
        return largest;
    }
    template <class Sums> double total(Sums sums) {
        double total = 0;
        for (int64_t i = 0; i < num_tiles_; i++) {
            select(i);
            if (f.batch.wide_tolerances())
                for (int l = 0; l < T; l++) f.load_tolerances(l, i * T + (l < live(i) ? l : 0));
            sums(f.ratio);
            for (int l = 0; l < live(i); l++) total += f.ratio[l];
        }
        return total;
    }

    int64_t begin() {
        bool all_finite = true;
        set_interval(pace_.t, pace_.t);
        for (int64_t i = 0; i < num_tiles_; i++) {
            select(i);
            f.tile.evaluate(0, f.saved, f.bases);
            for (int l = 0; l < live(i); l++)
                for (ptrdiff_t j = l; j < ptrdiff_t(D) * T; j += T)
                    all_finite = all_finite && std::isfinite(f.tile.k[j]) && std::isfinite(f.tile.y[j]);
        }
        evaluations_ = 1;
        if (!all_finite) return ND_NON_FINITE;
        pace_.h = s.first_step > 0 ? s.first_step : std::fmin(automatic_first_step(), span_);
        return propose();
    }
    double automatic_first_step() {
        double d0 = norm([&](double* to) { f.square_sums(f.tile.y, nullptr, to); });
        double d1 = norm([&](double* to) { f.square_sums(f.tile.k, nullptr, to); });
        double h0 = trial_step(d0, d1);
        set_interval(pace_.t, pace_.t + pace_.sign * h0);
        for (int64_t i = 0; i < num_tiles_; i++) {
            select(i);
            f.tile.trial(f.saved, f.bases);
        }
        evaluations_++;
        double d2 = norm([&](double* to) { f.square_sums(f.tile.y1, f.tile.k, to); }) / h0;
        return first_step(h0, d1, d2, s.order);
    }

    // Ten times the distance to the next float64; around t = 0 the span sets the scale.
    double resolution() const {
        auto ulp = [](double x) { // of a number that is not negative: its bits count up
            int64_t i;
            double next;
            std::memcpy(&i, &x, sizeof x);
            i++;
            std::memcpy(&next, &i, sizeof x);
            return next - x;
        };
        return 10 * ulp(std::fmax(std::fabs(pace_.t), ulp(span_)));
    }
    int64_t propose() {
        if (pace_.h != pace_.h) return ND_NON_FINITE;
        pace_.propose(s);
        bool cut = (pace_.goal - pace_.t) * pace_.sign < pace_.h;
        if (pace_.h < resolution() && !cut) return finite_ ? ND_UNDERFLOW : ND_NON_FINITE;
        return RUNNING;
    }

    void attempt() {
        set_interval(pace_.t, pace_.end);
        for (int64_t i = 0; i < num_tiles_; i++) {
            select(i);
            f.stages(s.fsal || fresh_ ? 1 : 0, slabs_ ? slabs_->room(i) : nullptr);
        }
        evaluations_ += f.method.stages - (s.fsal || fresh_ ? 1 : 0);
    }

    void judge() {
        double r = error_ratio();
        finite_ = std::isfinite(r);
        auto next = Controller(s).factors(d(finite_ ? r : INF), d(pace_.history[0]), d(pace_.history[1]));
        bool accepted = pace_.accepts(s, r);
        if (accepted) num_accepted_++, leave_step();
        else num_rejected_++, fresh_ = true; // f at the start is known
        pace_.remember(accepted, next.logs[0]);
        pace_.judge(s, accepted, next.grow[0], finite_ ? next.shrink[0] : s.min_factor);
        if (accepted && pace_.t == pace_.goal) status_ = ND_SUCCESS;
        if (status_ == RUNNING && num_accepted_ + num_rejected_ >= s.max_steps) status_ = ND_MAX_STEPS;
        if (status_ == RUNNING) status_ = propose();
    }
    double error_ratio() {
        double r5 = norm([&](double* to) { f.error_sums(s.e, to); });
        if (!s.e2) return r5;
        double r3 = norm([&](double* to) { f.error_sums(s.e2, to); });
        return r5 * r5 / std::fmax(std::sqrt(r5 * r5 + 0.01 * r3 * r3), 1e-30);
    }

    // The accepted step: recorded, its outputs written, its end the next one's start.
    void leave_step() {
        double t0 = pace_.t, t1 = pace_.end;
        int64_t next = output_;
        while (next < s.num_eval && (f.batch.t_eval(next, 0) - t1) * pace_.sign <= 0) next++;
        bool inside = output_ < next && f.batch.t_eval(output_, 0) != t1, extra = inside && f.method.extra;
        if (extra) evaluations_ += f.method.extra;
        bool known = extra && f.method.extra_is_end();
        fresh_ = known;
        for (int64_t i = 0; i < num_tiles_; i++) {
            select(i);
            if (extra)
                for (int q = f.method.stages; q < f.method.all; q++) f.tile.evaluate(q, f.saved, f.bases);
            for (int l = 0; l < live(i); l++) {
                int64_t row = i * T + l;
                if (trace_) f.tile.get(f.tile.y, l, trace_->add(0, row, t0, t1, slabs_ ? slabs_->place(l) : -1), D);
                if (inside) f.tile.begin_dense(l);
                for (int64_t j = output_; j < next; j++) {
                    double t = f.batch.t_eval(j, 0);
                    if (t == t1) f.tile.get(f.tile.y1, l, f.batch.ys(j, row), D);
                    else f.tile.dense((t - t0) / (t1 - t0), l, f.batch.ys(j, row));
                }
            }
            if (s.fsal || known) std::memcpy(f.tile.k, f.tile.k + (s.fsal ? f.method.stages - 1 : f.method.stages) * N, N * sizeof(R));
            std::memcpy(f.tile.y, f.tile.y1, N * sizeof(R));
            if (slabs_) slabs_->keep();
        }
        output_ = next;
    }
    void outputs_at_start() {
        for (; output_ < s.num_eval && (f.batch.t_eval(output_, 0) - pace_.t) * pace_.sign <= 0; output_++)
            for (int64_t row = 0; row < s.rows; row++)
                std::memcpy(f.batch.ys(output_, row), f.batch.y0(row), D * sizeof(R));
    }

    void finish() {
        for (int64_t i = 0; i < num_tiles_; i++)
            for (int l = 0; l < live(i); l++) {
                int64_t row = i * T + l;
                s.t_end[row] = pace_.t, s.evaluations[row] = evaluations_;
                s.accepted[row] = num_accepted_, s.rejected[row] = num_rejected_;
                if (status_ == ND_SUCCESS) f.tile.get(slots_[i].rows.y, l, f.batch.y1(row), D), s.status[row] = status_;
                else f.batch.fail(row, status_, output_);
            }
    }

    Forward<R>& f;
    nd_solve& s;
    Trace<R>* trace_;
    Slabs<R>* slabs_;
    int T, D;
    ptrdiff_t N;
    int64_t num_tiles_;
    Workspace work_;
    Slot* slots_;
    Pace<double> pace_;
    double span_ = 0;
    bool finite_ = true;
    bool fresh_ = true; // whether the first stage is known: f at the step's start
    int64_t status_ = RUNNING, output_ = 0, evaluations_ = 0, num_accepted_ = 0, num_rejected_ = 0;
};

} // namespace NEURODE_NAMESPACE
