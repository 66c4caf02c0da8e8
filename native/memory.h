// Memory by the solve: blocks aligned to 64 bytes, kept for the next solve. Fresh pages cost the kernel milliseconds.
#pragma once
#include <cstddef>

namespace neurode {

void* take_block(size_t bytes, size_t* capacity); // at least `bytes`; contents are whatever was there
void give_block(void* block, size_t capacity);

} // namespace neurode
