// One block of memory, handed out in parts.
#pragma once
#include "memory.h"
#include "simd.h"

namespace NEURODE_NAMESPACE {

// Hands out parts of one block, which goes back when this goes out of scope.
class Workspace {
  public:
    explicit Workspace(size_t bytes) { base_ = static_cast<char*>(neurode::take_block(bytes + 64, &capacity_)); }
    ~Workspace() { neurode::give_block(base_, capacity_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    template <class T> T* take(size_t n) {
        T* part = reinterpret_cast<T*>(base_ + used_);
        used_ += size_of<T>(n);
        return part;
    }
    template <class T> static constexpr size_t size_of(size_t n) { return (n * sizeof(T) + 63) / 64 * 64; }

  private:
    char* base_;
    size_t capacity_, used_ = 0;
};

} // namespace NEURODE_NAMESPACE
