// What the way back needs of the way forward: for every row the chain of its accepted steps, the last one first.
#pragma once
#include <cstdlib>

#include "workspace.h"

namespace NEURODE_NAMESPACE {

// Steps of all rows in the order in which they were accepted, in chunks that are never moved. A step is the interval, the
// state at its start, and the number of the same row's step before (-1: none).
template <class R> class Trace {
  public:
    struct Step {
        int64_t previous;
        double t0, t1;
        R y[1]; // `size` numbers in fact
    };

    Trace(int64_t rows, int size) : rows_(rows) {
        step_bytes_ = (offsetof(Step, y) + size * sizeof(R) + 7) / 8 * 8;
        while (step_bytes_ << (shift_ + 1) <= CHUNK) shift_++;
        last_ = static_cast<int64_t*>(std::malloc((rows + 1) * sizeof(int64_t)));
        for (int64_t i = 0; i < rows; i++) last_[i] = -1;
    }
    ~Trace() {
        for (int64_t i = 0; i < num_chunks_; i++) neurode::give_block(chunks_[i], capacities_[i]);
        std::free(chunks_);
        std::free(capacities_);
        std::free(last_);
        if (kept) neurode::give_block(kept, kept_capacity);
    }
    Trace(const Trace&) = delete;
    Trace& operator=(const Trace&) = delete;

    // A new step of `row`; the caller writes its state.
    R* add(int64_t row, double t0, double t1) {
        if (count_ == num_chunks_ << shift_) grow();
        Step* step = at(count_);
        step->previous = last_[row], step->t0 = t0, step->t1 = t1;
        last_[row] = count_++;
        return step->y;
    }
    Step* at(int64_t i) const {
        return reinterpret_cast<Step*>(static_cast<char*>(chunks_[i >> shift_]) + (i & ((int64_t(1) << shift_) - 1)) * step_bytes_);
    }
    int64_t last(int64_t row) const { return last_[row]; }
    int64_t rows() const { return rows_; }

    // SAVED of every stage, `[tile][step][stage]`, of a fixed grid on tiles of T rows; null where it did not fit.
    R* kept = nullptr;
    size_t kept_capacity = 0;
    int kept_T = 0;

  private:
    static constexpr size_t CHUNK = 256 * 1024;
    void grow() {
        chunks_ = static_cast<void**>(std::realloc(chunks_, (num_chunks_ + 1) * sizeof(void*)));
        capacities_ = static_cast<size_t*>(std::realloc(capacities_, (num_chunks_ + 1) * sizeof(size_t)));
        chunks_[num_chunks_] = neurode::take_block(step_bytes_ << shift_, &capacities_[num_chunks_]);
        num_chunks_++;
    }

    int64_t rows_, count_ = 0, num_chunks_ = 0;
    int shift_ = 0; // a chunk holds 2^shift steps
    size_t step_bytes_;
    int64_t* last_;
    void** chunks_ = nullptr;
    size_t* capacities_ = nullptr;
};

} // namespace NEURODE_NAMESPACE
