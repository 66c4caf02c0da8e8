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
        group_end = D;
        saved_size = numbers_of<R>(program.rows_saved, T);
        saved = work_.take<R>(saved_size);
        bases[SCRATCH] = work_.take<R>(numbers_of<R>(program.rows_forward, T));
        bases[COTANGENT] = work_.take<R>(numbers_of<R>(program.rows_cotangent, T));
        lanes = work_.take<Lane>(T);
        scale_ = work_.take<R>(3 * tile.N);
        totals_ = work_.take<R>(numbers_of<R>(1, T));
        points_ = work_.take<double>(size_t(D) * PER_GROUP), unwanted_ = work_.take<R>(D);
        num_groups_ = (T + PER_GROUP - 1) / PER_GROUP;
        groups_ = work_.take<Group>(num_groups_);
        double** parts[] = {&ratio, &second, &size0_, &size1_, &size2_, &flags_, &factors_};
        for (double** part : parts) *part = work_.take<double>(num_groups_ * PER_GROUP);
        for (int l = 0; l < T; l++) lanes[l] = Lane();
        for (int l = 0; l < num_groups_ * PER_GROUP; l++) for (double** part : parts) (*part)[l] = 0;
        for (int g = 0; g < num_groups_; g++) groups_[g] = Group();
        for (ptrdiff_t i = 0; i < saved_size; i++) saved[i] = 0;
        tile.use_tape(static_cast<const R*>(solve.uniforms), work_);
    }
    static size_t bytes(const Program& p, const nd_solve& s, int T) {
        size_t n = numbers_of<R>(p.size, T);
        return Interpreter<R>::bytes(p, T, 1, false) + Tile<R>::bytes(p, s, T) +
               Workspace::size_of<R>(numbers_of<R>(p.rows_saved, T)) + Workspace::size_of<R>(numbers_of<R>(p.rows_forward, T)) +
               Workspace::size_of<R>(numbers_of<R>(p.rows_cotangent, T)) + Workspace::size_of<Lane>(T) +
               Tile<R>::tape_bytes(p, s) + Tile<R>::shared_bytes(p, T) + Workspace::size_of<R>(3 * n) +
               Workspace::size_of<R>(numbers_of<R>(1, T)) +
               Workspace::size_of<double>(size_t(p.size) * PER_GROUP) + Workspace::size_of<R>(p.size) +
               7 * Workspace::size_of<double>(T + PER_GROUP) + Workspace::size_of<Group>(T / PER_GROUP + 1) + 4096;
    }

    struct Lane {
        int64_t row = -1, output = 0;
    };
    static constexpr int PER_GROUP = LANES<double>;
    struct Group { // of lanes whose steps are judged at once
        Pace<Doubles> pace;
        Doubles next_output = {};                    // its time, infinitely far where there is none
        Truths live = {}, attempts = {}, accepted = {}; // truth; counts
    };
    Pace<Doubles>& pace(int l) const { return groups_[l / PER_GROUP].pace; }
    double time(int l) const { return pace(l).t[l % PER_GROUP]; }
    double sign(int l) const { return pace(l).sign[l % PER_GROUP]; }

    // ---- fixed grids

    // Tiles from the queue, until there are no more.
    void fixed(neurode::Queue& tiles) {
        bool shared = s.grid_row_step == 0; // all rows on one grid
        for (int64_t first; (first = tiles.take() * T) < s.rows;) {
            int live = int(s.rows - first < T ? s.rows - first : T);
            for (int l = 0; l < T; l++) load_lane(l, first + (l < live ? l : 0), l < live); // idle lanes repeat a row
            for (int l = 0; l < live; l++) outputs_at_start(l);
            for (int64_t point = 0; point + 1 < s.points; point++) {
                patience.step();
                fixed_step(first, live, point, shared);
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
        bool idle = true;
        while (true) {
            if (live == 0) in_step_ = true;
            for (int l = 0; l < T && idle; l++)
                while (lanes[l].row < 0 && next < s.rows) live += take_row(l, next, f0, lengths), next = rows.take();
            if (!live) break;
            in_step_ = in_step_ && live == T;
            patience.step();
            attempt();
            int ended = judge();
            in_step_ = in_step_ && (ended == 0 || ended == live);
            live -= ended, idle = ended > 0;
        }
    }

    void error_ratios(double* to) { // root mean square over the features, as the rows' control has it
        error_sums(s.e, to);
        roots(to);
        if (!s.e2) return;
        error_sums(s.e2, second);
        roots(second);
        for (int l = 0; l < T; l++) { // DOP853's combination (Hairer, Norsett & Wanner 1993, II.10)
            double r5 = to[l], r3 = second[l];
            to[l] = r5 * r5 / std::fmax(std::sqrt(r5 * r5 + 0.01 * r3 * r3), 1e-30);
        }
    }
    void roots(double* to) const {
        for (int l = 0; l < T; l += PER_GROUP) store(to + l, vsqrt(load(to + l) / d(D)));
    }

    // Sums over the features of a group (all of them, but for a joint norm of several) of
    // (h sum_i e_i k_i / (atol + rtol max(|y0|, |y1|)))^2, by lane.
    void error_sums(const double* e, double* to) {
        int used[Tile<R>::MAX_STAGES], count = 0;
        R w[Tile<R>::MAX_STAGES];
        for (int j = 0; j < method.stages; j++)
            if (e[j] != 0) w[count] = R(e[j]), used[count++] = j;
        if (T == 1) {
            to[0] = 0;
            for (int f = group_begin; f < group_end; f++) {
                R sum = 0, scale = scale_of(f, std::fmax(std::fabs(tile.y[f]), std::fabs(tile.y1[f])));
                for (int j = 0; j < count; j++) sum += w[j] * tile.k[used[j] * tile.N + f];
                R part = sum * tile.h[0] / scale;
                to[0] += part * part;
            }
            return;
        }
        for (int l = 0; l < T; l++) totals_[l] = 0;
        switch (count) { // the commoner methods, with their weights in registers
        case 3: add_errors<3>(w, used, count); break;
        case 4: add_errors<4>(w, used, count); break;
        case 5: add_errors<5>(w, used, count); break;
        case 6: add_errors<6>(w, used, count); break;
        case 7: add_errors<7>(w, used, count); break;
        default: add_errors<0>(w, used, count);
        }
        for (int v = 0; v < T; v += LANES<R>) store_doubles<R>(to + v, load(totals_ + v));
    }
    // Adds the squares to `totals_`. N weights; 0: as many as `count` says.
    template <int N> void add_errors(const R* w, const int* used, int count) {
        constexpr int L = LANES<R>, M = N ? N : 1;
        Vec<R> weight[M], atol = splat<R>(R(s.atol)), rtol = splat<R>(R(s.rtol));
        for (int j = 0; j < N; j++) weight[j] = splat<R>(w[j]);
        bool wide = batch.wide_tolerances();
        for (int f = group_begin; f < group_end; f++) {
            ptrdiff_t first = ptrdiff_t(f) * T;
            const R* k[M];
            for (int j = 0; j < N; j++) k[j] = tile.k + used[j] * tile.N + first;
            for (int v = 0; v < T; v += L) {
                ptrdiff_t i = first + v;
                Vec<R> sum = {};
                UNROLL for (int j = 0; j < N; j++) sum += weight[j] * load(k[j] + v);
                for (int j = 0; N == 0 && j < count; j++) sum += splat<R>(w[j]) * load(tile.k + used[j] * tile.N + i);
                Vec<R> size = greater<R>(magnitude<R>(load(tile.y + i)), magnitude<R>(load(tile.y1 + i))); // a NaN of y1 stays
                if (wide) atol = load(scale_ + i), rtol = load(scale_ + tile.N + i);
                Vec<R> part = sum * load(tile.h + v) / (atol + rtol * size);
                store(totals_ + v, load(totals_ + v) + part * part);
            }
        }
    }

    R scale_of(int f, R size) const { // in a tile of one sample
        return batch.wide_tolerances() ? scale_[f] + scale_[tile.N + f] * size : R(s.atol) + R(s.rtol) * size;
    }

    // Stages, the state at the end, and where outputs lie inside the step what the dense output needs further.
    void attempt() {
        for (int l = 0; l < T; l += PER_GROUP) {
            Group& g = groups_[l / PER_GROUP];
            g.pace.propose(s);
            store(tile.t0 + l, g.pace.t);
            store(tile.t1 + l, choose<double>(g.live, g.pace.end, g.pace.t));
        }
        tile.set_lengths();
        stages(s.fsal ? 1 : 0, trace_ && trace_->slabs && in_step_ ? trace_->slabs->room() : nullptr);
    }
    // `slab`: where SAVED of all stages goes; null: nobody wants it.
    void stages(int from, R* slab) {
        slab_ = slab;
        for (int i = from; i < method.stages; i++) {
            if (slab && i + 1 < method.stages) run.fetch_meanwhile(slab + (i + 1) * saved_size, saved_size);
            tile.evaluate(i, slab ? slab + i * saved_size : saved, bases);
        }
        tile.finish_attempt(slab ? slab + (method.stages - 1) * saved_size : saved);
    }

    // Accepts or rejects every lane's attempt; returns how many rows have ended.
    int judge() {
        error_ratios(ratio);
        bool any_output = false;
        for (int l = 0; l < T; l += PER_GROUP) {
            Group& g = groups_[l / PER_GROUP];
            Doubles r = load(ratio + l);
            store(ratio + l, r = choose<double>(r < d(INF), r, d(INF)));
            Truths accepted = g.live & g.pace.accepts(s, r), output = (g.next_output - g.pace.end) * g.pace.sign <= d(0);
            store(flags_ + l, truth<double>(accepted));
            any_output = any_output || any<double>(accepted & output);
        }
        if (any_output) evaluate_extra();
        if (trace_) record_accepted();
        if (any_output && T == 1) outputs(0);
        else if (any_output)
            for (int l = 0; l < T; l += PER_GROUP) outputs_of_lanes(l);
        advance();
        bool elementary = controller_.elementary();
        if (elementary) next_factors();
        int ended = 0;
        for (int l = 0; l < T; l += PER_GROUP) ended += move_on(l, elementary);
        return ended;
    }
    void next_factors() {
        constexpr int K = 4;
        int l = 0;
        for (; l + K * PER_GROUP <= T; l += K * PER_GROUP) next_factors_of<K>(l);
        for (; l < T; l += PER_GROUP) next_factors_of<1>(l);
    }
    template <int K> void next_factors_of(int l) {
        Doubles x[K];
        UNROLL for (int k = 0; k < K; k++) x[k] = load(ratio + l + k * PER_GROUP);
        controller_.powers_of(x);
        UNROLL for (int k = 0; k < K; k++) store(factors_ + l + k * PER_GROUP, x[k]);
    }

    // Takes the lanes of a group to their next attempt, from lane l on; returns how many rows have ended.
    int move_on(int l, bool elementary) {
        Group& g = groups_[l / PER_GROUP];
        Truths accepted = load(flags_ + l) != d(0);
        Doubles r = load(ratio + l);
        if (elementary) {
            Doubles factor = load(factors_ + l);
            g.pace.judge(s, accepted, controller_.grown(factor), controller_.shrunk(factor));
        } else {
            auto next = controller_.factors(r, g.pace.history[0], g.pace.history[1]);
            g.pace.remember(accepted, next.logs);
            g.pace.judge(s, accepted, next.grow, next.shrink);
        }
        g.attempts -= g.live, g.accepted -= accepted;
        Truths success = accepted & (g.pace.t == g.pace.goal), stuck = g.pace.stuck();
        Truths spent = g.attempts >= Truths{} + s.max_steps;
        if (!any<double>(g.live & (success | stuck | spent))) return 0;
        int ended = 0;
        for (int i = 0; i < PER_GROUP; i++) {
            if (!g.live[i]) continue;
            if (success[i]) ended += end_row(l + i, ND_SUCCESS);
            else if (stuck[i]) ended += end_row(l + i, r[i] < INF ? ND_UNDERFLOW : ND_NON_FINITE);
            else if (spent[i]) ended += end_row(l + i, ND_MAX_STEPS);
        }
        return ended;
    }

    void record_accepted() {
        int accepted = 0;
        for (int l = 0; l < T; l++) accepted += flags_[l] != 0;
        in_step_ = in_step_ && (accepted == 0 || accepted == T);
        if (!in_step_) slab_ = nullptr; // the way back, which has the ends of rows together, could not take it as it lies
        for (int l = 0; l < T; l++)
            if (flags_[l] != 0) record(l);
        if (accepted && slab_) trace_->slabs->keep();
    }
    void record(int l) {
        if (trace_) tile.get(tile.y, l, trace_->add(worker_, lanes[l].row, tile.t0[l], tile.t1[l], place(l)), D);
    }
    int64_t place(int l) const { return slab_ ? trace_->slabs->place(l) : -1; } // of SAVED of the present attempt

    // The state of lanes that were accepted moves to the end of their step, with the derivative there where it is known.
    void advance() {
        const R* last = tile.k + (method.stages - 1) * tile.N;
        if (T == 1) {
            if (flags_[0] == 0) return;
            std::memcpy(tile.y, tile.y1, tile.N * sizeof(R));
            if (s.fsal) std::memcpy(tile.k, last, tile.N * sizeof(R));
            return;
        }
        for (int v = 0; v < T; v += LANES<R>) {
            Mask<R> accepted = true_lanes<R>(flags_ + v);
            for (ptrdiff_t i = v; i < tile.N; i += T) {
                store(tile.y + i, choose<R>(accepted, load(tile.y1 + i), load(tile.y + i)));
                if (s.fsal) store(tile.k + i, choose<R>(accepted, load(last + i), load(tile.k + i)));
            }
        }
    }

    int end_row(int l, int64_t status) {
        Lane& lane = lanes[l];
        Group& g = groups_[l / PER_GROUP];
        int64_t row = lane.row, attempts = g.attempts[l % PER_GROUP], accepted = g.accepted[l % PER_GROUP];
        s.t_end[row] = time(l);
        s.evaluations[row] += attempts * method.num_before_end(); // the first stage of an FSAL method is the step before's last
        s.accepted[row] = accepted, s.rejected[row] = attempts - accepted;
        if (status == ND_SUCCESS) tile.get(tile.y, l, batch.y1(row), D), s.status[row] = status;
        else batch.fail(row, status, lane.output);
        lane.row = -1, g.live[l % PER_GROUP] = 0;
        return 1;
    }

    // ---- outputs

    bool inside(int l) const { // whether an output lies inside the lane's step, so that the dense output is needed
        const Lane& lane = lanes[l];
        if (lane.row < 0 || lane.output >= s.num_eval) return false;
        return (batch.t_eval(lane.output, lane.row) - tile.t1[l]) * sign(l) < 0;
    }
    void evaluate_extra() {
        if (!method.extra || !s.num_eval) return;
        bool wanted = false;
        for (int l = 0; l < T; l++)
            if (flags_[l] != 0 && inside(l)) wanted = true, s.evaluations[lanes[l].row] += method.extra;
        if (!wanted) return;
        for (int i = method.stages; i < method.all; i++) tile.evaluate(i, saved, bases);
    }
    // Writes the outputs in the step that the lane has just accepted, up to its end.
    void outputs(int l) {
        Lane& lane = lanes[l];
        bool formed = false;
        for (; lane.output < s.num_eval; lane.output++) {
            double t = batch.t_eval(lane.output, lane.row), beyond = (t - tile.t1[l]) * sign(l);
            if (beyond > 0) break;
            R* to = batch.ys(lane.output, lane.row);
            if (beyond == 0) {
                tile.get(tile.y1, l, to, D);
                continue;
            }
            if (!formed) tile.begin_dense(l), formed = true;
            tile.dense((t - tile.t0[l]) / (tile.t1[l] - tile.t0[l]), l, to);
        }
        await_output(l);
    }
    // The same for the lanes of a group, in rounds: in each the next output of all lanes that have one in their step. No branch
    // depends on which lanes these are, and times stay in a register: a vector loaded right after its numbers were stored one by
    // one waits for all stores before them.
    void outputs_of_lanes(int l) {
        Group& g = groups_[l / PER_GROUP];
        Doubles t0 = load(tile.t0 + l), length = load(tile.t1 + l) - t0, next = g.next_output;
        Truths accepted = load(flags_ + l) != d(0);
        auto due = [&] { return accepted & ((next - g.pace.end) * g.pace.sign <= d(0)); };
        Truths wanted = due();
        if (!any<double>(wanted)) return;
        tile.begin_dense_lanes(l);
        for (; any<double>(wanted); wanted = due()) {
            Doubles x = (next - t0) / length;
            Truths at_end = next == g.pace.end;
            for (int f = 0; f < D; f++) {
                Doubles end = load_doubles(tile.y1 + ptrdiff_t(f) * T + l);
                store(points_ + f * PER_GROUP, choose<double>(at_end, end, tile.dense_lanes(x, l, f)));
            }
            R* to[PER_GROUP];
            UNROLL for (int i = 0; i < PER_GROUP; i++) {
                Lane& lane = lanes[l + i];
                bool now = wanted[i] != 0;
                to[i] = now ? batch.ys(lane.output, lane.row) : unwanted_;
                lane.output += now;
                next[i] = now ? time_of_output(lane, g.pace.sign[i]) : next[i];
            }
            for (int f = 0; f < D; f++)
                UNROLL for (int i = 0; i < PER_GROUP; i++) to[i][f] = R(points_[f * PER_GROUP + i]);
        }
        g.next_output = next;
    }
    void outputs_at_start(int l) {
        Lane& lane = lanes[l];
        for (; lane.output < s.num_eval; lane.output++) {
            if ((batch.t_eval(lane.output, lane.row) - time(l)) * sign(l) > 0) break;
            tile.get(tile.y, l, batch.ys(lane.output, lane.row), D);
        }
        await_output(l);
    }
    void await_output(int l) {
        groups_[l / PER_GROUP].next_output[l % PER_GROUP] = time_of_output(lanes[l], sign(l));
    }
    double time_of_output(const Lane& lane, double sign) const { // of the next one; infinitely far where there is none
        return lane.output < s.num_eval ? batch.t_eval(lane.output, lane.row) : sign * INF;
    }

    // ---- beginnings

    void load_lane(int l, int64_t row, bool live) {
        Lane& lane = lanes[l];
        lane = Lane();
        lane.row = live ? row : -1;
        start(l, s.grid ? batch.grid(0, row) : batch.t0(row), s.grid ? batch.grid(s.points - 1, row) : batch.t1(row));
        tile.put(tile.y, l, batch.y0(row), D);
        if (batch.A) tile.put(tile.rowdata, l, batch.rowdata(row), batch.A);
        if (live && batch.wide_tolerances()) load_tolerances(l, row);
    }
    void start(int l, double t0, double t1) {
        Group& g = groups_[l / PER_GROUP];
        int i = l % PER_GROUP;
        double t, goal, sign, tiny;
        start_pace(t0, t1, t, goal, sign, tiny);
        g.pace.t[i] = t, g.pace.goal[i] = goal, g.pace.sign[i] = sign, g.pace.tiny[i] = tiny;
        g.pace.h[i] = g.pace.end[i] = g.pace.held[i] = g.pace.history[0][i] = g.pace.history[1][i] = 0;
        g.live[i] = g.attempts[i] = g.accepted[i] = 0;
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
        outputs_at_start(l);
        if (time(l) == pace(l).goal[l % PER_GROUP]) return end_row(l, ND_SUCCESS), false;
        if (lengths[row] != lengths[row]) return end_row(l, ND_NON_FINITE), false;
        pace(l).h[l % PER_GROUP] = lengths[row];
        groups_[l / PER_GROUP].live[l % PER_GROUP] = -1;
        if (f0) tile.put(tile.k, l, f0 + row * D, D);
        return true;
    }

    // The first steps of T rows from `first` on.
    void first_steps_of(int64_t first, R* f0, double* lengths) {
        int live = int(s.rows - first < T ? s.rows - first : T);
        for (int l = 0; l < T; l++) load_lane(l, first + (l < live ? l : 0), true);
        for (int l = 0; l < T; l++) tile.t0[l] = tile.t1[l] = time(l);
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
            double longest = std::fabs(pace(l).goal[l % PER_GROUP] - time(l));
            bool good = finite(scratch, D) && finite(static_cast<const R*>(s.y0) + row * D, D);
            lengths[row] = good ? std::fmin(ratio[l], longest) : NAN;
            if (longest > 0) s.evaluations[row] = s.first_step > 0 ? 1 : 2;
        }
        for (int l = 0; l < T; l++) lanes[l].row = -1;
    }
    void automatic_first_steps(double* to) {
        double *d0 = size0_, *d1 = size1_, *d2 = size2_;
        norms(tile.y, nullptr, d0);
        norms(tile.k, nullptr, d1);
        for (int l = 0; l < T; l++) {
            to[l] = trial_step(d0[l], d1[l]);
            tile.t1[l] = tile.t0[l] + sign(l) * to[l];
        }
        tile.set_lengths();
        tile.trial(saved, bases);
        norms(tile.y1, tile.k, d2);
        for (int l = 0; l < T; l++) to[l] = first_step(to[l], d1[l], d2[l] / to[l], s.order);
    }
    void norms(const R* x, const R* minus, double* to) { // root mean squares
        square_sums(x, minus, to);
        roots(to);
    }
    // Sums over features of ((x - minus) / (atol + rtol |y|))^2, by lane.
    void square_sums(const R* x, const R* minus, double* to) {
        if (T == 1) {
            to[0] = 0;
            for (int f = group_begin; f < group_end; f++) {
                R part = (minus ? x[f] - minus[f] : x[f]) / scale_of(f, std::fabs(tile.y[f]));
                to[0] += part * part;
            }
            return;
        }
        for (int v = 0; v < T; v += LANES<R>) {
            Vec<R> total = {};
            for (int f = group_begin; f < group_end; f++) {
                ptrdiff_t i = ptrdiff_t(f) * T + v;
                Vec<R> size = magnitude<R>(load(tile.y + i));
                Vec<R> scale = batch.wide_tolerances() ? load(scale_ + i) + load(scale_ + tile.N + i) * size
                                                       : splat<R>(R(s.atol)) + splat<R>(R(s.rtol)) * size;
                Vec<R> part = (minus ? load(x + i) - load(minus + i) : load(x + i)) / scale;
                total += part * part;
            }
            store_doubles<R>(to + v, total);
        }
    }

    // ---- one step of a fixed grid

    void fixed_step(int64_t first, int live, int64_t point, bool shared) {
        if (shared) {
            tile.set_interval(batch.grid(point, 0), batch.grid(point + 1, 0));
            if (tile.t0[0] == tile.t1[0]) return;
        } else {
            for (int l = 0; l < T; l++) {
                int64_t row = first + (l < live ? l : 0);
                tile.t0[l] = batch.grid(point, row), tile.t1[l] = batch.grid(point + 1, row);
            }
            tile.set_lengths();
        }
        bool dense = false;
        for (int l = 0; l < live && s.num_eval; l++) dense = dense || inside(l);
        R* at = saved;
        bool keep = trace_ && trace_->kept;
        int before_end = method.num_before_end();
        if (keep) at = trace_->kept + ((first / T) * (s.points - 1) + point) * before_end * saved_size;
        for (int i = 0; i < before_end; i++) {
            bool last = i + 1 == before_end && point + 2 >= s.points; // of the tile
            if (keep && !last) run.fetch_meanwhile(at + (i + 1) * saved_size, saved_size);
            tile.evaluate(i, keep ? at + i * saved_size : saved, bases);
        }
        tile.finish();
        if (dense)
            for (int i = before_end; i < method.all; i++) tile.evaluate(i, saved, bases);
        for (int l = 0; l < live; l++) {
            if (tile.t0[l] == tile.t1[l]) continue; // a row whose own grid has ended
            s.accepted[first + l]++;
            s.evaluations[first + l] += dense ? method.all : before_end;
            if (!keep) record(l);
            if (s.num_eval) outputs(l);
        }
        std::memcpy(tile.y, tile.y1, tile.N * sizeof(R));
    }
    void end_fixed(int l) {
        int64_t row = lanes[l].row;
        tile.get(tile.y, l, batch.y1(row), D);
        s.t_end[row] = batch.grid(s.points - 1, row);
        s.status[row] = ND_SUCCESS;
        if (!finite(batch.y1(row), D)) {
            int64_t reached = 0;
            while (reached < s.num_eval && finite(batch.ys(reached, row), D)) reached++;
            batch.fail(row, ND_NON_FINITE, reached);
        }
        lanes[l].row = -1;
    }

    const Program& p;
    nd_solve& s;
    Batch<R> batch;
    Tableau method;

  private:
    Trace<R>* trace_;
    R* slab_ = nullptr;    // of the present attempt
    bool in_step_ = false; // whether the rows of all lanes began together, and were accepted and rejected together since
    int worker_;

  public:
    Patience patience;

  private:
    Workspace work_;

  public:
    Interpreter<R> run;
    Tile<R> tile;
    int T, D;
    int group_begin = 0, group_end = 0; // the features that norms are taken over
    ptrdiff_t saved_size;
    R* saved;
    Bases<R> bases;
    Lane* lanes;
    double *ratio, *second; // of the errors to the tolerances, by lane

  private:
    Group* groups_;
    int num_groups_;
    Controller controller_{s};
    double *size0_, *size1_, *size2_; // of the first step
    double* flags_;                   // 1 where a lane's attempt is accepted
    double* factors_;                 // of the next lengths, before limits
    R* totals_;                       // of squares, by lane
    double* points_;                  // of the dense output, by feature and lane of a group
    R* unwanted_;                     // where lanes without an output write
    R* scale_; // atol, rtol by feature and lane; scratch
};

} // namespace NEURODE_NAMESPACE
