// The engine through its C interface, against the slow reference: every pointwise operation, every instruction, random programs
// with random shapes and numbers, and whole solves with random methods, controls and outputs, both ways.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "../workspace.h"
#include "generate.h"
#include "solve_reference.h"

namespace reference {
namespace {

struct Failure {
    std::string what;
};

struct Counts {
    int64_t numbers = 0, unknown = 0, cases = 0, undecided = 0, solves = 0;
} counts;

template <class R> void compare(const char* what, int64_t i, R got, Bounded<R> wanted) {
    counts.numbers++;
    if (!wanted.known()) counts.unknown++;
    if (wanted.admits(got)) return;
    char text[300];
    std::snprintf(text, sizeof text, "%s[%lld] is %.17g, and should be %.17Lg, give or take %.3Lg", what, (long long)i, double(got),
                  (long double)wanted.v, (long double)wanted.e);
    throw Failure{text};
}
void equal(const char* what, int64_t i, int64_t got, int64_t wanted) {
    counts.numbers++;
    if (got != wanted)
        throw Failure{std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(got) + ", and should be " + std::to_string(wanted)};
}

// A program in the library, and decoded for the reference.
struct Handles {
    void* native;
    Program* decoded;
    Handles(const Generated& g, int dtype) {
        const char* error = "";
        const int32_t* maps = g.maps.data();
        native = nd_program_new(g.words.data(), int64_t(g.words.size()), maps, int64_t(g.maps.size()), dtype);
        if (!native) throw Failure{std::string("a good program was refused: ") + nd_error()};
        decoded = neurode::decode(g.words.data(), int64_t(g.words.size()), maps, int64_t(g.maps.size()), dtype, &error);
    }
    ~Handles() {
        if (native) nd_program_free(native);
        if (decoded) neurode::release(decoded);
    }
};

template <class R> constexpr int dtype_of() { return sizeof(R) == 8; }

template <class R> std::vector<R> numbers(Random& r, int64_t n, double scale = 1) {
    std::vector<R> made;
    for (int64_t i = 0; i < n; i++) made.push_back(R(scale * r.normal()));
    return made;
}
template <class R> void spoil(Random& r, std::vector<R>& numbers) {
    static const double special[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e30, -1e30, 1e-40, 1e-310, 88, -88, 710, 3e9};
    for (R& x : numbers)
        if (r.chance(0.05)) x = R(special[r.below(13)]);
}

// ---- one pointwise operation over arrays

template <class R> void micro_case(Random& r, int op) {
    constexpr int N = 512;
    static R store[4][N] __attribute__((aligned(64)));
    for (int i = 0; i < 3; i++) {
        std::vector<R> x = numbers<R>(r, N, r.of({0.1, 1.0, 10.0, 1000.0}));
        spoil(r, x);
        std::copy(x.begin(), x.end(), store[i]);
    }
    nd_micro(dtype_of<R>(), op, store[3], store[0], store[1], store[2], N);
    for (int i = 0; i < N; i++) {
        if (op == SIN || op == COS || op == TAN) // the reference itself loses angles beyond 2^63
            if (std::fabs(store[0][i]) > 1e9) continue;
        compare<R>(("operation " + std::to_string(op)).c_str(), i, store[3][i], apply<R>(op, Bounded<R>(store[0][i]), Bounded<R>(store[1][i]), Bounded<R>(store[2][i])));
    }
}

// ---- single evaluations and vector-Jacobian products

template <class R> void program_case(Random& r, bool smooth, int only) {
    Generated g = Generator(r, smooth, only).program();
    Handles h(g, dtype_of<R>());
    int rows = r.chance(0.85) ? r.between(1, 12) : r.between(1, 140), D = g.size, A = g.num_rowdata;
    auto u = numbers<R>(r, g.num_uniforms, 0.7), y = numbers<R>(r, int64_t(rows) * D), data = numbers<R>(r, int64_t(rows) * A),
         cotangents = numbers<R>(r, int64_t(rows) * D);
    bool spoiled = r.chance(0.2);
    if (spoiled) spoil(r, y), spoil(r, data);
    std::vector<double> t;
    for (int i = 0; i < rows; i++) t.push_back(r.normal());
    std::vector<R> out(rows * D), gy(rows * D), gt(rows), gdata(rows * A), acc(g.num_accumulators);
    nd_eval(h.native, u.data(), rows, t.data(), y.data(), data.data(), out.data());
    nd_vjp(h.native, u.data(), rows, t.data(), y.data(), data.data(), cotangents.data(), gy.data(), gt.data(), gdata.data(), acc.data());
    Sample<R> sample(*h.decoded, u);
    std::vector<Sum<R>> sums(g.num_accumulators);
    for (int i = 0; i < rows; i++) {
        std::vector<Bounded<R>> state(y.begin() + i * D, y.begin() + (i + 1) * D), cot(cotangents.begin() + i * D, cotangents.begin() + (i + 1) * D);
        std::vector<R> own(data.begin() + i * A, data.begin() + (i + 1) * A);
        auto f = sample.forward(Bounded<R>(R(t[i])), state, own);
        for (int d = 0; d < D; d++) compare<R>("f", i * D + d, out[i * D + d], f[d]);
        auto back = sample.backward(cot, sums);
        for (int d = 0; d < D; d++) compare<R>("grad_y", i * D + d, gy[i * D + d], back.y[d]);
        compare<R>("grad_t", i, gt[i], back.t[0]);
        for (int a = 0; a < A; a++) compare<R>("grad_rowdata", i * A + a, gdata[i * A + a], back.data[a]);
    }
    for (int i = 0; i < g.num_accumulators && !spoiled; i++) compare<R>("accumulators", i, acc[i], sums[i].value());
}

// ---- whole solves

// A random explicit method: not a good one, but one that every loop must follow.
template <class R> void random_method(Random& r, Problem<R>& q, bool adaptive, bool dense) {
    nd_solve& s = q.s;
    s.stages = r.between(1, 6), s.extra = 0;
    s.fsal = s.stages > 1 && r.chance(0.5);
    bool hermite = dense && !s.fsal && r.chance(0.3); // the extra stage is f at the new point
    if (dense) s.extra = hermite ? 1 : r.between(0, 2);
    int n = int(s.stages), all = int(s.stages + s.extra);
    q.a.assign(all * all, 0), q.b.assign(n, 0), q.c.assign(all, 0), q.e.assign(n, 0), q.e2.assign(n, 0);
    int used = s.fsal ? n - 1 : n;
    double total = 0;
    for (int i = 0; i < used; i++) q.b[i] = r.chance(0.2) && i > 0 ? 0 : 0.2 + r.uniform(), total += q.b[i];
    for (double& x : q.b) x /= total;
    for (int i = 1; i < all; i++) {
        double sum = 0;
        for (int j = 0; j < i; j++) q.a[i * all + j] = r.chance(0.2) ? 0 : r.normal() * 0.3, sum += q.a[i * all + j];
        q.c[i] = r.chance(0.2) ? r.of({0.0, 0.5, 1.0}) : sum;
    }
    int end = s.fsal ? n - 1 : hermite ? n : -1;
    for (int j = 0; end >= 0 && j < end; j++) q.a[end * all + j] = j < n ? q.b[j] : 0;
    if (end >= 0) q.c[end] = 1;
    for (double& x : q.e) x = r.normal() * 0.05;
    for (double& x : q.e2) x = r.normal() * 0.05;
    s.degree = r.between(1, 5);
    q.p.assign(all * s.degree, 0);
    for (int i = 0; i < all; i++) { // at x = 1 the weights of the step itself
        double rest = i < n ? q.b[i] : 0;
        for (int j = 1; j < s.degree; j++) q.p[i * s.degree + j] = r.normal() * 0.3, rest -= q.p[i * s.degree + j];
        q.p[i * s.degree] = rest;
    }
    s.a = q.a.data(), s.b = q.b.data(), s.c = q.c.data(), s.p = q.p.data();
    if (adaptive) s.e = q.e.data(), s.e2 = r.chance(0.3) ? q.e2.data() : nullptr;
}

template <class R> void random_control(Random& r, Problem<R>& q, int rows) {
    nd_solve& s = q.s;
    s.joint = r.chance(0.4);
    s.order = r.between(2, 6);
    s.rtol = r.of({1e-1, 1e-2, 1e-3}), s.atol = r.of({1e-1, 1e-2, 1e-3});
    auto wide = [&](std::vector<R>& to, int64_t& row_step, int64_t& step) -> const void* {
        row_step = r.chance(0.5) ? q.size : 0, step = 1;
        for (int i = 0; i < rows * q.size; i++) to.push_back(R(0.001 + 0.05 * r.uniform()));
        return to.data();
    };
    if (r.chance(0.3)) s.rtols = wide(q.rtols, s.rtols_row_step, s.rtols_step);
    if (r.chance(0.3)) s.atols = wide(q.atols, s.atols_row_step, s.atols_step);
    s.proportional = r.of({0.0, 0.3, 0.4}), s.integral = r.of({0.3, 0.7, 1.0}), s.derivative = r.of({0.0, 0.0, 0.1});
    s.safety = 0.9, s.min_factor = 0.2, s.max_factor = r.of({5.0, 10.0});
    s.hold = r.below(2), s.shrink_accepted = r.below(2);
    s.first_step = r.chance(0.5) ? 0.05 + 0.2 * r.uniform() : -1;
    s.min_step = r.chance(0.2) ? 0.02 : 0, s.max_step = r.chance(0.2) ? 0.3 : INFINITY;
    s.stretch = r.of({1.0, 1.01, 1.01});
    s.max_steps = r.chance(0.1) ? 3 : 400;
}

template <class R> void random_times(Random& r, Problem<R>& q, int rows, bool adaptive, bool dense, bool times) {
    nd_solve& s = q.s;
    bool own = (!adaptive || !s.joint) && r.chance(0.4);
    double span = r.of({-1.0, 0.5, 1.0, 2.0});
    int each = own ? rows : 1;
    for (int i = 0; i < each; i++) {
        double direction = own && r.chance(0.3) ? -1 : 1;
        q.t0.push_back(r.normal()), q.t1.push_back(q.t0.back() + direction * span * (0.3 + r.uniform()));
    }
    s.t0 = q.t0.data(), s.t1 = q.t1.data(), s.t0_step = s.t1_step = own;
    if (!adaptive) {
        s.points = r.between(2, 7);
        std::vector<double> fractions = {0};
        for (int i = 1; i < s.points; i++) fractions.push_back(fractions.back() + (i > 1 && r.chance(0.15) ? 0 : 0.1 + r.uniform()));
        for (int i = 0; i < s.points; i++)
            for (int k = 0; k < each; k++) q.grid.push_back(q.t0[k] + (q.t1[k] - q.t0[k]) * fractions[i] / fractions.back());
        s.grid = q.grid.data(), s.grid_point_step = each, s.grid_row_step = own;
    }
    if (!dense) return;
    s.num_eval = r.between(1, 6);
    std::vector<double> fractions;
    for (int j = 0; j < s.num_eval; j++) fractions.push_back(r.chance(0.2) ? (times ? 1 : r.of({0.0, 1.0})) : 0.02 + 0.96 * r.uniform());
    if (r.chance(0.3)) fractions.back() = fractions.front(); // twice the same
    std::sort(fractions.begin(), fractions.end());
    for (double x : fractions)
        for (int k = 0; k < each; k++) {
            double end = adaptive ? q.t1[k] : q.grid[(s.points - 1) * each + k];
            q.t_eval.push_back(x == 1 ? end : q.t0[k] + x * (end - q.t0[k]));
        }
    s.t_eval = q.t_eval.data(), s.eval_point_step = each, s.eval_row_step = own;
}

template <class R> void solve_case(Random& r) {
    Generated g = Generator(r, true).program();
    Handles h(g, dtype_of<R>());
    bool adaptive = r.chance(0.6), dense = r.chance(0.6), times = r.chance(0.4);
    int rows = r.chance(0.85) ? r.between(1, 9) : r.between(1, 40), D = g.size, A = g.num_rowdata;
    Problem<R> q;
    q.size = D, q.num_rowdata = A;
    q.uniforms = numbers<R>(r, g.num_uniforms, 0.7), q.y0 = numbers<R>(r, int64_t(rows) * D), q.rowdata = numbers<R>(r, int64_t(rows) * A);
    nd_solve& s = q.s;
    s.rows = rows, s.threads = r.between(1, 4);
    random_method(r, q, adaptive, dense);
    random_control(r, q, rows);
    if (!adaptive) s.joint = 0;
    random_times(r, q, rows, adaptive, dense, times);
    int bad = !s.joint && r.chance(0.15) ? r.below(rows) : -1;
    if (bad >= 0) q.y0[bad * D + r.below(D)] = R(NAN);
    s.uniforms = q.uniforms.data(), s.y0 = q.y0.data(), s.rowdata = q.rowdata.data();

    size_t E = size_t(s.num_eval), P = size_t(s.points);
    std::vector<R> y1(rows * D), ys(E * rows * D), gy0(rows * D), gdata(rows * A), acc(g.num_accumulators);
    std::vector<double> t_end(rows), gt0(rows), gt1(rows), ggrid(P * rows), geval(E * rows);
    std::vector<int64_t> status(rows), evaluations(rows), accepted(rows), rejected(rows);
    s.y1 = y1.data(), s.ys = ys.data(), s.t_end = t_end.data(), s.status = status.data(), s.evaluations = evaluations.data();
    s.accepted = accepted.data(), s.rejected = rejected.data();
    s.keep = 1, s.memory = r.chance(0.3) ? 0 : r.chance(0.3) ? r.below(1 << 17) : int64_t(1) << 28; // none, some, all stages
    if (nd_forward(h.native, &s)) throw Failure{std::string("forward: ") + nd_error()};
    auto grad_y1 = numbers<R>(r, int64_t(rows) * D), grad_ys = numbers<R>(r, int64_t(E) * rows * D);
    s.grad_y1 = !E || r.chance(0.7) ? grad_y1.data() : nullptr, s.grad_ys = E && r.chance(0.9) ? grad_ys.data() : nullptr;
    s.grad_y0 = gy0.data(), s.grad_rowdata = A ? gdata.data() : nullptr, s.accumulators = acc.data();
    if (times && adaptive) s.grad_t0 = gt0.data(), s.grad_t1 = gt1.data();
    if (times && !adaptive) s.grad_grid = ggrid.data();
    if (times && E) s.grad_eval = geval.data();
    int64_t failed = nd_backward(h.native, &s);
    nd_trace_free(h.native, s.trace);
    if (failed) throw Failure{std::string("backward: ") + nd_error()};

    counts.solves++;
    std::vector<Sum<R>> sums(g.num_accumulators);
    for (int first = 0; first < rows; first += s.joint ? rows : 1) {
        std::vector<int64_t> members;
        for (int i = first; i < (s.joint ? rows : first + 1); i++) members.push_back(i);
        Rows<R> expected(*h.decoded, q, members);
        if (adaptive) expected.adaptive();
        else expected.fixed();
        bool fine = expected.status == ND_SUCCESS;
        if (fine) expected.backward(static_cast<const R*>(s.grad_y1), static_cast<const R*>(s.grad_ys), sums);
        for (size_t m = 0; m < members.size(); m++) {
            int64_t row = members[m];
            equal("status", row, status[row], expected.status);
            if (expected.status != ND_NON_FINITE || adaptive) equal("accepted", row, accepted[row], expected.accepted);
            if (adaptive) equal("rejected", row, rejected[row], expected.rejected);
            for (int d = 0; d < D; d++) {
                int64_t at = row * D + d;
                compare<R>("y1", at, y1[at], fine ? expected.y[m][d] : Bounded<R>(NAN));
                compare<R>("grad_y0", at, gy0[at], fine ? expected.grad_y0[m][d] : Bounded<R>(0));
                for (size_t j = 0; j < E && fine; j++) compare<R>("ys", int64_t(j) * rows * D + at, ys[j * rows * D + at], expected.ys[j][m][d]);
            }
            if (!fine) continue;
            for (int a = 0; a < A; a++) compare<R>("grad_rowdata", row * A + a, gdata[row * A + a], expected.grad_data[m][a]);
            if (!times) continue;
            for (size_t j = 0; j < E && s.grad_ys; j++) compare<R>("grad_eval", int64_t(j) * rows + row, R(geval[j * rows + row]), expected.grad_eval[j][m]);
            if (s.joint) continue; // the ends are shared: the caller adds the rows
            if (adaptive) {
                compare<R>("grad_t0", row, R(gt0[row]), expected.grad_times[0]);
                compare<R>("grad_t1", row, R(gt1[row]), expected.grad_times[1]);
            } else {
                for (size_t i = 0; i < P; i++) compare<R>("grad_grid", int64_t(i) * rows + row, R(ggrid[i * rows + row]), expected.grad_times[i]);
            }
        }
    }
    for (int i = 0; i < g.num_accumulators; i++) compare<R>("accumulators", i, acc[i], sums[i].value());
}

// ---- words that are no program: refused, or run without harm

template <class R> void broken_case(Random& r) {
    Generated g = Generator(r, false).program();
    for (int changes = r.between(1, 3); changes > 0; changes--) {
        auto& words = g.maps.empty() || r.chance(0.8) ? g.words : g.maps;
        words[r.below(int(words.size()))] = r.chance(0.5) ? r.between(-3, 40) : int32_t(r.uniform() * 4294967296.0 - 2147483648.0);
    }
    if (r.chance(0.1)) g.words.resize(r.below(int(g.words.size())));
    void* native = nd_program_new(g.words.data(), int64_t(g.words.size()), g.maps.data(), int64_t(g.maps.size()), dtype_of<R>());
    if (!native) return;
    if (g.words[6] > 100000 || g.words[7] > 100000 || g.words[8] > 100000 || g.words[9] > 100000) return nd_program_free(native);
    int D = g.words[2], U = g.words[3], A = g.words[5], acc = g.words[4], rows = r.between(1, 20);
    std::vector<R> u(U), y(rows * D), data(rows * A), out(rows * D), gt(rows), sums(acc);
    std::vector<double> t(rows);
    nd_eval(native, u.data(), rows, t.data(), y.data(), data.data(), out.data());
    nd_vjp(native, u.data(), rows, t.data(), y.data(), data.data(), out.data(), y.data(), gt.data(), data.data(), sums.data());
    nd_program_free(native);
}

template <class R> void one_case(uint64_t seed) {
    Random r(seed);
    static const int kinds[] = {POINTWISE, GEMM, REDUCE, SAMPLE_PRODUCT};
    double kind = r.uniform();
    if (kind < 0.1) micro_case<R>(r, r.below(NUM_MICROS));
    else if (kind < 0.3) program_case<R>(r, false, kinds[r.below(4)]);
    else if (kind < 0.5) program_case<R>(r, false, 0);
    else if (kind < 0.6) program_case<R>(r, true, 0);
    else if (kind < 0.65) broken_case<R>(r);
    else solve_case<R>(r);
}

struct Options {
    double seconds = 10;
    uint64_t seed = 0;
    int64_t cases = -1;
    std::string isa;
};

uint64_t current = 0;
void say_where() {
    std::printf("STOPPED on %s, seed %llu\nTo see it again: --isa %s --seed %llu --cases 1\n", nd_isa(), (unsigned long long)current,
                nd_isa(), (unsigned long long)current);
    std::fflush(stdout);
}

bool run_case(uint64_t seed) {
    current = seed;
    try {
        seed % 2 ? one_case<double>(seed) : one_case<float>(seed);
    } catch (const Undecided&) {
        counts.undecided++;
    } catch (const Failure& failure) {
        std::printf("FAILED on %s, seed %llu: %s\nTo see it again: --isa %s --seed %llu --cases 1\n", nd_isa(), (unsigned long long)seed,
                    failure.what.c_str(), nd_isa(), (unsigned long long)seed);
        return false;
    }
    counts.cases++;
    return true;
}

bool units() {
    for (int op = 0; op < NUM_MICROS; op++)
        for (int i = 0; i < 4; i++) {
            try {
                Random r(uint64_t(op) * 100 + i);
                micro_case<float>(r, op), micro_case<double>(r, op);
            } catch (const Failure& failure) {
                std::printf("FAILED on %s: %s\n", nd_isa(), failure.what.c_str());
                return false;
            }
        }
    return true;
}

int run(const Options& o) {
#if defined(NEURODE_GUARDED)
    __sanitizer_set_death_callback(say_where);
#endif
    for (int number : {SIGSEGV, SIGFPE, SIGABRT}) std::signal(number, [](int n) { say_where(), std::signal(n, SIG_DFL), std::raise(n); });
    auto start = std::chrono::steady_clock::now();
    auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
    if (o.cases != 1 && !units()) return 1;
    for (int64_t i = 0; o.cases < 0 ? elapsed() < o.seconds : i < o.cases; i++)
        if (!run_case(o.seed + uint64_t(i))) return 1;
    std::printf("%-8s %8lld cases from seed %llu (%lld solves), %lld numbers within their bounds; %.1f %% of them say nothing, "
                "%lld cases undecided; %.0f s\n",
                nd_isa(), (long long)counts.cases, (unsigned long long)o.seed, (long long)counts.solves, (long long)counts.numbers,
                100.0 * double(counts.unknown) / double(std::max<int64_t>(counts.numbers, 1)), (long long)counts.undecided, elapsed());
    return 0;
}

} // namespace
} // namespace reference

int main(int argc, char** argv) {
    reference::Options o;
    bool random = false;
    for (int i = 1; i + 1 < argc; i += 2) {
        std::string name = argv[i], value = argv[i + 1];
        if (name == "--seconds") o.seconds = std::atof(value.c_str());
        else if (name == "--cases") o.cases = std::atoll(value.c_str());
        else if (name == "--isa") o.isa = value;
        else if (name == "--seed" && value == "random") random = true;
        else if (name == "--seed") o.seed = std::strtoull(value.c_str(), nullptr, 10);
        else return std::printf("unknown option %s\n", name.c_str()), 2;
    }
    if (argc % 2 == 0) {
        std::printf("engine_tests [--seconds 10] [--seed 0 | random] [--cases N] [--isa NAME]: all instruction sets of this machine "
                    "in turn, or one.\n");
        return 2;
    }
    if (random) o.seed = uint64_t(std::chrono::system_clock::now().time_since_epoch().count() % 1000000000);
    if (!o.isa.empty()) {
        static std::string setting;
        setting = "NEURODE_ISA=" + o.isa;
        putenv(&setting[0]);
        if (o.isa != nd_isa()) return std::printf("%s is not among %s\n", o.isa.c_str(), nd_isas()), 2;
        return reference::run(o);
    }
    std::string names = nd_isas(); // the choice is made once a process: one process each
    o.seconds /= double(1 + std::count(names.begin(), names.end(), ','));
    for (size_t at = 0; at <= names.size();) {
        size_t end = std::min(names.find(',', at), names.size());
        std::string command = std::string("\"") + argv[0] + "\" --isa " + names.substr(at, end - at) + " --seed " +
                              std::to_string(o.seed) + " --seconds " + std::to_string(o.seconds) + " --cases " + std::to_string(o.cases);
        std::fflush(stdout);
        if (std::system(command.c_str())) return 1;
        at = end + 1;
    }
    return 0;
}
