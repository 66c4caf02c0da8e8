#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace neurode {
namespace {

constexpr int KEPT = 16;                       // blocks
constexpr size_t MOST_KEPT = size_t(1) << 30;  // bytes, in all
struct Block {
    void* at;
    size_t capacity;
};
std::mutex guard;
#if !defined(_WIN32)
// A child of `fork` must not find the lock held by a thread that it does not have.
const int at_fork = pthread_atfork([] { guard.lock(); }, [] { guard.unlock(); }, [] { guard.unlock(); });
#endif
Block kept[KEPT];
int num_kept = 0;
size_t bytes_kept = 0;

void* fresh(size_t bytes) {
    // aligned by hand: the pointer that malloc gave stands in front of the block
    char* raw = static_cast<char*>(std::malloc(bytes + 128));
    if (!raw) throw std::bad_alloc();
    char* at = raw + 64 + (64 - (reinterpret_cast<uintptr_t>(raw) & 63)) % 64;
    reinterpret_cast<void**>(at)[-1] = raw;
    return at;
}
void destroy(void* at) { std::free(static_cast<void**>(at)[-1]); }

} // namespace

void* take_block(size_t bytes, size_t* capacity) {
    {
        std::lock_guard<std::mutex> lock(guard);
        int best = -1;
        for (int i = 0; i < num_kept; i++)
            if (kept[i].capacity >= bytes && (best < 0 || kept[i].capacity < kept[best].capacity)) best = i;
        if (best >= 0 && kept[best].capacity <= 4 * bytes + 65536) {
            Block block = kept[best];
            kept[best] = kept[--num_kept];
            bytes_kept -= block.capacity;
            *capacity = block.capacity;
            return block.at;
        }
    }
    *capacity = bytes;
    return fresh(bytes);
}

void give_block(void* at, size_t capacity) {
    {
        std::lock_guard<std::mutex> lock(guard);
        if (num_kept < KEPT && bytes_kept + capacity <= MOST_KEPT) {
            kept[num_kept++] = {at, capacity};
            bytes_kept += capacity;
            return;
        }
    }
    destroy(at);
}

} // namespace neurode
