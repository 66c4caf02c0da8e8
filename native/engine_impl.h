// What abi.cpp calls, for one instruction set: solves, single evaluations, tests.
#pragma once
#include "backward.h"
#include "engine.h"
#include "joint.h"
#include "peak.h"

namespace NEURODE_NAMESPACE {

// ---- single evaluations, tile by tile

template <class R>
void eval(const Program& p, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata, void* out) {
    neurode::Watch watch;
    nd_solve s = {};
    double zero = 0;
    s.rows = rows, s.uniforms = u, s.y0 = y, s.rowdata = rowdata, s.stages = 1, s.t0 = s.t1 = t, s.t0_step = s.t1_step = 1;
    s.a = s.b = s.c = &zero;
    Forward<R> f(p, s, nullptr, tile_width<R>(p, rows), watch);
    for (int64_t first = 0; first < rows; first += f.T) {
        int live = int(rows - first < f.T ? rows - first : f.T);
        for (int l = 0; l < f.T; l++) {
            int64_t row = first + (l < live ? l : 0);
            f.load_lane(l, row, false);
            f.tile.t0[l] = f.tile.t1[l] = t[row];
        }
        f.tile.set_lengths();
        f.tile.evaluate(0, f.saved, f.bases);
        for (int l = 0; l < live; l++) f.tile.get(f.tile.k, l, static_cast<R*>(out) + (first + l) * p.size, p.size);
    }
}

// A vector-Jacobian product is the way back through one Euler step of length one, less the identity.
template <class R>
void vjp(const Program& p, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata, const void* g,
         void* grad_y, void* grad_t, void* grad_rowdata, void* accumulators) {
    int T = tile_width<R>(p, rows);
    size_t D = p.size, A = p.num_rowdata, scratch = p.rows_forward > p.rows_backward ? p.rows_forward : p.rows_backward;
    Workspace work(Interpreter<R>::bytes(p, T, 1, true) +
                   sizeof(R) * T * (p.rows_saved + scratch + p.rows_cotangent + A) +
                   Workspace::size_of<R>(Interpreter<R>::sums_size(p, T)) + 1024);
    Interpreter<R> run(p, static_cast<const R*>(u), T, 1, true, work);
    size_t size = Interpreter<R>::sums_size(p, T);
    R* sums = work.take<R>(size);
    std::memset(sums, 0, size * sizeof(R));
    Bases<R> bases;
    bases[SAVED] = work.take<R>(size_t(p.rows_saved) * T), bases[SCRATCH] = work.take<R>(scratch * T);
    bases[COTANGENT] = work.take<R>(size_t(p.rows_cotangent) * T), bases[ROWDATA] = work.take<R>(A * T);
    const R *ys = static_cast<const R*>(y), *gs = static_cast<const R*>(g), *as = static_cast<const R*>(rowdata);
    auto write = [&](neurode::Place at, void* to, size_t n, int64_t row, int l) {
        if (!to) return;
        for (size_t i = 0; i < n; i++)
            static_cast<R*>(to)[row * n + i] = at.present() ? run.row(bases, at)[i * T + l] : R(0);
    };
    for (int64_t first = 0; first < rows; first += T) {
        int live = int(rows - first < T ? rows - first : T);
        for (int l = 0; l < T; l++) {
            int64_t row = first + (l < live ? l : 0);
            bases[SAVED][l] = R(t[row]);
            for (size_t i = 0; i < D; i++) bases[SAVED][(1 + i) * T + l] = ys[row * D + i];
            for (size_t i = 0; i < D; i++) bases[COTANGENT][i * T + l] = l < live ? gs[row * D + i] : R(0);
            for (size_t i = 0; i < A; i++) bases[ROWDATA][i * T + l] = as[row * A + i];
        }
        run.forward(bases);
        run.backward(bases);
        run.gradient(bases, 1, 0, 0, sums);
        for (int l = 0; l < live; l++) {
            write(p.grad_y, grad_y, D, first + l, l);
            write(p.grad_t, grad_t, 1, first + l, l);
            write(p.grad_rowdata, grad_rowdata, A, first + l, l);
        }
    }
    if (!accumulators) return;
    for (int i = 0; i < p.num_accumulators; i++) static_cast<R*>(accumulators)[i] = 0;
    Interpreter<R>::flush(p, T, sums, static_cast<R*>(accumulators));
}

// ---- solves

// Evaluations of f for one row: known on a fixed grid, guessed otherwise.
inline double evaluations_of(const nd_solve& s) { return double(s.stages) * (s.grid ? s.points - 1 : 10); }

// Room for the stages of all steps of a fixed grid, where it fits the memory that the caller gives.
template <class R> void keep_stages(const Program& p, const nd_solve& s, int T, Trace<R>& trace) {
    size_t tiles = size_t((s.rows + T - 1) / T), stages = size_t(s.fsal ? s.stages - 1 : s.stages);
    size_t bytes = tiles * (s.points - 1) * stages * numbers_of<R>(p.rows_saved, T) * sizeof(R);
    if (!bytes || bytes > size_t(s.memory)) return;
    trace.kept = static_cast<R*>(neurode::take_block(bytes, &trace.kept_capacity));
    trace.kept_T = T;
}

// The same for adaptive steps, whose number is not known before: as many as fit.
template <class R> void keep_attempts(const Program& p, const nd_solve& s, int T, Trace<R>& trace) {
    trace.slabs = new Slabs<R>(T, s.stages * numbers_of<R>(p.rows_saved, T), s.memory);
    trace.kept_T = T;
}

template <class R> void solve_forward(const Program& p, nd_solve& s, neurode::Watch& watch) {
    int T = tile_width<R>(p, s.rows);
    int64_t tiles = (s.rows + T - 1) / T;
    bool joint = s.joint && !s.grid;
    int threads = joint ? 1 : threads_for(s.threads, tiles, cost_of(p.forward) * s.rows * evaluations_of(s));
    Trace<R>* trace = s.keep ? new Trace<R>(s.rows, p.size, threads) : nullptr;
    s.trace = trace;
    for (int64_t row = 0; row < s.rows; row++) s.evaluations[row] = s.accepted[row] = s.rejected[row] = 0;
    if (trace && s.grid && s.grid_row_step == 0 && !p.straight) keep_stages(p, s, T, *trace);
    // Rows with steps of their own are dealt to threads in another order on the way back.
    if (trace && !s.grid && (joint || threads == 1) && !p.straight) keep_attempts(p, s, T, *trace);
    if (joint) {
        Forward<R> f(p, s, trace, T, watch);
        return Joint<R>(f, trace).solve();
    }
    neurode::Queue starts, queue;
    if (s.grid)
        return team(threads, watch, [&](int worker) { Forward<R>(p, s, trace, T, watch, worker).fixed(queue); });
    Workspace work(Workspace::size_of<R>(s.rows * p.size) + Workspace::size_of<double>(s.rows));
    R* f0 = s.fsal ? work.take<R>(s.rows * p.size) : nullptr;
    double* lengths = work.take<double>(s.rows);
    if (threads == 1) {
        Forward<R> f(p, s, trace, T, watch);
        f.first_steps(starts, f0, lengths);
        return f.adaptive(queue, f0, lengths);
    }
    team(threads, watch, [&](int worker) { Forward<R>(p, s, trace, T, watch, worker).first_steps(starts, f0, lengths); });
    team(threads, watch, [&](int worker) { Forward<R>(p, s, trace, T, watch, worker).adaptive(queue, f0, lengths); });
}

constexpr int64_t MOST_PARTS = 64;                 // of a batch, each with parameter gradients of its own
constexpr size_t MOST_SUMS = size_t(64) << 20;     // bytes that these may take

// Where rows share their steps, tiles are gathered in parts whatever the number of threads, and the parts are added in order: so the
// gradients do not depend on it. Rows with their own steps are dealt to the threads in turn, so that each has long and short ones.
template <class R> void solve_backward(const Program& p, nd_solve& s, neurode::Watch& watch) {
    const Trace<R>& trace = *static_cast<const Trace<R>*>(s.trace);
    Backward<R>::clear_outputs(p, s);
    Workspace list(Workspace::size_of<int64_t>(s.rows));
    int64_t *order = list.take<int64_t>(s.rows), live = 0;
    for (int64_t row = 0; row < s.rows; row++)
        if (s.status[row] == ND_SUCCESS) order[live++] = row;
    int T = Backward<R>::width(p, s, tile_width<R>(p, live));
    bool kept = trace.kept && live == s.rows && trace.kept_T == T; // tiles as on the way forward
    int64_t tiles = (live + T - 1) / T;
    size_t size = Workspace::size_of<R>(Backward<R>::sums_size(p, s, T)) / sizeof(R);
    double cost = (cost_of(p.forward) + cost_of(p.backward) + cost_of(p.gradient)) * live * evaluations_of(s);
    int threads = threads_for(s.threads, tiles, cost);
    int64_t parts = threads;
    bool shared = s.grid || s.joint;
    if (shared) {
        int64_t fit = int64_t(MOST_SUMS / (size * sizeof(R) + 1)) + 1;
        parts = tiles < MOST_PARTS ? tiles : MOST_PARTS;
        parts = parts < fit ? parts : fit;
        if (parts < 1) parts = 1; // every row has failed: sums of nothing
    }
    // One thread adds every part to those behind it at once, and so needs room for two.
    bool at_once = threads == 1;
    int64_t held = at_once && parts > 2 ? 2 : parts;
    Workspace work(held * size * sizeof(R));
    R* sums = work.take<R>(held * size); // the last part's, and in the end all of them
    auto place = [&](int64_t i) { return sums + (at_once ? int64_t(i + 1 < parts) : parts - 1 - i) * ptrdiff_t(size); };
    auto add = [&](const R* part) {
        for (size_t j = 0; j < size; j += LANES<R>) store(sums + j, load(sums + j) + load(part + j));
    };
    neurode::Queue queue;
    neurode::Tally evaluations, products;
    team(threads, watch, [&](int) {
        Backward<R> back(p, s, trace, T, watch);
        for (int64_t taken; (taken = queue.take()) < parts;) {
            int64_t i = parts - 1 - taken; // the last first: what the way forward kept of it is nearest
            R* own = place(i);
            std::memset(own, 0, size * sizeof(R));
            int64_t end = (i + 1) * tiles / parts * T;
            if (shared) back.rows(order, i * tiles / parts * T, end < live ? end : live, 1, kept, own);
            else back.rows(order, i, live, parts, false, own);
            if (at_once && own != sums) add(own);
        }
        evaluations.add(back.evaluations), products.add(back.products);
    });
    for (int64_t i = parts - 2; i >= 0 && !at_once; i--) add(place(i));
    Backward<R>::flush(p, s, T, sums);
    s.backward_evaluations = evaluations.total(), s.backward_products = products.total();
}

template <class R> void free_trace(void* trace) { delete static_cast<Trace<R>*>(trace); }

template <class R> void run_micro(int op, void* out, const void* a, const void* b, const void* c, int64_t n) {
    micro<R>(op)(static_cast<R*>(out), static_cast<const R*>(a), static_cast<const R*>(b), static_cast<const R*>(c), n);
}

template <class R> const neurode::Engine* engine() {
    static const neurode::Engine e = {eval<R>,       vjp<R>,       solve_forward<R>, solve_backward<R>,
                                      free_trace<R>, run_micro<R>, multiply_adds<R>};
    return &e;
}

} // namespace NEURODE_NAMESPACE
