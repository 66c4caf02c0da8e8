// The C interface: chooses the engine for the processor once, and hands calls to it.
#include "abi.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "cpu.h"
#include "engine.h"

using neurode::Engine;
using neurode::Program;

namespace {

struct Isa {
    const char* name;
    const Engine* (*engine)(int dtype);
    bool (*runs)();
};

// The widest first. NEURODE_ISA names another one to take.
const Isa isas[] = {
#if defined(NEURODE_WITH_AVX512)
    {"avx512", neurode::engine_avx512, neurode::runs_avx512},
#endif
#if defined(NEURODE_WITH_AVX2)
    {"avx2", neurode::engine_avx2, neurode::runs_avx2},
#endif
#if defined(NEURODE_WITH_NEON)
    {"neon", neurode::engine_neon, [] { return true; }}, // every 64-bit ARM has it
#endif
    {"baseline", neurode::engine_baseline, [] { return true; }},
};

// What runs here, and which of it is taken. An unknown name takes the widest, and leaves `name` empty for the caller to see.
struct Choice {
    std::string available, name;
    const Isa* isa = nullptr;
    Choice() {
        const char* wanted = std::getenv("NEURODE_ISA");
        bool any = !wanted || !*wanted;
        for (const Isa& candidate : isas) {
            if (!candidate.runs()) continue;
            available += (available.empty() ? "" : ",") + std::string(candidate.name);
            if (!isa) isa = &candidate;
            if (name.empty() && (any || !std::strcmp(candidate.name, wanted))) isa = &candidate, name = candidate.name;
        }
    }
};

const Choice& choice() {
    static const Choice made;
    return made;
}
const Isa& chosen() { return *choice().isa; }

const Engine& engine_of(const Program& p) { return *chosen().engine(p.dtype); }

thread_local const char* last_error = "";

constexpr int64_t MAX_STAGES = 64; // as in tile.h: the loops keep a step's weights on the stack

// Nothing that C++ throws may reach the caller.
template <class Work> int64_t caught(Work work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        return last_error = "there is not enough memory", ND_FAILED;
    } catch (const neurode::Stopped&) {
        return last_error = "a signal came", ND_STOPPED;
    }
    return ND_DONE;
}
template <class Work> int64_t guarded(const nd_solve& s, Work work) {
    if (s.stages < 1 || s.extra < 0 || s.stages + s.extra > MAX_STAGES)
        return last_error = "the method has more than 64 stages", ND_FAILED;
    return caught([&] {
        neurode::Watch watch;
        work(watch);
    });
}

} // namespace

extern "C" {

int64_t nd_abi(void) { return NEURODE_ABI; }
int64_t nd_sizeof_solve(void) { return sizeof(nd_solve); }
const char* nd_isa(void) { return choice().name.c_str(); }
const char* nd_isas(void) { return choice().available.c_str(); }
const char* nd_team(void) { return neurode::team_name(); }
void nd_python(void* (*save)(void), void (*restore)(void*), int (*check)(void)) { neurode::set_python(save, restore, check); }
const char* nd_error(void) { return last_error; }

void* nd_program_new(const int32_t* words, int64_t n, const int32_t* maps, int64_t num_maps, int64_t dtype) {
    return neurode::decode(words, n, maps, num_maps, int32_t(dtype), &last_error);
}
void nd_program_free(void* program) { neurode::release(static_cast<Program*>(program)); }

int64_t nd_eval(void* program, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata, void* out) {
    const Program& p = *static_cast<Program*>(program);
    return caught([&] { engine_of(p).eval(p, u, rows, t, y, rowdata, out); });
}
int64_t nd_vjp(void* program, const void* u, int64_t rows, const double* t, const void* y, const void* rowdata, const void* g,
            void* grad_y, void* grad_t, void* grad_rowdata, void* accumulators) {
    const Program& p = *static_cast<Program*>(program);
    return caught([&] { engine_of(p).vjp(p, u, rows, t, y, rowdata, g, grad_y, grad_t, grad_rowdata, accumulators); });
}
int64_t nd_forward(void* program, nd_solve* s) {
    const Program& p = *static_cast<Program*>(program);
    s->trace = nullptr;
    int64_t code = guarded(*s, [&](neurode::Watch& watch) { engine_of(p).forward(p, *s, watch); });
    if (code != ND_DONE && s->keep && s->trace) engine_of(p).free_trace(s->trace), s->trace = nullptr;
    if (code != ND_DONE) return code;
    const auto most = [&](const int64_t* counts) { return s->rows && counts ? *std::max_element(counts, counts + s->rows) : 0; };
    s->most_status = most(s->status), s->most_evaluations = most(s->evaluations);
    s->most_accepted = most(s->accepted), s->most_rejected = most(s->rejected);
    return code;
}
int64_t nd_backward(void* program, nd_solve* s) {
    const Program& p = *static_cast<Program*>(program);
    return guarded(*s, [&](neurode::Watch& watch) { engine_of(p).backward(p, *s, watch); });
}
void nd_trace_free(void* program, void* trace) { engine_of(*static_cast<Program*>(program)).free_trace(trace); }
void nd_gather(const void* const* from, const int64_t* bytes, int64_t n, void* to) {
    char* out = static_cast<char*>(to);
    for (int64_t i = 0; i < n; out += bytes[i++]) std::memcpy(out, from[i], size_t(bytes[i]));
}
int64_t nd_same(int (*next)(void*, intptr_t*, void**, void**), void* const* dicts, int64_t n, void* const* entries,
                int64_t count) {
    void* const* const end = entries + 2 * count;
    const auto meets = [&](void* key, void* value) {
        if (entries == end || entries[0] != key || entries[1] != value) return false;
        entries += 2;
        return true;
    };
    for (int64_t i = 0; i < n; i++) {
        intptr_t place = 0;
        for (void *key, *value; next(dicts[i], &place, &key, &value);)
            if (!meets(key, value)) return 0;
        if (!meets(nullptr, nullptr)) return 0;
    }
    return entries == end;
}
int64_t nd_ordered(const double* times, int64_t n, double t0, double t1) {
    const double sign = t1 >= t0 ? 1.0 : -1.0;
    double last = sign * t0;
    for (int64_t i = 0; i < n; ++i) {
        const double t = sign * times[i];
        if (!(t >= last)) return 0;
        last = t;
    }
    return last <= sign * t1;
}
void nd_micro(int64_t dtype, int64_t op, void* out, const void* a, const void* b, const void* c, int64_t n) {
    chosen().engine(int(dtype))->micro(int(op), out, a, b, c, n);
}
double nd_peak(int64_t dtype, int64_t rounds) { return chosen().engine(int(dtype))->multiply_adds(rounds); }

} // extern "C"
