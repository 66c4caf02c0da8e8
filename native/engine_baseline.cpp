// The engine for baseline. CMakeLists.txt compiles this file alone with that instruction set.
#define NEURODE_NAMESPACE baseline
#define NEURODE_VECTOR_BYTES 16
#include "engine_impl.h"

namespace neurode {
const Engine* engine_baseline(int dtype) { return dtype ? baseline::engine<double>() : baseline::engine<float>(); }
} // namespace neurode
