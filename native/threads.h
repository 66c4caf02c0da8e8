// Work on several threads: PyTorch's own OpenMP team where its runtime is found. A pool beside it would fight with that team's
// spinning threads for the cores. Compiled once, for every processor; nothing here is inlined across instruction sets.
#pragma once
#include <atomic>
#include <cstdint>

namespace neurode {

// The way out of a native solve for Ctrl-C and other signals. While a solve runs other Python threads may run too; now and then
// the entering thread takes the interpreter back and lets it handle its signals.
class Watch {
  public:
    Watch();  // lets go of the interpreter
    ~Watch(); // takes it back, with the exception that a handler raised
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

    // For every thread, every few milliseconds: whether to stop.
    bool poll();
    bool on_entering_thread() const;

  private:
    void* released_;
    const void* entered_by_;
    int64_t next_;
    std::atomic<bool> stop_{false};
};
struct Stopped {};
[[noreturn]] void stop(); // throws Stopped: where `poll` says so

// Python's PyEval_SaveThread, PyEval_RestoreThread, PyErr_CheckSignals; without them nothing is let go of and nothing stops a solve.
void set_python(void* (*save)(void), void (*restore)(void*), int (*check)(void));

int64_t microseconds(); // of a clock that never goes back

// The numbers 0, 1, 2, ..., each given to one thread.
class Queue {
  public:
    int64_t take();

  private:
    std::atomic<int64_t> next_{0};
};

// A count that all threads add to.
class Tally {
  public:
    void add(int64_t n);
    int64_t total() const;

  private:
    std::atomic<int64_t> total_{0};
};

// Calls work(data, worker) on up to `threads` threads, the caller's among them, with worker numbers 0, 1, ...; returns when all
// have returned. What `work` throws (std::bad_alloc or Stopped) is thrown here again.
void on_team(int threads, Watch& watch, void (*work)(void* data, int worker), void* data);

const char* team_name(); // which runtime the threads come from

} // namespace neurode
