// What this processor and its operating system can run.
#pragma once

namespace neurode {

bool runs_avx2();
bool runs_avx512();

} // namespace neurode
