// What a program must keep to, beyond being readable.
#pragma once
#include <initializer_list>
#include <vector>

#include "program.h"

namespace neurode {

// Null where the program stays within its own spaces, else what is wrong.
const char* check(const Program& program, int64_t num_maps);

} // namespace neurode
