#include "threads.h"

#include <chrono>
#include <cstdlib>
#include <new>
#if defined(_WIN32)
#include <thread>
#include <vector>
#else
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#endif

namespace neurode {
namespace {

// ---- Python

void* (*save)(void) = nullptr;
void (*restore)(void*) = nullptr;
int (*check)(void) = nullptr;

constexpr int64_t BETWEEN_SIGNALS = 50'000; // microseconds from one look at Python's signals to the next

const void* this_thread() { // an address that no other living thread has
    static thread_local char here;
    return &here;
}

// ---- runtimes

typedef void (*Region)(void (*run)(void*), void* data, int threads);

// GCC's runtime, and LLVM's and Intel's, which speak its language too where they can.
typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;
void gomp_region(void (*run)(void*), void* data, int threads) { gomp_parallel(run, data, unsigned(threads), 0); }

// LLVM's runtime in its own language: on macOS it speaks no other.
struct Ident {
    int32_t reserved, flags, more[2];
    const char* source;
};
Ident ident = {0, 2, {0, 0}, ";neurode;on_team;0;0;;"};
typedef void (*KmpcFork)(Ident*, int32_t, void (*)(int32_t*, int32_t*, ...), ...);
KmpcFork kmpc_fork = nullptr;
int32_t (*kmpc_thread)(Ident*) = nullptr;
void (*kmpc_push)(Ident*, int32_t, int32_t) = nullptr;
void kmpc_entry(int32_t*, int32_t*, void (*run)(void*), void* data) { run(data); }
void kmpc_region(void (*run)(void*), void* data, int threads) {
    kmpc_push(&ident, kmpc_thread(&ident), threads);
    kmpc_fork(&ident, 2, reinterpret_cast<void (*)(int32_t*, int32_t*, ...)>(kmpc_entry), run, data);
}

// Threads of our own, started for the occasion: some ten microseconds each, and nothing to survive a fork.
#if defined(_WIN32)
void yield() { std::this_thread::yield(); }
void own_region(void (*run)(void*), void* data, int threads) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(run, data);
    run(data);
    for (std::thread& other : others) other.join();
}
#else
void yield() { sched_yield(); }
void own_region(void (*run)(void*), void* data, int threads) {
    constexpr int MOST = 256;
    struct Call {
        void (*run)(void*);
        void* data;
    } call = {run, data};
    auto enter = [](void* given) -> void* {
        Call& it = *static_cast<Call*>(given);
        it.run(it.data);
        return nullptr;
    };
    pthread_t others[MOST];
    int started = 0;
    while (started < threads - 1 && started < MOST && !pthread_create(&others[started], nullptr, enter, &call)) started++;
    run(data); // where no more threads start, those that there are take the work
    for (int i = 0; i < started; i++) pthread_join(others[i], nullptr);
}
#endif

struct Runtime {
    const char* name = "own threads";
    Region region = own_region;
};

#if !defined(_WIN32)
template <class F> bool find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
    return function != nullptr;
}
std::atomic<bool> forked{false}; // in a child the team's threads do not exist any more, and waiting for them never ends
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Runtime find_runtime() {
    Runtime found;
    (void)at_fork;
    if (std::getenv("NEURODE_OWN_THREADS")) return found;
    if (find(gomp_parallel, "GOMP_parallel")) found.name = "OpenMP (GOMP)", found.region = gomp_region;
    else if (find(kmpc_fork, "__kmpc_fork_call") && find(kmpc_thread, "__kmpc_global_thread_num") &&
             find(kmpc_push, "__kmpc_push_num_threads"))
        found.name = "OpenMP (KMPC)", found.region = kmpc_region;
    return found;
}
#else
const bool forked = false;
Runtime find_runtime() { return {}; }
#endif

const Runtime& runtime() { // looked up at the first need: by then PyTorch has loaded its own
    static const Runtime found = find_runtime();
    return found;
}

// ---- a region of work

struct Job {
    void (*work)(void*, int);
    void* data;
    Watch& watch;
    int most;
    std::atomic<int> workers{0}, busy{0};
    std::atomic<bool> no_memory{false}, stopped{false};
};

void run_job(void* data) {
    Job& job = *static_cast<Job*>(data);
    job.busy++;
    int worker = job.workers++;
    try {
        if (worker < job.most) job.work(job.data, worker);
    } catch (const std::bad_alloc&) {
        job.no_memory = true;
    } catch (const Stopped&) {
        job.stopped = true;
    }
    job.busy--;
    // Signals come to the entering thread: where it has nothing left to do it keeps watching for the others.
    if (job.watch.on_entering_thread())
        while (job.busy > 0) {
            yield();
            job.watch.poll();
        }
}

} // namespace

void set_python(void* (*save_)(void), void (*restore_)(void*), int (*check_)(void)) {
    save = save_, restore = restore_, check = check_;
}

void stop() { throw Stopped(); }

int64_t microseconds() {
    using namespace std::chrono;
    return duration_cast<std::chrono::microseconds>(steady_clock::now().time_since_epoch()).count();
}

Watch::Watch() : released_(save ? save() : nullptr), entered_by_(this_thread()), next_(microseconds() + BETWEEN_SIGNALS) {}
Watch::~Watch() {
    if (released_) restore(released_);
}
bool Watch::on_entering_thread() const { return this_thread() == entered_by_; }
bool Watch::poll() {
    if (!released_ || !on_entering_thread() || stop_ || microseconds() < next_) return stop_;
    restore(released_);
    if (check() != 0) stop_ = true; // the exception stays with this thread until the destructor has come back to it
    released_ = save();
    next_ = microseconds() + BETWEEN_SIGNALS;
    return stop_;
}

int64_t Queue::take() { return next_.fetch_add(1, std::memory_order_relaxed); }
void Tally::add(int64_t n) { total_.fetch_add(n, std::memory_order_relaxed); }
int64_t Tally::total() const { return total_.load(std::memory_order_relaxed); }

void on_team(int threads, Watch& watch, void (*work)(void*, int), void* data) {
    if (threads <= 1) return work(data, 0);
    Job job = {work, data, watch, threads};
    Region region = forked ? own_region : runtime().region;
    region(run_job, &job, threads);
    if (job.no_memory) throw std::bad_alloc();
    if (job.stopped) throw Stopped();
}

const char* team_name() { return forked ? "own threads" : runtime().name; }

} // namespace neurode
