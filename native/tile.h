// T rows of the batch side by side, and the arithmetic of one step on them. Every lane has its own time and step length.
#pragma once
#include "dense.h"
#include "interpreter.h"
#include "tape.h"

namespace NEURODE_NAMESPACE {

// The method's numbers.
struct Tableau {
    const nd_solve& s;
    int stages, extra, all;
    bool fsal;
    explicit Tableau(const nd_solve& solve)
        : s(solve), stages(int(solve.stages)), extra(int(solve.extra)), all(stages + extra), fsal(solve.fsal != 0) {}
    double a(int i, int j) const { return s.a[ptrdiff_t(i) * all + j]; }
    double c(int i) const { return s.c[i]; }
    double b(int i) const { return s.b[i]; }
    bool is_start(int i) const { // whether stage i has the step's own state
        for (int j = 0; j < i; j++)
            if (a(i, j) != 0) return false;
        return true;
    }
    int num_before_end() const { return fsal ? stages - 1 : stages; } // stages that the state at the end depends on

    // Whether the only extra stage is f at the new point, as in the cubic Hermite interpolant: the next step's first stage.
    bool extra_is_end() const {
        bool same = !fsal && extra == 1 && c(stages) == 1;
        for (int j = 0; same && j < stages; j++) same = a(stages, j) == b(j);
        return same;
    }
};

// Width of the tile: two vectors where there are matrix products (fewer loads), four where the matrices are small and rows are many
// (instructions have a cost of their own), up to 64 numbers where operations are short
// (the interpreter's cost is by instruction), never more than the batch fills or than leaves a tile's rows in L2.
template <class R> int straight_width(const neurode::Straight& code, int D) {
    constexpr size_t LEVEL_ONE = 24 * 1024; // of 32 KB; a step of seven stages
    int T = 8 * LANES<R> < 64 ? 8 * LANES<R> : 64;
    size_t rows = 10 * size_t(D) + code.num_spare + code.num_uniform;
    while (T > LANES<R> && T > 8 && rows * T * sizeof(R) > LEVEL_ONE) T /= 2;
    return T;
}

// Batches of a few samples are solved one by one, features in the lanes: with samples in the lanes most of these would idle. A pass
// for one sample takes a fifth to a quarter of a pass for a vector of 16 of them (7-128-128-6, gradients too).
template <class R> bool one_by_one(const Program& program, int64_t rows) {
    return program.has_products && !program.straight && 4 * rows <= (LANES<R> > 4 ? LANES<R> : 4);
}

constexpr size_t NARROW = 24 * 1024;     // of the 32 KB of a first-level cache: measured, 6-32-32-6 in 19 KB gains a tenth
constexpr size_t TILE_BYTES = 512 * 1024; // half of the smaller second-level caches of today's processors
template <class R> int tile_width(const Program& program, int64_t rows) {
    if (one_by_one<R>(program, rows)) return 1;
    // One row of a tiny field waits for its own operations: idle vectors beside it would only take time. Panels are turned in squares.
    constexpr int narrowest = LANES<R> < square(R{}) ? square(R{}) : LANES<R>;
    int least = program.straight && rows <= narrowest ? narrowest : LANES<R> < 8 ? 8 : LANES<R>;
    int most = program.straight ? straight_width<R>(*program.straight, program.size) : program.has_products ? 2 * LANES<R> : 64;
    if (most < least) most = least;
    int T = least;
    size_t bytes = sizeof(R) * (size_t(program.rows_saved) + program.rows_forward + program.rows_cotangent);
    bool narrow = 4 * LANES<R> * bytes <= NARROW && rows >= 16 * LANES<R>;
    if (program.has_products && !program.straight && narrow) most = 4 * LANES<R>;
    while (T < most && T < rows && 2 * T * bytes <= TILE_BYTES) T *= 2;
    return T;
}

// Numbers of so many rows, with room for the rest of a vector behind them where a row is one number: arrays may be written
// vector by vector there.
template <class R> ptrdiff_t numbers_of(ptrdiff_t rows, int T) {
    constexpr int L = LANES<R>;
    return T >= L ? rows * T : (rows * T + 2 * L - 1) / L * L;
}

template <class R> class Tile {
    typedef typename StepTape<R>::Shared Shared;

  public:
    Tile(const Program& program, const Tableau& tableau, Interpreter<R>& interpreter, Workspace& work)
        : method(tableau), D(program.size), T(interpreter.T()), N((ptrdiff_t(D) * T + LANES<R> - 1) / LANES<R> * LANES<R>),
          program_(program), run_(interpreter), dense_(tableau.s, D, work) {
        y = work.take<R>(N), y1 = work.take<R>(N), k = work.take<R>(N * method.all), h = work.take<R>(width(T));
        t0 = work.take<double>(T + LANES<double>), t1 = work.take<double>(T + LANES<double>);
        rowdata = work.take<R>(numbers_of<R>(program.num_rowdata, T));
        for (int l = 0; l < T + LANES<double>; l++) t0[l] = t1[l] = 0;
        for (int l = 0; l < width(T); l++) h[l] = 0;
        for (ptrdiff_t i = 0; i < N; i++) y[i] = y1[i] = 0;
        for (ptrdiff_t i = 0; i < N * method.all; i++) k[i] = 0;
        for (ptrdiff_t i = 0; i < ptrdiff_t(program.num_rowdata) * T; i++) rowdata[i] = 0;
    }
    // Takes the program as a straight list from now on, where it is one. `u` are the uniform numbers.
    void use_tape(const R* u, Workspace& work) {
        if (!program_.straight) return;
        shared_ = new (work.take<Shared>(1)) Shared(*program_.straight, D, T, work);
        u_ = u;
        tape = make_tape({y, y1, k, rowdata}, work);
    }
    const StepTape<R>* make_tape(const Frame<R>& frame, Workspace& work) {
        if (!shared_) return nullptr;
        return new (work.take<StepTape<R>>(1)) StepTape<R>(*program_.straight, u_, method, D, T, frame, h, *shared_, work);
    }
    static size_t tape_bytes(const Program& p, const nd_solve& s) {
        if (!p.straight) return 0;
        return Workspace::size_of<StepTape<R>>(1) + StepTape<R>::bytes(*p.straight, p.size, int(s.stages + s.extra));
    }
    static size_t shared_bytes(const Program& p, int T) {
        return p.straight ? Workspace::size_of<Shared>(1) + Shared::bytes(*p.straight, p.size, T) : 0;
    }
    static size_t bytes(const Program& p, const nd_solve& s, int T) {
        size_t n = numbers_of<R>(p.size, T), all = size_t(s.stages + s.extra);
        return DenseOutput::bytes(s, p.size) + 2 * Workspace::size_of<R>(n) + Workspace::size_of<R>(n * all) +
               Workspace::size_of<R>(width(T)) + 2 * Workspace::size_of<double>(T + LANES<double>) +
               Workspace::size_of<R>(numbers_of<R>(p.num_rowdata, T));
    }

    // ---- rows in and out of lanes

    void put(R* tile, int lane, const R* row, int n) const {
        for (int d = 0; d < n; d++) tile[ptrdiff_t(d) * T + lane] = row[d];
    }
    void get(const R* tile, int lane, R* row, int n) const {
        for (int d = 0; d < n; d++) row[d] = tile[ptrdiff_t(d) * T + lane];
    }
    void copy_lane(R* tile, int from, int to, int n) const {
        for (int d = 0; d < n; d++) tile[ptrdiff_t(d) * T + to] = tile[ptrdiff_t(d) * T + from];
    }
    void set_lengths() {
        for (int l = 0; l < T; l++) h[l] = R(t1[l] - t0[l]);
        for (int l = T; l < width(T); l++) h[l] = h[0];
    }
    void set_interval(double from, double to) { // of all lanes
        for (int l = 0; l < T; l++) t0[l] = from, t1[l] = to;
        for (int l = 0; l < width(T); l++) h[l] = R(to - from);
    }
    // Lengths go by lanes; where features lie in the lanes they are one vector, the same everywhere.
    static int width(int T) { return T > LANES<R> ? T : LANES<R>; }

    // ---- one step

    // The time of stage i in every lane, as the field gets it: exact at both ends.
    void write_times(int stage, R* row) const {
        double c = method.c(stage);
        if (c == 0) for (int l = 0; l < T; l++) row[l] = R(t0[l]);
        else if (c == 1) for (int l = 0; l < T; l++) row[l] = R(t1[l]);
        else for (int l = 0; l < T; l++) row[l] = R(t0[l] + c * (t1[l] - t0[l]));
    }

    // to = y + h sum_j w_j k_j.
    template <class Weight> void combine(int n, Weight weight, R* to) const {
        int used[MAX_STAGES], count = 0;
        R w[MAX_STAGES];
        for (int j = 0; j < n; j++)
            if (weight(j) != 0) w[count] = R(weight(j)), used[count++] = j;
        for (ptrdiff_t i = 0; i < N;)
            for (int v = 0; v < T; v += LANES<R>, i += LANES<R>) {
                if (!count) {
                    store_loose(to + i, load(y + i));
                    continue;
                }
                Vec<R> sum = splat<R>(w[0]) * load(k + used[0] * N + i);
                for (int j = 1; j < count; j++) sum += splat<R>(w[j]) * load(k + used[j] * N + i);
                store_loose(to + i, load(y + i) + load(h + v) * sum);
            }
    }

    // Evaluates stage i: f at its time and state goes to k, and these, where the program is interpreted, to SAVED.
    void evaluate(int stage, R* saved, Bases<R>& bases) {
        if (tape) {
            if (tape->reads_time) write_times(stage, tape->time);
            return tape->stage(stage);
        }
        write_times(stage, saved);
        combine(stage, [&](int j) { return method.a(stage, j); }, saved + T);
        field(saved, bases, k + stage * N);
    }
    // f at the time and state that SAVED holds.
    void field(R* saved, Bases<R>& bases, R* to) {
        bases[SAVED] = saved, bases[ROWDATA] = rowdata;
        run_.forward(bases);
        std::memcpy(to, run_.row(bases, program_.out), D * T * sizeof(R));
    }
    // The state at the end from all stages.
    void finish() {
        if (tape) return tape->finish();
        combine(method.stages, [&](int j) { return method.b(j); }, y1);
    }

    // The state at the end of an attempt: with FSAL that of the last stage.
    void finish_attempt(const R* saved) {
        if (!method.fsal) finish();
        else if (!tape) std::memcpy(y1, saved + T, D * T * sizeof(R));
    }
    // f after an Euler step from t0 to t1, to y1.
    void trial(R* saved, Bases<R>& bases) {
        R* times = tape ? tape->time : saved;
        for (int l = 0; l < T; l++) times[l] = R(t1[l]);
        if (tape) return tape->trial();
        combine(1, [](int) { return 1.0; }, saved + T);
        field(saved, bases, y1);
    }

    // The state at fractions x of the step in one lane: `begin_dense` once a step, then `dense` for every output.
    void begin_dense(int lane) { dense_.form(k + lane, T, N); }
    void dense(double x, int lane, R* row) const {
        for (int d = 0; d < D; d++) row[d] = R(y[ptrdiff_t(d) * T + lane] + double(h[lane]) * dense_.at(d, x));
    }

    // The same for as many lanes as a vector of doubles has, from `lane` on.
    void begin_dense_lanes(int lane) { dense_.form_lanes(k + lane, T, N); }
    Vec<double> dense_lanes(Vec<double> x, int lane, int feature) const {
        return load_doubles(y + ptrdiff_t(feature) * T + lane) + load_doubles(h + lane) * dense_.at_lanes(feature, x);
    }

    static constexpr int MAX_STAGES = 64; // abi.cpp refuses more
    Tableau method;
    int D, T;
    ptrdiff_t N;               // numbers of a state: D rows of T lanes, in whole vectors
    R *y, *y1, *k, *h;         // states at both ends, stages, lengths
    double *t0, *t1;           // the interval of every lane
    R* rowdata;
    const StepTape<R>* tape = nullptr; // of these rows; null: the program is interpreted

  private:
    const Program& program_;
    Interpreter<R>& run_;
    Shared* shared_ = nullptr;
    const R* u_ = nullptr;
    DenseOutput dense_;
};

} // namespace NEURODE_NAMESPACE
