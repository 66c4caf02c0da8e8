// Solves as their formulas say, one row at a time, in numbers with bounds: explicit Runge-Kutta steps, PID control, dense output,
// and the derivative of all that with accepted times held constant. Where rounding could turn a decision, the case is Undecided.
#pragma once
#include <vector>

#include "../abi.h"
#include "program_reference.h"

namespace reference {

// A random problem with the arrays that nd_solve points to.
template <class R> struct Problem {
    nd_solve s = {};
    int size = 0, num_rowdata = 0;
    std::vector<R> uniforms, y0, rowdata, rtols, atols;
    std::vector<double> t0, t1, a, b, c, e, e2, p, grid, t_eval;
    R* row(std::vector<R>& of, int64_t i, int n) { return of.data() + i * n; }
};

template <class R> class Rows {
  public:
    typedef Bounded<R> B;
    typedef typename B::W W;
    typedef std::vector<B> State;
    struct Step {
        B t0, H;
        std::vector<State> y;              // by row of the group
        std::vector<std::pair<int, B>> at; // outputs in it: their number, and the fraction of the step
    };

    // The rows `members` share every step: one row, or all of a joint solve.
    Rows(const Program& program, Problem<R>& problem, std::vector<int64_t> members)
        : q(problem), s(problem.s), sample_(program, problem.uniforms), members_(members), D(program.size),
          all_(int(s.stages + s.extra)) {
        y.resize(members.size());
        for (size_t m = 0; m < members.size(); m++)
            for (int d = 0; d < D; d++) y[m].push_back(B(q.y0[members[m] * D + d]));
        ys.assign(s.num_eval, std::vector<State>(members.size(), State(D, B(0))));
        k_.assign(members.size(), std::vector<State>(all_));
    }

    std::vector<State> y;
    std::vector<std::vector<State>> ys; // by output, by member
    int64_t accepted = 0, rejected = 0, status = ND_SUCCESS;
    B t;

    // ---- the way forward

    void fixed() {
        int64_t row = members_[0];
        auto grid = [&](int64_t i) { return q.grid[i * s.grid_point_step + row * s.grid_row_step]; };
        t = B(grid(0)), sign_ = grid(s.points - 1) >= grid(0) ? 1 : -1;
        outputs_at_start();
        for (int64_t i = 0; i + 1 < s.points; i++) {
            if (grid(i) == grid(i + 1)) continue;
            points_.push_back(i);
            t = B(grid(i));
            step(B(grid(i + 1)) - B(grid(i)), B(grid(i + 1)), true);
        }
        for (State& x : y)
            for (B& v : x) fail_unless_finite(v);
    }
    void adaptive() {
        double t0 = q.t0[members_[0] * s.t0_step], t1 = q.t1[members_[0] * s.t1_step];
        t = B(t0), sign_ = t1 >= t0 ? 1 : -1;
        outputs_at_start();
        if (t0 == t1) return;
        evaluate(0, t, B(0));
        for (auto& k : k_)
            for (B& v : k[0]) fail_unless_finite(v);
        if (status != ND_SUCCESS) return;
        B h = s.first_step > 0 ? B(s.first_step) : automatic();
        h = least(h, B(std::fabs(t1 - t0)));
        B history[2] = {B(0), B(0)};
        bool held = false;
        double order = s.order, b1 = (s.proportional + s.integral + s.derivative) / order,
               b2 = (s.proportional + 2 * s.derivative) / order, b3 = s.derivative / order;
        for (int64_t attempts = 0;; attempts++) {
            if (attempts >= s.max_steps) return void(status = ND_MAX_STEPS);
            h = least(most(h, B(s.min_step)), B(s.max_step));
            B far = t1 >= t0 ? B(t1) - t : t - B(t1);
            bool last = !less<R>(h * B(s.stretch), far);
            B end = last ? B(t1) : t + B(sign_) * h, length = last ? far : h;
            B ratio = attempt(B(sign_) * length, end);
            bool fine = std::isfinite(ratio.v);
            if (!ratio.known()) throw Undecided();
            bool accept = fine && (!less<R>(B(1), ratio) || (s.min_step > 0 && !less<R>(B(s.min_step), length)));
            B lr = fine ? apply<R>(LOG, most(ratio, B(1e-30))) : B(0);
            if (accept) {
                finish_step(B(sign_) * length, end);
                if (last) return;
                B up = apply<R>(EXP, B(b2) * history[0] - B(b1) * lr - B(b3) * history[1]);
                B grow = clamp(B(s.safety) * up, s.shrink_accepted ? s.min_factor : 1.0, s.max_factor);
                if (s.hold && held) grow = least(grow, B(1));
                h = length * grow;
                history[1] = history[0], history[0] = most(lr, B(std::log(W(1e-4))));
                held = false;
            } else {
                rejected++;
                B down = fine ? apply<R>(EXP, B(-1 / order) * lr) : B(0);
                h = length * clamp(B(s.safety) * down, s.min_factor, 1.0);
                held = true;
                if (h.v < 1e-9) throw Undecided(); // about to give up, by rules of its own
            }
        }
    }

    // ---- the way back: adds to the accumulators; leaves the rest here

    std::vector<State> grad_y0, grad_data;
    std::vector<B> grad_times;              // of a fixed grid's points, or of the two ends
    std::vector<std::vector<B>> grad_eval;  // by output, by member

    void backward(const R* grad_y1, const R* grad_ys, std::vector<Sum<R>>& accumulators) {
        size_t ends = s.grid ? size_t(s.points) : 2;
        std::vector<Sum<R>> times(ends);
        std::vector<State> end_states = y;
        grad_eval.assign(s.num_eval, State(members_.size(), B(0)));
        for (size_t m = 0; m < members_.size(); m++) {
            int64_t row = members_[m];
            std::vector<Sum<R>> onto(D), data(q.num_rowdata);
            for (int d = 0; d < D && grad_y1; d++) onto[d].add(B(grad_y1[row * D + d]));
            for (size_t i = steps_.size(); i-- > 0;) {
                B g0, g1;
                step_back(m, steps_[i], grad_ys, onto, data, g0, g1, accumulators);
                if (s.grid) times[points_[i]].add(g0), times[points_[i] + 1].add(g1);
                else {
                    if (i == 0) times[0].add(g0);
                    if (i + 1 == steps_.size()) times[1].add(g1);
                }
            }
            for (int j = 0; j < num_at_start_ && grad_ys; j++)
                for (int d = 0; d < D; d++) onto[d].add(B(grad_ys[(j * s.rows + row) * D + d]));
            grad_y0.push_back(values(onto)), grad_data.push_back(values(data));
        }
        grad_times = values(times);
        y = end_states;
    }

  private:
    static State values(const std::vector<Sum<R>>& sums) {
        State made;
        for (const Sum<R>& x : sums) made.push_back(x.value());
        return made;
    }
    void fail_unless_finite(B v) {
        if (!v.known()) throw Undecided();
        if (!std::isfinite(v.v)) status = ND_NON_FINITE;
    }
    static B least(B a, B b) { return pick(a, b, a.v < b.v); }
    static B most(B a, B b) { return pick(a, b, a.v > b.v); }
    static B pick(B a, B b, bool first) { return B(first ? a.v : b.v, std::fmax(a.e, b.e)); }
    static B clamp(B x, double low, double high) { return least(most(x, B(low)), B(high)); }

    std::vector<R> data_of(int64_t row) const {
        return std::vector<R>(q.rowdata.begin() + row * q.num_rowdata, q.rowdata.begin() + (row + 1) * q.num_rowdata);
    }
    double c(int i) const { return q.c[i]; }
    double a(int i, int j) const { return q.a[i * all_ + j]; }

    // y + H sum_j w_j k_j.
    template <class Weight> State moved(size_t, const std::vector<State>& k, const State& from, int n, B H, Weight w) const {
        State to(D);
        for (int d = 0; d < D; d++) {
            Sum<R> sum;
            for (int j = 0; j < n; j++)
                if (w(j).v != 0 || w(j).e != 0) sum.add(w(j) * k[j][d]);
            to[d] = from[d] + H * sum.value();
        }
        return to;
    }
    B time_of(int i, B H) const { return c(i) == 0 ? t : t + B(c(i)) * H; }
    void evaluate(int i, B at, B H) {
        for (size_t m = 0; m < members_.size(); m++) {
            State there = moved(m, k_[m], y[m], i, H, [&](int j) { return B(a(i, j)); });
            k_[m][i] = sample_.forward(rounded<R>(at.v, at.e), there, data_of(members_[m]));
        }
    }
    void stages(int from, int to, B H) {
        for (int i = from; i < to; i++) evaluate(i, time_of(i, H), H);
    }

    B attempt(B H, B) {
        stages(1, int(s.stages), H);
        y1_.clear();
        for (size_t m = 0; m < members_.size(); m++)
            y1_.push_back(moved(m, k_[m], y[m], int(s.stages), H, [&](int j) { return B(q.b[j]); }));
        B r5 = error(H, q.e);
        if (!s.e2) return r5;
        B r3 = error(H, q.e2); // DOP853's combination
        if (!std::isfinite(r5.v) || !std::isfinite(r3.v)) throw Undecided();
        return apply<R>(DIV, r5 * r5, most(apply<R>(SQRT, r5 * r5 + B(0.01) * r3 * r3), B(1e-30)));
    }
    B scale(size_t m, int d, W size) const {
        int64_t row = members_[m];
        W rtol = s.rtols ? W(q.rtols[row * s.rtols_row_step + d * s.rtols_step]) : W(R(s.rtol));
        W atol = s.atols ? W(q.atols[row * s.atols_row_step + d * s.atols_step]) : W(R(s.atol));
        return B(atol) + B(rtol) * B(size);
    }
    B norm(const Sum<R>& squares) const {
        return apply<R>(SQRT, apply<R>(DIV, squares.value(), B(W(members_.size()) * D)));
    }
    B error(B H, const std::vector<double>& e) {
        Sum<R> total;
        for (size_t m = 0; m < members_.size(); m++)
            for (int d = 0; d < D; d++) {
                Sum<R> sum;
                for (int j = 0; j < s.stages; j++)
                    if (e[j] != 0) sum.add(B(e[j]) * k_[m][j][d]);
                B size = most(B(std::fabs(y[m][d].v), y[m][d].e), B(std::fabs(y1_[m][d].v), y1_[m][d].e));
                B part = apply<R>(DIV, sum.value() * H, scale(m, d, size.v) + B(0, size.e * W(0.1)));
                total.add(part * part);
            }
        return norm(total);
    }
    B automatic() { // Hairer, Norsett & Wanner 1993, II.4
        auto squares = [&](auto value) {
            Sum<R> sum;
            for (size_t m = 0; m < members_.size(); m++)
                for (int d = 0; d < D; d++) {
                    B part = apply<R>(DIV, value(m, d), scale(m, d, std::fabs(y[m][d].v)));
                    sum.add(part * part);
                }
            return norm(sum);
        };
        B d0 = squares([&](size_t m, int d) { return y[m][d]; }), d1 = squares([&](size_t m, int d) { return k_[m][0][d]; });
        bool slow = less<R>(d0, B(1e-5)) || less<R>(d1, B(1e-5));
        B h0 = slow ? B(1e-6) : apply<R>(DIV, B(0.01) * d0, d1);
        std::vector<State> trial(members_.size());
        for (size_t m = 0; m < members_.size(); m++) {
            State there = moved(m, k_[m], y[m], 1, B(sign_) * h0, [](int) { return B(1); });
            B at = t + B(sign_) * h0;
            trial[m] = sample_.forward(rounded<R>(at.v, at.e), there, data_of(members_[m]));
        }
        B d2 = apply<R>(DIV, squares([&](size_t m, int d) { return trial[m][d] - k_[m][0][d]; }), h0);
        B steepest = most(d1, d2);
        if (!steepest.known() || !std::isfinite(steepest.v) || less<R>(steepest, B(1e-13))) throw Undecided();
        B h1 = apply<R>(EXP, B(1 / s.order) * apply<R>(LOG, apply<R>(DIV, B(0.01), steepest)));
        return least(B(100) * h0, h1);
    }

    void outputs_at_start() {
        for (; output_ < s.num_eval && (eval(output_) - t.v) * sign_ <= 0; output_++, num_at_start_++)
            ys[output_] = y;
    }
    double eval(int64_t j) const { return q.t_eval[j * s.eval_point_step + members_[0] * s.eval_row_step]; }

    void step(B H, B end, bool fresh) {
        if (fresh) evaluate(0, t, H);
        attempt_fixed(H);
        finish_step(H, end);
    }
    void attempt_fixed(B H) {
        stages(1, int(s.stages), H);
        y1_.clear();
        for (size_t m = 0; m < members_.size(); m++)
            y1_.push_back(moved(m, k_[m], y[m], int(s.stages), H, [&](int j) { return B(q.b[j]); }));
    }
    // The step is accepted: outputs in it, then on to its end.
    void finish_step(B H, B end) {
        accepted++;
        Step made = {t, H, y, {}};
        bool extra = false;
        for (; output_ < s.num_eval; output_++) {
            double te = eval(output_);
            bool at_end = end.e == 0 && W(te) == end.v;
            if (!at_end && (sign_ > 0 ? less<R>(end, B(te)) : less<R>(B(te), end))) break;
            if (!at_end && !extra) stages(int(s.stages), all_, H), extra = true;
            B x = at_end ? B(1) : apply<R>(DIV, B(te) - t, H);
            for (size_t m = 0; m < members_.size(); m++)
                ys[output_][m] = at_end ? y1_[m] : moved(m, k_[m], y[m], all_, H, [&](int i) { return weight(i, x, false); });
            made.at.push_back({int(output_), x});
        }
        steps_.push_back(made);
        y = y1_, t = end;
        if (s.fsal)
            for (auto& k : k_) k[0] = k[s.stages - 1];
        else if (!s.grid) evaluate(0, t, B(0));
    }
    B weight(int i, B x, bool derivative) const {
        B sum(0);
        for (int j = int(s.degree) - 1; j >= 0; j--) sum = sum * x + B(q.p[i * s.degree + j]) * B(derivative ? j + 1 : 1);
        return derivative ? sum : sum * x;
    }

    // One step of one row: y1 = y0 + H sum b_i k_i and outputs y0 + H sum w_i(x) k_i, x = (te - t0) / H, differentiated by hand
    // with t0, H and te as variables; then H = t1 - t0.
    void step_back(size_t m, const Step& step, const R* grad_ys, std::vector<Sum<R>>& onto, std::vector<Sum<R>>& data, B& g0,
                   B& g1, std::vector<Sum<R>>& accumulators) {
        int64_t row = members_[m];
        State before = step.y[m], lambda = values(onto);
        B H = step.H;
        t = step.t0;
        y[m] = before;
        std::vector<std::vector<Sum<R>>> gk(all_, std::vector<Sum<R>>(D));
        std::vector<Sum<R>> g_before(D);
        Sum<R> gH, gt0;
        for (int i = 0; i < all_; i++) { // all stages again
            State there = moved(m, k_[m], before, i, H, [&](int j) { return B(a(i, j)); });
            B at = time_of(i, H);
            k_[m][i] = sample_.forward(rounded<R>(at.v, at.e), there, data_of(row));
        }
        auto dot = [&](const State& g, int i) {
            Sum<R> sum;
            for (int d = 0; d < D; d++) sum.add(g[d] * k_[m][i][d]);
            return sum.value();
        };
        for (int d = 0; d < D; d++) g_before[d].add(lambda[d]);
        for (int i = 0; i < s.stages; i++) {
            if (q.b[i] == 0) continue;
            for (int d = 0; d < D; d++) gk[i][d].add(H * B(q.b[i]) * lambda[d]);
            gH.add(B(q.b[i]) * dot(lambda, i));
        }
        for (auto& out : step.at) {
            if (!grad_ys) continue;
            State g;
            for (int d = 0; d < D; d++) g.push_back(B(grad_ys[(out.first * s.rows + row) * D + d]));
            B x = out.second;
            Sum<R> along, slope;
            for (int i = 0; i < all_; i++) {
                B w = weight(i, x, false), dw = weight(i, x, true);
                for (int d = 0; d < D; d++) gk[i][d].add(H * w * g[d]);
                along.add(w * dot(g, i)), slope.add(dw * dot(g, i));
            }
            for (int d = 0; d < D; d++) g_before[d].add(g[d]);
            gH.add(along.value()), gH.add(-(x * slope.value())), gt0.add(-slope.value());
            grad_eval[out.first][m] = slope.value();
        }
        for (int i = all_; i-- > 0;) {
            State there = moved(m, k_[m], before, i, H, [&](int j) { return B(a(i, j)); });
            B at = time_of(i, H);
            sample_.forward(rounded<R>(at.v, at.e), there, data_of(row));
            auto made = sample_.backward(values(gk[i]), accumulators);
            for (int d = 0; d < D; d++) g_before[d].add(made.y[d]);
            for (int j = 0; j < i; j++) {
                if (a(i, j) == 0) continue;
                for (int d = 0; d < D; d++) gk[j][d].add(H * B(a(i, j)) * made.y[d]);
                gH.add(B(a(i, j)) * dot(made.y, j));
            }
            gt0.add(made.t[0]), gH.add(B(c(i)) * made.t[0]);
            for (int x = 0; x < q.num_rowdata; x++) data[x].add(made.data[x]);
        }
        onto = g_before;
        g1 = gH.value(), g0 = gt0.value() - gH.value();
    }

    Problem<R>& q;
    const nd_solve& s;
    Sample<R> sample_;
    std::vector<int64_t> members_;
    int D, all_;
    std::vector<std::vector<State>> k_; // by member, by stage
    std::vector<State> y1_;
    std::vector<Step> steps_;
    std::vector<int64_t> points_;
    int64_t output_ = 0;
    int num_at_start_ = 0;
    double sign_ = 1;
};

} // namespace reference
