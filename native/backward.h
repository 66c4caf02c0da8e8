// The way back: the exact derivative of the numbers that the way forward computed, with accepted times held constant. Every lane
// replays the steps of its own row, the last one first, and takes the next row when it is done. Rows that failed do not take
// part, and an idle lane repeats a live one with cotangent zero: nothing that is not finite meets what rows share.
#pragma once
#include "forward.h"

namespace NEURODE_NAMESPACE {

template <class R> class Backward {
    typedef typename Trace<R>::Step Step;

  public:
    Backward(const Program& program, nd_solve& solve, const Trace<R>& trace, int T, neurode::Watch& watch)
        : p(program), s(solve), batch(solve, program.size, program.num_rowdata), method(solve), trace_(trace),
          patience_(watch), stages_(method.all), work_(bytes(program, solve, T)),
          run(program, static_cast<const R*>(solve.uniforms), T, stages_, true, work_), tile(program, method, run, work_),
          dense_(solve, program.size, work_), slopes_(solve, program.size, work_), T(T), D(program.size), N(tile.N) {
        saved_step_ = numbers_of<R>(p.rows_saved, T), cot_step_ = numbers_of<R>(p.rows_cotangent, T);
        own_saved_ = work_.take<R>(saved_step_ * stages_);
        cot_ = work_.take<R>(cot_step_ * stages_);
        for (ptrdiff_t i = 0; i < saved_step_ * stages_; i++) own_saved_[i] = 0;
        for (ptrdiff_t i = 0; i < cot_step_ * stages_; i++) cot_[i] = 0;
        bases_[SCRATCH] = work_.take<R>(numbers_of<R>(p.rows_forward > p.rows_backward ? p.rows_forward : p.rows_backward, T));
        gk_ = work_.take<R>(N * stages_), gy1_ = work_.take<R>(N), gy_ = work_.take<R>(N);
        grad_rowdata_ = work_.take<R>(numbers_of<R>(p.num_rowdata, T));
        lanes_ = work_.take<Lane>(T);
        gt0_ = work_.take<double>(T), gt1_ = work_.take<double>(T);
        for (int l = 0; l < T; l++) lanes_[l] = Lane();
        for (ptrdiff_t i = 0; i < N; i++) gy1_[i] = gy_[i] = 0;
        for (ptrdiff_t i = 0; i < numbers_of<R>(p.num_rowdata, T); i++) grad_rowdata_[i] = 0;
        for (ptrdiff_t i = 0; i < N * stages_; i++) gk_[i] = 0;
        times_ = wants_times(s);
        next_ = work_.take<double>(T + LANES<double>);
        for (int l = 0; l < T + LANES<double>; l++) next_[l] = NAN;
        nothing_ = work_.take<R>(D);
        for (int f = 0; f < D; f++) nothing_[f] = 0;
        code_ = straight(p, s);
        if (code_) make_tapes();
    }
    static size_t bytes(const Program& p, const nd_solve& s, int T) {
        size_t all = size_t(s.stages + s.extra), n = numbers_of<R>(p.size, T);
        return Interpreter<R>::bytes(p, T, int(all), true) + 2 * DenseOutput::bytes(s, p.size) + Tile<R>::bytes(p, s, T) +
               Workspace::size_of<R>(numbers_of<R>(p.rows_saved, T) * all) +
               Workspace::size_of<R>(numbers_of<R>(p.rows_cotangent, T) * all) +
               Workspace::size_of<R>(numbers_of<R>(p.rows_forward > p.rows_backward ? p.rows_forward : p.rows_backward, T)) +
               Workspace::size_of<R>(n * all) + 2 * Workspace::size_of<R>(n) +
               Workspace::size_of<R>(numbers_of<R>(p.num_rowdata, T)) +
               Workspace::size_of<Lane>(T) + 2 * Workspace::size_of<double>(T) +
               Workspace::size_of<double>(T + LANES<double>) + Workspace::size_of<R>(p.size) +
               tape_bytes(p, s, T) + 4096;
    }
    static bool wants_times(const nd_solve& s) { return s.grad_t0 || s.grad_t1 || s.grad_grid || s.grad_eval; }
    // The program as straight lists, where the way back runs them; null where it is interpreted.
    static const Straight* straight(const Program& p, const nd_solve& s) { return wants_times(s) ? nullptr : p.straight_back; }

    // The widest tile up to T whose rows of a step stay in the first-level cache.
    static int width(const Program& p, const nd_solve& s, int T) {
        constexpr size_t LEVEL_ONE = 32 * 1024;
        const Straight* code = straight(p, s);
        size_t rows = code ? size_t(s.stages + s.extra) * (4 * p.size + code->num_kept + 1) + code->num_spare : 0;
        while (T > LANES<R> && T > 8 && rows * T * sizeof(R) > LEVEL_ONE) T /= 2;
        return T;
    }

    // Numbers that `rows` adds to, and what becomes of them.
    static size_t sums_size(const Program& p, const nd_solve& s, int T) {
        return straight(p, s) ? p.straight_back->accumulators.size() : Interpreter<R>::sums_size(p, T);
    }
    static void flush(const Program& p, const nd_solve& s, int T, const R* sums) {
        R* to = static_cast<R*>(s.accumulators);
        if (!straight(p, s)) return Interpreter<R>::flush(p, T, sums, to);
        for (int32_t accumulator : p.straight_back->accumulators) to[accumulator] += *sums++;
    }

    // Rows order[first], order[first + stride], ... below `end`, none of which failed; adds to `sums` what they give to parameters.
    // `kept`: the stages that the way forward kept are there, and its tiles are the same as these.
    void rows(const int64_t* order, int64_t first, int64_t end, int64_t stride, bool kept, R* sums) {
        in_place_ = kept;
        sums_ = sums;
        for (ptrdiff_t i = 0; code_ && i < ptrdiff_t(code_->accumulators.size()) * T; i++) rows_->sums[i] = 0;
        int64_t next = first;
        while (true) {
            bool refill = !in_place_ || idle() == T; // kept stages: a tile's rows stay together
            for (int l = 0; l < T && refill; l++)
                while (lanes_[l].row < 0 && next < end) take_row(l, order[next]), next += stride;
            if (idle() == T) {
                if (next >= end) break;
                continue;
            }
            patience_.step();
            step();
        }
        for (size_t i = 0; code_ && i < code_->accumulators.size(); i++)
            for (int l = 0; l < T; l++) sums[i] += rows_->sums[ptrdiff_t(i) * T + l];
    }
    int64_t evaluations = 0, products = 0; // of f and of its vector-Jacobian product: by tiles, times live lanes

    static void clear_outputs(const Program& p, nd_solve& s) {
        clear(static_cast<R*>(s.grad_y0), s.rows * p.size);
        clear(static_cast<R*>(s.grad_rowdata), s.rows * p.num_rowdata);
        clear(static_cast<R*>(s.accumulators), p.num_accumulators);
        clear(s.grad_t0, s.rows);
        clear(s.grad_t1, s.rows);
        clear(s.grad_grid, s.points * s.rows);
        clear(s.grad_eval, s.num_eval * s.rows);
    }

  private:
    struct Lane {
        int64_t row = -1, step = -1, output = -1, point = 0; // step: of the trace, or, where stages are kept, the interval's number
    };

    void make_tapes() {
        const R* u = static_cast<const R*>(s.uniforms);
        rows_ = new (work_.take<TapeRows>(1)) TapeRows(*code_, D, T, stages_, work_);
        for (int dense = 0; dense <= (s.grad_ys != nullptr); dense++)
            tapes_[dense] = new (work_.take<BackTape<R>>(1))
                BackTape<R>(*code_, u, method, dense ? stages_ : method.num_before_end(), dense, D, T,
                            {tile.y, tile.y1, tile.k, tile.rowdata}, tile.h, {gk_, gy_, gy1_, grad_rowdata_}, *rows_, work_);
    }
    static size_t tape_bytes(const Program& p, const nd_solve& s, int T) {
        const Straight* code = straight(p, s);
        if (!code) return 0;
        int all = int(s.stages + s.extra);
        return Workspace::size_of<TapeRows>(1) + TapeRows::bytes(*code, p.size, T, all) +
               2 * (Workspace::size_of<BackTape<R>>(1) + BackTape<R>::bytes(*code, p.size, all));
    }

    int idle() const {
        int n = 0;
        for (int l = 0; l < T; l++) n += lanes_[l].row < 0;
        return n;
    }

    template <class X> static void clear(X* to, int64_t n) {
        if (to && n) std::memset(to, 0, sizeof(X) * n);
    }

    const R* grad_ys(int64_t j, int64_t row) const { return static_cast<const R*>(s.grad_ys) + (j * s.rows + row) * D; }

    void take_row(int l, int64_t row) {
        Lane& lane = lanes_[l];
        lane.row = row, lane.output = s.num_eval - 1;
        lane.point = s.grid ? s.points - 2 : 0;
        for (int f = 0; f < D; f++) gy1_[ptrdiff_t(f) * T + l] = s.grad_y1 ? static_cast<const R*>(s.grad_y1)[row * D + f] : R(0);
        if (batch.A) {
            tile.put(tile.rowdata, l, batch.rowdata(row), batch.A);
            for (int i = 0; i < batch.A; i++) grad_rowdata_[ptrdiff_t(i) * T + l] = 0;
        }
        if (s.grid) skip_empty(lane);
        lane.step = trace_.kept ? kept_step(lane) : trace_.last(row);
        next_[l] = time_of_output(lane);
        if (lane.step < 0) end_row(l);
    }
    double time_of_output(const Lane& lane) const { // of the next one on the way back, NaN where there is none
        return s.grad_ys && lane.output >= 0 ? batch.t_eval(lane.output, lane.row) : NAN;
    }

    void skip_empty(Lane& lane) const { // intervals of length zero were no steps
        while (lane.point > 0 && batch.grid(lane.point, lane.row) == batch.grid(lane.point + 1, lane.row)) lane.point--;
    }

    int64_t kept_step(const Lane& lane) const { // the number of the lane's interval, -1 before the first
        bool none = lane.point < 0 || batch.grid(lane.point, lane.row) == batch.grid(lane.point + 1, lane.row);
        return none ? -1 : lane.point;
    }
    bool is_first(const Lane& lane) const {
        if (!trace_.kept) return trace_.at(lane.step)->previous < 0;
        Lane before = lane;
        before.point--;
        skip_empty(before);
        return kept_step(before) < 0;
    }

    void end_row(int l) { // what is left are outputs at the start
        Lane& lane = lanes_[l];
        R* to = static_cast<R*>(s.grad_y0) + lane.row * D;
        tile.get(gy1_, l, to, D);
        for (; s.grad_ys && lane.output >= 0; lane.output--)
            for (int f = 0; f < D; f++) to[f] += grad_ys(lane.output, lane.row)[f];
        if (s.grad_rowdata) tile.get(grad_rowdata_, l, static_cast<R*>(s.grad_rowdata) + lane.row * batch.A, batch.A);
        lane.row = -1, next_[l] = NAN;
        for (int f = 0; f < D; f++) gy1_[ptrdiff_t(f) * T + l] = 0;
    }

    // ---- one step of every lane

    void step() {
        load_times();
        bool dense = dense_inside();
        int n = dense ? stages_ : method.num_before_end();
        R* kept = in_place_ && !times_ && n == method.num_before_end() ? kept_stages() : nullptr;
        if (!kept) load_states();
        std::memset(gk_, 0, sizeof(R) * N * n);
        for (ptrdiff_t i = 0; i < N; i++) gy_[i] = 0;
        for (int l = 0; l < T && times_; l++) gt0_[l] = gt1_[l] = 0;
        if (code_) run_tape(*tapes_[dense]);
        else interpret(n, kept);
        for (int l = 0; l < T; l++)
            if (lanes_[l].row >= 0) leave_step(l);
        for (int l = 0; l < T; l++)
            if (lanes_[l].row >= 0 && lanes_[l].step < 0) end_row(l);
    }
    void run_tape(const BackTape<R>& tape) {
        all_outputs();
        for (int i = 0; tape.reads_time && i < tape.num_stages; i++) tile.write_times(i, tape.time(i));
        tape.run();
        int64_t live = T - idle();
        evaluations += tape.num_stages * live, products += tape.num_stages * live;
    }
    void interpret(int n, R* kept) {
        if (kept) saved_ = kept;
        else replay(n);
        all_outputs();
        end_of_step();
        for (int i = n - 1; i >= 0; i--) stage(i);
        bases_[SAVED] = saved_, bases_[COTANGENT] = cot_, bases_[ROWDATA] = tile.rowdata;
        run.gradient(bases_, n, saved_step_, cot_step_, sums_);
        R* swap = gy_;
        gy_ = gy1_, gy1_ = swap;
    }

    int first_live() const {
        int live = 0;
        while (lanes_[live].row < 0) live++;
        return live;
    }
    void load_times() {
        int live = first_live();
        if (in_place_) {
            int64_t point = lanes_[live].point;
            return tile.set_interval(batch.grid(point, 0), batch.grid(point + 1, 0));
        }
        for (int l = 0; l < T; l++) {
            const Lane& lane = lanes_[lanes_[l].row >= 0 ? l : live];
            if (trace_.kept) {
                tile.t0[l] = batch.grid(lane.point, lane.row), tile.t1[l] = batch.grid(lane.point + 1, lane.row);
                continue;
            }
            const Step* step = trace_.at(lane.step);
            tile.t0[l] = step->t0, tile.t1[l] = step->t1;
        }
        tile.set_lengths();
    }
    // The states at the start, and what else idle lanes repeat.
    void load_states() {
        int live = first_live();
        for (int l = 0; l < T; l++) {
            const Lane& lane = lanes_[lanes_[l].row >= 0 ? l : live];
            if (trace_.kept) {
                const R* y = kept_of(lane.row, lane.point) + trace_.kept_T + lane.row % trace_.kept_T;
                for (int f = 0; f < D; f++) tile.y[ptrdiff_t(f) * T + l] = y[ptrdiff_t(f) * trace_.kept_T];
            } else {
                tile.put(tile.y, l, trace_.at(lane.step)->y, D);
            }
            if (lanes_[l].row < 0) {
                tile.copy_lane(tile.rowdata, live, l, batch.A);
                for (int f = 0; f < D; f++) gy1_[ptrdiff_t(f) * T + l] = 0;
            }
        }
    }
    // SAVED of the first stage of a step on the way forward, whose tile the row was in.
    R* kept_of(int64_t row, int64_t point) const {
        ptrdiff_t stages = method.num_before_end(), size = numbers_of<R>(p.rows_saved, trace_.kept_T);
        return trace_.kept + (row / trace_.kept_T * (s.points - 1) + point) * stages * size;
    }
    R* kept_stages() const { // of the tile's step: its rows are those of a tile on the way forward
        const Lane& lane = lanes_[first_live()];
        return kept_of(lane.row, lane.point);
    }

    double sign(int l) const { return tile.t1[l] >= tile.t0[l] ? 1 : -1; }

    // Whether an output of a live lane lies in its step other than at the end.
    bool dense_inside() const {
        if (!s.grad_ys) return false;
        for (int l = 0; l < T; l++) {
            const Lane& lane = lanes_[l];
            if (lane.row < 0) continue;
            for (int64_t j = lane.output; j >= 0; j--) {
                double t = batch.t_eval(j, lane.row);
                if ((t - tile.t0[l]) * sign(l) <= 0 && !(times_ && t == tile.t0[l])) break;
                if (t != tile.t1[l] || times_) return true;
            }
        }
        return false;
    }

    void replay(int n) {
        if (R* slab = n <= method.stages && !times_ ? slab_of_lanes() : nullptr) {
            saved_ = slab;
            tile.evaluate(0, saved_, bases_); // f at the start, which the step before had
            evaluations += T - idle();
            return;
        }
        saved_ = own_saved_;
        for (int i = 0; i < n; i++) tile.evaluate(i, saved_ + i * saved_step_, bases_);
        evaluations += int64_t(n) * (T - idle());
    }

    // SAVED of the steps that the lanes are in, where the way forward kept all of them and in the same lanes; else null. Idle lanes
    // hold numbers of rows that are needed yet, but under one step, where they are copies of live ones.
    R* slab_of_lanes() const {
        if (!trace_.slabs || trace_.kept_T != T) return nullptr;
        int64_t first = lanes_[0].row >= 0 ? trace_.at(lanes_[0].step)->place : -1;
        if (first < 0 || first % T != 0) return nullptr;
        for (int l = 1; l < T; l++) {
            if (lanes_[l].row < 0 && s.joint) continue;
            if (lanes_[l].row < 0 || trace_.at(lanes_[l].step)->place != first + l) return nullptr;
        }
        return trace_.slabs->at(first / T);
    }

    // Cotangents of the outputs in the lanes' steps, onto the states at their starts (and ends), the stages and the times.
    void all_outputs() {
        if (!s.grad_ys) return;
        if (T == 1 || times_) {
            for (int l = 0; l < T; l++)
                if (lanes_[l].row >= 0) outputs(l);
        } else {
            for (int l = 0; l < T; l += LANES<double>) outputs_of_lanes(l);
        }
    }
    // As many lanes as a vector of doubles has, in rounds: in each the next output of all lanes that have one in their step.
    void outputs_of_lanes(int l) {
        constexpr int L = LANES<double>;
        Doubles t0 = load(tile.t0 + l), t1 = load(tile.t1 + l), next = load(next_ + l);
        auto due = [&] { return t1 >= t0 ? next > t0 : next < t0; };
        Truths wanted = due();
        if (!any<double>(wanted)) return;
        dense_.clear_lanes();
        for (; any<double>(wanted); wanted = due()) { // without branches on the lanes, as on the way forward
            Truths inside = wanted & (next != t1);
            Doubles x = choose<double>(inside, (next - t0) / (t1 - t0), d(0));
            const R* from[L];
            UNROLL for (int i = 0; i < L; i++) {
                Lane& lane = lanes_[l + i];
                bool now = wanted[i] != 0;
                from[i] = now ? grad_ys(lane.output, lane.row) : nothing_;
                lane.output -= now;
                next[i] = now ? time_of_output(lane) : next[i];
            }
            for (int f = 0; f < D; f++) {
                Doubles g = {};
                UNROLL for (int i = 0; i < L; i++) g[i] = from[i][f];
                Doubles within = choose<double>(inside, g, d(0));
                R *end = gy1_ + ptrdiff_t(f) * T + l, *start = gy_ + ptrdiff_t(f) * T + l;
                store_narrow(end, load_doubles(end) + choose<double>(inside, d(0), g));
                store_narrow(start, load_doubles(start) + within);
                dense_.gather_lanes(f, x, within);
            }
        }
        store(next_ + l, next);
        dense_.scatter_lanes(load_doubles(tile.h + l), gk_ + l, T, N);
    }
    void outputs(int l) {
        Lane& lane = lanes_[l];
        bool inside = false, first = is_first(lane);
        for (; s.grad_ys && lane.output >= 0; lane.output--) {
            double t = batch.t_eval(lane.output, lane.row);
            if ((t - tile.t0[l]) * sign(l) < 0 || (t == tile.t0[l] && !(first && times_))) break;
            const R* g = grad_ys(lane.output, lane.row);
            if (t == tile.t1[l] && !times_) {
                for (int f = 0; f < D; f++) gy1_[ptrdiff_t(f) * T + l] += g[f];
            } else {
                if (!inside) begin_dense(l), inside = true;
                dense_output(l, (t - tile.t0[l]) / (tile.t1[l] - tile.t0[l]), g);
            }
        }
        if (inside) dense_.scatter(tile.h[l], gk_ + l, T, N);
    }
    void begin_dense(int l) {
        dense_.clear();
        if (times_) slopes_.form(tile.k + l, T, N);
    }
    void dense_output(int l, double x, const R* g) {
        dense_.gather(x, g);
        for (int f = 0; f < D; f++) gy_[ptrdiff_t(f) * T + l] += g[f];
        if (!times_) return;
        double along = 0, slope = 0; // g . sum_j x^j Q_j, and its derivative by x
        for (int f = 0; f < D; f++) along += double(g[f]) * slopes_.at(f, x), slope += double(g[f]) * slopes_.slope(f, x);
        // y = y0 + h W(x), x = (t - t0) / (t1 - t0): slope is h dW/dx . g / h
        if (s.grad_eval) s.grad_eval[lanes_[l].output * s.rows + lanes_[l].row] += slope;
        gt1_[l] += along - x * slope;
        gt0_[l] += -along - (1 - x) * slope;
    }

    // y1 = y0 + h sum_i b_i k_i.
    void end_of_step() {
        for (ptrdiff_t i = 0; i < N; i++) gy_[i] += gy1_[i];
        for (int j = 0; j < method.stages; j++)
            if (method.b(j) != 0) onto_stage(j, method.b(j), gy1_);
    }

    // gk_j += h w g; and what that makes of the interval's ends.
    void onto_stage(int j, double w, const R* g) {
        R *to = gk_ + j * N, weight = R(w);
        for (ptrdiff_t i = 0; i < N;)
            for (int v = 0; v < T; v += LANES<R>, i += LANES<R>)
                store(to + i, load(to + i) + splat<R>(weight) * load(tile.h + v) * load_loose(g + i));
        if (!times_) return;
        for (int f = 0; f < D; f++)
            for (int l = 0; l < T; l++) {
                ptrdiff_t i = ptrdiff_t(f) * T + l;
                double part = w * double(g[i]) * double(tile.k[j * N + i]);
                gt1_[l] += part, gt0_[l] -= part;
            }
    }

    // The vector-Jacobian product of stage i, from gk_i onto the state at the start and the stages before.
    void stage(int i) {
        R* cot = cot_ + i * cot_step_;
        std::memcpy(cot, gk_ + i * N, D * T * sizeof(R));
        bases_[SAVED] = saved_ + i * saved_step_, bases_[COTANGENT] = cot, bases_[ROWDATA] = tile.rowdata;
        bool before = i > 0 || (in_place_ && saved_ != trace_.kept); // the stage that is next on the way back lies before this one
        if (saved_ != own_saved_ && before) run.fetch_meanwhile(bases_[SAVED] - saved_step_, saved_step_);
        run.backward(bases_);
        products += T - idle();
        if (p.grad_t.present() && times_) {
            const R* g = run.row(bases_, p.grad_t);
            for (int l = 0; l < T; l++) gt0_[l] += (1 - method.c(i)) * double(g[l]), gt1_[l] += method.c(i) * double(g[l]);
        }
        if (p.grad_rowdata.present()) {
            const R* g = run.row(bases_, p.grad_rowdata);
            for (ptrdiff_t j = 0; j < ptrdiff_t(p.num_rowdata) * T; j += LANES<R>)
                store(grad_rowdata_ + j, load(grad_rowdata_ + j) + load_loose(g + j));
        }
        if (!p.grad_y.present()) return;
        const R* g = run.row(bases_, p.grad_y);
        for (ptrdiff_t j = 0; j < N; j += LANES<R>) store(gy_ + j, load(gy_ + j) + load_loose(g + j));
        for (int j = 0; j < i; j++)
            if (method.a(i, j) != 0) onto_stage(j, method.a(i, j), g);
    }

    void leave_step(int l) {
        Lane& lane = lanes_[l];
        int64_t row = lane.row;
        if (s.grid && s.grad_grid) {
            s.grad_grid[lane.point * s.rows + row] += gt0_[l];
            s.grad_grid[(lane.point + 1) * s.rows + row] += gt1_[l];
        }
        if (!s.grid && s.grad_t1 && lane.step == trace_.last(row)) s.grad_t1[row] = gt1_[l];
        if (!s.grid && s.grad_t0 && is_first(lane)) s.grad_t0[row] = gt0_[l];
        lane.point--;
        if (s.grid) skip_empty(lane);
        lane.step = trace_.kept ? kept_step(lane) : trace_.at(lane.step)->previous;
    }

    const Program& p;
    nd_solve& s;
    Batch<R> batch;
    Tableau method;
    const Trace<R>& trace_;
    Patience patience_;
    int stages_;
    Workspace work_;
    Interpreter<R> run;
    Tile<R> tile;
    DenseOutput dense_, slopes_; // cotangents gathered, and the polynomials themselves where gradients of times are wanted
    int T, D;
    ptrdiff_t N;
    bool times_; // whether gradients of times are wanted
    bool in_place_ = false; // whether the stages that the way forward kept are there, in the same tiles
    R* sums_ = nullptr;
    ptrdiff_t saved_step_, cot_step_;
    Bases<R> bases_;
    R *own_saved_, *saved_ = nullptr, *cot_;
    R *gk_, *gy1_, *gy_; // cotangents of the stages, of the state at the step's end, at its start
    R* grad_rowdata_;
    Lane* lanes_;
    double *gt0_, *gt1_; // of the interval's ends
    double* next_; // the time of every lane's next output
    R* nothing_;   // the cotangent of an output that is not there
    typedef typename BackTape<R>::Rows TapeRows;
    const Straight* code_ = nullptr;
    TapeRows* rows_ = nullptr;
    const BackTape<R>* tapes_[2] = {nullptr, nullptr}; // without outputs inside the step, and with
};

} // namespace NEURODE_NAMESPACE
