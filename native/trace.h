// What the way back needs of the way forward: for every row the chain of its accepted steps, the last one first.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

#include "slabs.h"

namespace NEURODE_NAMESPACE {

// Steps of all rows in the order in which they were accepted, in chunks that are never moved; every thread that solves rows has
// a shelf of its own. A step is the interval, the state at its start, the number of the same row's step before (-1: none), and
// where SAVED of its stages is: the slab of its attempt times T, and its lane (-1: not kept).
template <class R> class Trace {
  public:
    struct Step {
        int64_t previous, place;
        double t0, t1;
        R y[1]; // `size` numbers in fact
    };

    Trace(int64_t rows, int size, int num_shelves) : rows_(rows), num_shelves_(num_shelves) {
        step_bytes_ = (offsetof(Step, y) + size * sizeof(R) + 7) / 8 * 8;
        while (step_bytes_ << (shift_ + 1) <= CHUNK) shift_++;
        last_ = static_cast<int64_t*>(std::malloc((rows + 1) * sizeof(int64_t)));
        shelves_ = static_cast<Shelf*>(std::calloc(num_shelves, sizeof(Shelf)));
        if (!last_ || !shelves_) {
            release();
            throw std::bad_alloc();
        }
        for (int64_t i = 0; i < rows; i++) last_[i] = -1;
    }
    ~Trace() { release(); }
    Trace(const Trace&) = delete;
    Trace& operator=(const Trace&) = delete;

    // A new step of `row` on the shelf; the caller writes its state.
    R* add(int shelf, int64_t row, double t0, double t1, int64_t place) {
        Shelf& to = shelves_[shelf];
        if (to.count == to.num_chunks << shift_) grow(to);
        int64_t number = to.count++ * num_shelves_ + shelf;
        Step* step = at(number);
        step->previous = last_[row], step->place = place, step->t0 = t0, step->t1 = t1;
        last_[row] = number;
        return step->y;
    }
    Step* at(int64_t number) const {
        int64_t i = num_shelves_ == 1 ? number : number / num_shelves_;
        const Shelf& shelf = shelves_[num_shelves_ == 1 ? 0 : number % num_shelves_];
        int64_t within = i & ((int64_t(1) << shift_) - 1);
        return reinterpret_cast<Step*>(static_cast<char*>(shelf.chunks[i >> shift_]) + within * step_bytes_);
    }
    int64_t last(int64_t row) const { return last_[row]; }
    int64_t rows() const { return rows_; }

    // SAVED of every stage, `[tile][step][stage]`, of a fixed grid on tiles of T rows; null where it did not fit. Where it did,
    // there are no chains of steps: the grid is all rows', and the first stage's SAVED has the states.
    R* kept = nullptr;
    size_t kept_capacity = 0;
    int kept_T = 0;
    // The same of adaptive steps, by attempts of tiles of T rows; null where nobody wants it.
    Slabs<R>* slabs = nullptr;

  private:
    struct Shelf {
        int64_t count, num_chunks;
        void** chunks;
        size_t* capacities;
        char apart[32]; // from the next thread's
    };
    static constexpr size_t CHUNK = 256 * 1024;
    template <class X> static void lengthen(X*& array, int64_t n) {
        void* longer = std::realloc(array, n * sizeof(X));
        if (!longer) throw std::bad_alloc();
        array = static_cast<X*>(longer);
    }
    void grow(Shelf& to) {
        lengthen(to.chunks, to.num_chunks + 1);
        lengthen(to.capacities, to.num_chunks + 1);
        to.chunks[to.num_chunks] = neurode::take_block(step_bytes_ << shift_, &to.capacities[to.num_chunks]);
        to.num_chunks++;
    }
    void release() {
        for (int s = 0; shelves_ && s < num_shelves_; s++) {
            for (int64_t i = 0; i < shelves_[s].num_chunks; i++)
                neurode::give_block(shelves_[s].chunks[i], shelves_[s].capacities[i]);
            std::free(shelves_[s].chunks);
            std::free(shelves_[s].capacities);
        }
        std::free(shelves_);
        std::free(last_);
        if (kept) neurode::give_block(kept, kept_capacity);
        delete slabs;
    }

    int64_t rows_;
    int num_shelves_;
    int shift_ = 0; // a chunk holds 2^shift steps
    size_t step_bytes_;
    int64_t* last_ = nullptr;
    Shelf* shelves_ = nullptr;
};

} // namespace NEURODE_NAMESPACE
