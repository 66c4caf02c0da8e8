// The way forward: fixed grids and adaptive steps, every lane of a tile its own row; a lane whose row is done takes the next.
#pragma once
#include "control.h"
#include "team.h"
#include "tile.h"
#include "trace.h"

namespace NEURODE_NAMESPACE {

// Everything that a solve reads and writes, seen by rows.
template <class R> class Batch {
  public:
    Batch(const nd_solve& solve, int size, int num_rowdata) : s(solve), D(size), A(num_rowdata) {}
    const R* y0(int64_t row) const { return static_cast<const R*>(s.y0) + row * D; }
    const R* rowdata(int64_t row) const { return static_cast<const R*>(s.rowdata) + row * A; }
    R* y1(int64_t row) const { return static_cast<R*>(s.y1) + row * D; }
    R* ys(int64_t j, int64_t row) const { return static_cast<R*>(s.ys) + (j * s.rows + row) * D; }
    double t0(int64_t row) const { return s.t0[row * s.t0_step]; }
    double t1(int64_t row) const { return s.t1[row * s.t1_step]; }
    double t_eval(int64_t j, int64_t row) const { return s.t_eval[j * s.eval_point_step + row * s.eval_row_step]; }
    double grid(int64_t point, int64_t row) const { return s.grid[point * s.grid_point_step + row * s.grid_row_step]; }
    R rtol(int64_t row, int f) const { return tolerance(s.rtol, s.rtols, s.rtols_row_step, s.rtols_step, row, f); }
    R atol(int64_t row, int f) const { return tolerance(s.atol, s.atols, s.atols_row_step, s.atols_step, row, f); }
    bool wide_tolerances() const { return s.rtols || s.atols; }

    void fill(R* row, R value) const {
        for (int f = 0; f < D; f++) row[f] = value;
    }
    // A row that failed: NaN wherever it did not come.
    void fail(int64_t row, int64_t status, int64_t next_output) const {
        s.status[row] = status;
        fill(y1(row), R(NAN));
        for (int64_t j = next_output; j < s.num_eval; j++) fill(ys(j, row), R(NAN));
    }

    const nd_solve& s;
    int D, A;

  private:
    static R tolerance(double one, const void* many, int64_t row_step, int64_t step, int64_t row, int f) {
        return many ? static_cast<const R*>(many)[row * row_step + f * step] : R(one);
    }
};

template <class R> bool finite(const R* v, int n) {
    R sum = 0;
    for (int i = 0; i < n; i++) sum += v[i] * R(0);
    return sum == 0;
}

// What the loops of one thread share.
template <class R> class Forward {
  public:
    Forward(const Program& program, nd_solve& solve, Trace<R>* trace, int T, neurode::Watch& watch, int worker = 0)
        : p(program), s(solve), batch(solve, program.size, program.num_rowdata), method(solve), trace_(trace),
          worker_(worker), patience(watch),
          work_(bytes(program, solve, T)), run(program, static_cast<const R*>(solve.uniforms), T, 1, false, work_),
          tile(program, method, run, work_), T(T), D(program.size) {
        saved_size = ptrdiff_t(program.rows_saved) * T;
        saved = work_.take<R>(saved_size);
        bases[SCRATCH] = work_.take<R>(size_t(program.rows_forward) * T);
        bases[COTANGENT] = work_.take<R>(size_t(program.rows_cotangent) * T);
        lanes = work_.take<Lane>(T);
        scale_ = work_.take<R>(3 * tile.N);
        double** parts[] = {&ratio, &grow, &shrink, &logs, &before, &earlier, &second};
        for (double** part : parts) *part = work_.take<double>(T);
        for (int l = 0; l < T; l++) lanes[l] = Lane(), ratio[l] = before[l] = earlier[l] = second[l] = 0;
        for (ptrdiff_t i = 0; i < saved_size; i++) saved[i] = 0;
        tile.use_tape(static_cast<const R*>(solve.uniforms), work_);
    }
    static size_t bytes(const Program& p, const nd_solve& s, int T) {
        size_t n = size_t(p.size) * T;
        return Interpreter<R>::bytes(p, T, 1, false) + Tile<R>::bytes(p, s, T) +
               Workspace::size_of<R>(size_t(p.rows_saved) * T) + Workspace::size_of<R>(size_t(p.rows_forward) * T) +
               Workspace::size_of<R>(size_t(p.rows_cotangent) * T) + Workspace::size_of<Lane>(T) +
               Tile<R>::tape_bytes(p, s) + Tile<R>::shared_bytes(p, T) + Workspace::size_of<R>(3 * n) + 7 * Workspace::size_of<double>(T) + 4096;
    }

    struct Lane {
        int64_t row = -1, output = 0, step = 0, attempts = 0;
        Pace pace;
    };

    // ---- fixed grids

    // Tiles from the queue, until there are no more.
    void fixed(neurode::Queue& tiles) {
        for (int64_t first; (first = tiles.take() * T) < s.rows;) {
            int live = int(s.rows - first < T ? s.rows - first : T);
            for (int l = 0; l < T; l++) load_lane(l, first + (l < live ? l : 0), l < live); // idle lanes repeat a row
            for (int64_t point = 0; point + 1 < s.points; point++) {
                patience.step();
                fixed_step(first, live, point);
            }
            for (int l = 0; l < live; l++) end_fixed(l);
        }
    }

    // ---- adaptive, every row its own step

    // f at the start (null: not wanted) and the first step's length (NaN: f is not finite there) of every row.
    void first_steps(neurode::Queue& tiles, R* f0, double* lengths) {
        for (int64_t first; (first = tiles.take() * T) < s.rows;) {
            patience.step();
            first_steps_of(first, f0, lengths);
        }
    }

    // Rows from the queue: a lane whose row is done takes the next.
    void adaptive(neurode::Queue& rows, const R* f0, const double* lengths) {
        int64_t next = rows.take();
        int live = 0;
        while (true) {
            for (int l = 0; l < T; l++)
                while (lanes[l].row < 0 && next < s.rows) live += take_row(l, next, f0, lengths), next = rows.take();
            if (!live) break;
            patience.step();
            attempt();
            live -= judge();
        }
    }

    void error_ratios(double* to) { // root mean square over the features, as the rows' control has it
        error_sums(s.e, to);
        for (int l = 0; l < T; l++) to[l] = std::sqrt(to[l] / D);
        if (!s.e2) return;
        error_sums(s.e2, second);
        for (int l = 0; l < T; l++) { // DOP853's combination (Hairer, Norsett & Wanner 1993, II.10)
            double r5 = to[l], r3 = std::sqrt(second[l] / D);
            to[l] = r5 * r5 / std::fmax(std::sqrt(r5 * r5 + 0.01 * r3 * r3), 1e-30);
        }
    }

    // Sums over features of (h sum_i e_i k_i / (atol + rtol max(|y0|, |y1|)))^2, by lane.
    void error_sums(const double* e, double* to) {
        int used[Tile<R>::MAX_STAGES], count = 0;
        R w[Tile<R>::MAX_STAGES];
        for (int j = 0; j < method.stages; j++)
            if (e[j] != 0) w[count] = R(e[j]), used[count++] = j;
        constexpr int L = LANES<R>;
        for (int v = 0; v < T; v += L) {
            Vec<R> total = {};
            for (int f = 0; f < D; f++) {
                ptrdiff_t i = ptrdiff_t(f) * T + v;
                Vec<R> sum = {};
                for (int j = 0; j < count; j++) sum += splat<R>(w[j]) * load(tile.k + used[j] * tile.N + i);
                Vec<R> size = vmax<R>(magnitude<R>(load(tile.y + i)), magnitude<R>(load(tile.y1 + i)));
                Vec<R> scale = batch.wide_tolerances() ? load(scale_ + i) + load(scale_ + tile.N + i) * size
                                                       : splat<R>(R(s.atol)) + splat<R>(R(s.rtol)) * size;
                Vec<R> part = sum * load(tile.h + v) / scale;
                total += part * part;
            }
            for (int l = 0; l < L; l++) to[v + l] = total[l];
        }
    }

    // Stages, the state at the end, and where outputs lie inside the step what the dense output needs further.
    void attempt() {
        for (int l = 0; l < T; l++) {
            Pace& pace = lanes[l].pace;
            if (lanes[l].row >= 0) pace.propose(s);
            tile.t0[l] = pace.t, tile.t1[l] = lanes[l].row >= 0 ? pace.end : pace.t;
        }
        tile.set_lengths();
        stages(s.fsal ? 1 : 0);
    }
    void stages(int from) {
        for (int i = from; i < method.stages; i++) tile.evaluate(i, saved, bases);
        tile.finish_attempt(saved);
    }

    // Accepts or rejects every lane's attempt; returns how many rows have ended.
    int judge() {
        error_ratios(ratio);
        for (int l = 0; l < T; l++) {
            if (!(ratio[l] < INF)) ratio[l] = INF;
            before[l] = lanes[l].pace.history[0], earlier[l] = lanes[l].pace.history[1];
        }
        Controller(s).factors(T, ratio, before, earlier, grow, shrink, logs);
        evaluate_extra();
        int ended = 0;
        for (int l = 0; l < T; l++)
            if (lanes[l].row >= 0) ended += judge_lane(l);
        return ended;
    }

    int judge_lane(int l) {
        Lane& lane = lanes[l];
        Pace& pace = lane.pace;
        int64_t row = lane.row;
        lane.attempts++;
        s.evaluations[row] += method.num_before_end(); // the first stage of an FSAL method is the step before's last
        bool accepted = pace.accepts(s, ratio[l]);
        if (accepted) {
            s.accepted[row]++;
            record(l);
            outputs(l);
            advance(l);
            pace.accept(s, grow[l], logs[l]);
        } else {
            s.rejected[row]++;
            pace.reject(shrink[l]);
        }
        if (accepted && pace.t == pace.goal) return end_row(l, ND_SUCCESS);
        if (pace.stuck()) return end_row(l, ratio[l] < INF ? ND_UNDERFLOW : ND_NON_FINITE);
        if (lane.attempts >= s.max_steps) return end_row(l, ND_MAX_STEPS);
        return 0;
    }

    void record(int l) {
        if (trace_) tile.get(tile.y, l, trace_->add(worker_, lanes[l].row, tile.t0[l], tile.t1[l]), D);
    }

    // The lane's state moves to the end of its step, with the derivative there where it is known.
    void advance(int l) {
        for (int f = 0; f < D; f++) {
            ptrdiff_t at = ptrdiff_t(f) * T + l;
            tile.y[at] = tile.y1[at];
            if (s.fsal) tile.k[at] = tile.k[(method.stages - 1) * tile.N + at];
        }
    }

    int end_row(int l, int64_t status) {
        Lane& lane = lanes[l];
        s.t_end[lane.row] = lane.pace.t;
        if (status == ND_SUCCESS) tile.get(tile.y, l, batch.y1(lane.row), D), s.status[lane.row] = status;
        else batch.fail(lane.row, status, lane.output);
        lane.row = -1;
        return 1;
    }

    // ---- outputs

    bool inside(int l) const { // whether an output lies inside the lane's step, so that the dense output is needed
        const Lane& lane = lanes[l];
        if (lane.row < 0 || lane.output >= s.num_eval) return false;
        return (batch.t_eval(lane.output, lane.row) - tile.t1[l]) * lane.pace.sign < 0;
    }
    void evaluate_extra() {
        if (!method.extra || !s.num_eval) return;
        bool wanted = false;
        for (int l = 0; l < T; l++)
            if (inside(l) && lanes[l].pace.accepts(s, ratio[l])) wanted = true, s.evaluations[lanes[l].row] += method.extra;
        if (!wanted) return;
        for (int i = method.stages; i < method.all; i++) tile.evaluate(i, saved, bases);
    }
    // Writes the outputs in the step that the lane has just accepted, up to its end.
    void outputs(int l) {
        Lane& lane = lanes[l];
        bool formed = false;
        for (; lane.output < s.num_eval; lane.output++) {
            double t = batch.t_eval(lane.output, lane.row), beyond = (t - tile.t1[l]) * lane.pace.sign;
            if (beyond > 0) return;
            R* to = batch.ys(lane.output, lane.row);
            if (beyond == 0) {
                tile.get(tile.y1, l, to, D);
                continue;
            }
            if (!formed) tile.begin_dense(l), formed = true;
            tile.dense((t - tile.t0[l]) / (tile.t1[l] - tile.t0[l]), l, to);
        }
    }
    void outputs_at_start(int l) {
        Lane& lane = lanes[l];
        for (; lane.output < s.num_eval; lane.output++) {
            if ((batch.t_eval(lane.output, lane.row) - lane.pace.t) * lane.pace.sign > 0) return;
            tile.get(tile.y, l, batch.ys(lane.output, lane.row), D);
        }
    }

    // ---- beginnings

    void load_lane(int l, int64_t row, bool live) {
        Lane& lane = lanes[l];
        lane = Lane();
        lane.row = live ? row : -1;
        lane.pace.start(s.grid ? batch.grid(0, row) : batch.t0(row), s.grid ? batch.grid(s.points - 1, row) : batch.t1(row));
        tile.put(tile.y, l, batch.y0(row), D);
        if (batch.A) tile.put(tile.rowdata, l, batch.rowdata(row), batch.A);
        if (live && batch.wide_tolerances()) load_tolerances(l, row);
    }
    void load_tolerances(int l, int64_t row) {
        for (int f = 0; f < D; f++) {
            scale_[ptrdiff_t(f) * T + l] = batch.atol(row, f);
            scale_[tile.N + ptrdiff_t(f) * T + l] = batch.rtol(row, f);
        }
    }

    // Puts a row into an idle lane; false where it ends before it begins.
    bool take_row(int l, int64_t row, const R* f0, const double* lengths) {
        load_lane(l, row, true);
        Lane& lane = lanes[l];
        outputs_at_start(l);
        if (lane.pace.t == lane.pace.goal) return end_row(l, ND_SUCCESS), false;
        if (lengths[row] != lengths[row]) return end_row(l, ND_NON_FINITE), false;
        lane.pace.h = lengths[row];
        if (f0) tile.put(tile.k, l, f0 + row * D, D);
        return true;
    }

    // The first steps of T rows from `first` on.
    void first_steps_of(int64_t first, R* f0, double* lengths) {
        int live = int(s.rows - first < T ? s.rows - first : T);
        for (int l = 0; l < T; l++) load_lane(l, first + (l < live ? l : 0), true);
        for (int l = 0; l < T; l++) tile.t0[l] = tile.t1[l] = lanes[l].pace.t;
        tile.set_lengths();
        tile.evaluate(0, saved, bases);
        if (s.first_step > 0) {
            for (int l = 0; l < T; l++) ratio[l] = s.first_step;
        } else {
            automatic_first_steps(ratio);
        }
        R* scratch = scale_ + 2 * tile.N;
        for (int l = 0; l < live; l++) {
            int64_t row = first + l;
            tile.get(tile.k, l, scratch, D);
            if (f0) std::memcpy(f0 + row * D, scratch, D * sizeof(R));
            double longest = std::fabs(lanes[l].pace.goal - lanes[l].pace.t);
            lengths[row] = !finite(scratch, D) ? NAN : std::fmin(ratio[l], longest);
            if (longest > 0) s.evaluations[row] = s.first_step > 0 ? 1 : 2;
        }
        for (int l = 0; l < T; l++) lanes[l].row = -1;
    }
    void automatic_first_steps(double* to) {
        double *d0 = grow, *d1 = shrink, *d2 = logs;
        norms(tile.y, nullptr, d0);
        norms(tile.k, nullptr, d1);
        for (int l = 0; l < T; l++) {
            to[l] = trial_step(d0[l], d1[l]);
            tile.t1[l] = tile.t0[l] + lanes[l].pace.sign * to[l];
        }
        tile.set_lengths();
        tile.trial(saved, bases);
        norms(tile.y1, tile.k, d2);
        for (int l = 0; l < T; l++) to[l] = first_step(to[l], d1[l], d2[l] / to[l], s.order);
    }
    void norms(const R* x, const R* minus, double* to) { // root mean squares
        square_sums(x, minus, to);
        for (int l = 0; l < T; l++) to[l] = std::sqrt(to[l] / D);
    }
    // Sums over features of ((x - minus) / (atol + rtol |y|))^2, by lane.
    void square_sums(const R* x, const R* minus, double* to) {
        for (int v = 0; v < T; v += LANES<R>) {
            Vec<R> total = {};
            for (int f = 0; f < D; f++) {
                ptrdiff_t i = ptrdiff_t(f) * T + v;
                Vec<R> size = magnitude<R>(load(tile.y + i));
                Vec<R> scale = batch.wide_tolerances() ? load(scale_ + i) + load(scale_ + tile.N + i) * size
                                                       : splat<R>(R(s.atol)) + splat<R>(R(s.rtol)) * size;
                Vec<R> part = (minus ? load(x + i) - load(minus + i) : load(x + i)) / scale;
                total += part * part;
            }
            for (int l = 0; l < LANES<R>; l++) to[v + l] = total[l];
        }
    }

    // ---- one step of a fixed grid

    void fixed_step(int64_t first, int live, int64_t point) {
        for (int l = 0; l < T; l++) {
            int64_t row = first + (l < live ? l : 0);
            tile.t0[l] = batch.grid(point, row), tile.t1[l] = batch.grid(point + 1, row);
            lanes[l].pace.t = tile.t1[l];
        }
        tile.set_lengths();
        if (point == 0)
            for (int l = 0; l < live; l++) lanes[l].pace.t = tile.t0[l], outputs_at_start(l);
        bool dense = false;
        for (int l = 0; l < live; l++) dense = dense || inside(l);
        R* at = saved;
        bool keep = trace_ && trace_->kept;
        int before_end = method.num_before_end();
        if (keep) at = trace_->kept + ((first / T) * (s.points - 1) + point) * before_end * saved_size;
        for (int i = 0; i < before_end; i++) tile.evaluate(i, keep ? at + i * saved_size : saved, bases);
        tile.finish();
        if (dense)
            for (int i = before_end; i < method.all; i++) tile.evaluate(i, saved, bases);
        for (int l = 0; l < live; l++) {
            if (tile.t0[l] == tile.t1[l]) continue; // a row whose own grid has ended
            s.accepted[first + l]++;
            s.evaluations[first + l] += before_end + (dense ? method.all - before_end : 0);
            record(l);
            outputs(l);
        }
        std::memcpy(tile.y, tile.y1, tile.N * sizeof(R));
    }
    void end_fixed(int l) {
        int64_t row = lanes[l].row;
        tile.get(tile.y, l, batch.y1(row), D);
        s.t_end[row] = batch.grid(s.points - 1, row);
        s.status[row] = ND_SUCCESS;
        if (!finite(batch.y1(row), D)) {
            batch.fail(row, ND_NON_FINITE, 0);
        }
        lanes[l].row = -1;
    }

    const Program& p;
    nd_solve& s;
    Batch<R> batch;
    Tableau method;

  private:
    Trace<R>* trace_;
    int worker_;

  public:
    Patience patience;

  private:
    Workspace work_;

  public:
    Interpreter<R> run;
    Tile<R> tile;
    int T, D;
    ptrdiff_t saved_size;
    R* saved;
    Bases<R> bases;
    Lane* lanes;
    double *ratio, *grow, *shrink, *logs, *before, *earlier, *second;

  private:
    R* scale_; // atol, rtol by feature and lane; scratch
};

} // namespace NEURODE_NAMESPACE
