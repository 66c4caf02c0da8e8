// One block of memory, handed out in parts.
#pragma once
#include "memory.h"
#include "simd.h"
#if defined(__SANITIZE_ADDRESS__)
#define NEURODE_GUARDED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NEURODE_GUARDED 1
#endif
#endif
#if defined(NEURODE_GUARDED)
#include <sanitizer/asan_interface.h>
#endif

namespace NEURODE_NAMESPACE {

// Hands out parts of one block, which goes back when this goes out of scope.
class Workspace {
  public:
    explicit Workspace(size_t bytes) { base_ = static_cast<char*>(neurode::take_block(bytes + 64, &capacity_)); }
    ~Workspace() {
#if defined(NEURODE_GUARDED)
        ASAN_UNPOISON_MEMORY_REGION(base_, capacity_);
#endif
        neurode::give_block(base_, capacity_);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    template <class T> T* take(size_t n) {
        T* part = reinterpret_cast<T*>(base_ + used_);
        used_ += size_of<T>(n);
#if defined(NEURODE_GUARDED)
        if (used_ > capacity_) __builtin_trap(); // the parts are more than was asked for
        std::memset(static_cast<void*>(part), 0xFF, n * sizeof(T));  // NaN: nobody may read what nobody wrote
        ASAN_POISON_MEMORY_REGION(base_ + used_ - GAP, GAP);
#endif
        return part;
    }
    template <class T> static constexpr size_t size_of(size_t n) { return (n * sizeof(T) + 63) / 64 * 64 + GAP; }

  private:
#if defined(NEURODE_GUARDED)
    static constexpr size_t GAP = 64; // between parts, where the address sanitizer keeps watch
#else
    static constexpr size_t GAP = 0;
#endif
    char* base_;
    size_t capacity_, used_ = 0;
};

} // namespace NEURODE_NAMESPACE
