// Values that the way forward keeps of its steps, in slabs of one size that are never moved.
#pragma once
#include <cstdint>
#include <new>

#include "workspace.h"

namespace NEURODE_NAMESPACE {

// SAVED of all stages of one attempt of a tile of T rows after the other, as long as memory lasts.
template <class R> class Slabs {
  public:
    // `numbers`: of a slab, a multiple of a vector; `memory`: bytes that all of them may take.
    Slabs(int T, ptrdiff_t numbers, int64_t memory)
        : T_(T), numbers_(numbers), most_(memory / int64_t(numbers * sizeof(R))) {}
    ~Slabs() {
        for (int c = 0; c < num_chunks_; c++) neurode::give_block(chunks_[c], capacities_[c]);
    }
    Slabs(const Slabs&) = delete;
    Slabs& operator=(const Slabs&) = delete;

    // The slab `ahead` of the next one, to be written; null where memory does not last.
    R* room(int64_t ahead = 0) {
        int64_t number = count_ + ahead;
        if (number >= most_) return nullptr;
        while (number >= first_of(num_chunks_)) grow();
        return at(number);
    }
    // Where a lane of the next slab is to be found later; -1 where memory does not last.
    int64_t place(int lane) const { return count_ < most_ ? count_ * T_ + lane : -1; }
    // Keeps what was written to the next slab; without it the next attempt writes there again.
    void keep() { count_++; }
    R* at(int64_t number) const {
        int c = 0;
        while (number >= first_of(c + 1)) c++;
        return static_cast<R*>(chunks_[c]) + (number - first_of(c)) * numbers_;
    }

  private:
    static constexpr int64_t FIRST = 8; // slabs of the first chunk; every further chunk holds twice as many
    static constexpr int MOST_CHUNKS = 48;
    static int64_t first_of(int chunk) { return FIRST * ((int64_t(1) << chunk) - 1); }
    void grow() {
        int64_t first = first_of(num_chunks_), end = first_of(num_chunks_ + 1);
        if (end > most_) end = most_;
        if (num_chunks_ == MOST_CHUNKS) throw std::bad_alloc();
        chunks_[num_chunks_] = neurode::take_block((end - first) * numbers_ * sizeof(R), &capacities_[num_chunks_]);
        num_chunks_++;
    }

    int T_;
    ptrdiff_t numbers_;
    int64_t most_, count_ = 0;
    int num_chunks_ = 0;
    void* chunks_[MOST_CHUNKS];
    size_t capacities_[MOST_CHUNKS];
};

} // namespace NEURODE_NAMESPACE
