// The engine for avx2. CMakeLists.txt compiles this file alone with that instruction set.
#define NEURODE_NAMESPACE avx2
#define NEURODE_VECTOR_BYTES 32
#include "engine_impl.h"

namespace neurode {
const Engine* engine_avx2(int dtype) { return dtype ? avx2::engine<double>() : avx2::engine<float>(); }
} // namespace neurode
