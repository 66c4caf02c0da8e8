// The engine for neon: 128-bit vectors as for baseline, with the 32 registers and the fused products of 64-bit ARM.
#define NEURODE_NAMESPACE neon
#define NEURODE_VECTOR_BYTES 16
#define NEURODE_NEON 1
#include "engine_impl.h"

namespace neurode {
const Engine* engine_neon(int dtype) { return dtype ? neon::engine<double>() : neon::engine<float>(); }
} // namespace neurode
