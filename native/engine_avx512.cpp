// The engine for avx512. CMakeLists.txt compiles this file alone with that instruction set.
#define NEURODE_NAMESPACE avx512
#define NEURODE_VECTOR_BYTES 64
#include "engine_impl.h"

namespace neurode {
const Engine* engine_avx512(int dtype) { return dtype ? avx512::engine<double>() : avx512::engine<float>(); }
} // namespace neurode
