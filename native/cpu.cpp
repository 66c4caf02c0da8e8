// CPUID read by hand: the compilers' own __builtin_cpu_supports needs a run-time library that Windows does not link.
// Bits as in Intel's Software Developer's Manual, volume 2A, CPUID, and volume 1, 14.3 and 15.2 (detection).
#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#include <cstdint>

namespace neurode {
namespace {

constexpr uint32_t bit(int n) { return uint32_t(1) << n; }
constexpr uint32_t FMA = bit(12), OSXSAVE = bit(27), AVX = bit(28);            // leaf 1, ECX
constexpr uint32_t AVX2 = bit(5), F = bit(16), DQ = bit(17), BW = bit(30), VL = bit(31); // leaf 7, EBX
constexpr uint32_t YMM = bit(1) | bit(2), ZMM = YMM | bit(5) | bit(6) | bit(7); // registers that the system saves

struct Cpu {
    uint32_t basic = 0, extended = 0, saved = 0;
    Cpu() {
        uint32_t a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        basic = c;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) extended = b;
        if (basic & OSXSAVE) { // XGETBV of register 0
            __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
            saved = a;
        }
    }
    bool has(uint32_t in_basic, uint32_t in_extended, uint32_t in_saved) const {
        return (basic & in_basic) == in_basic && (extended & in_extended) == in_extended && (saved & in_saved) == in_saved;
    }
};

const Cpu& cpu() {
    static const Cpu found;
    return found;
}

} // namespace

bool runs_avx2() { return cpu().has(OSXSAVE | AVX | FMA, AVX2, YMM); }
bool runs_avx512() { return cpu().has(OSXSAVE | AVX | FMA, AVX2 | F | DQ | BW | VL, ZMM); }

} // namespace neurode

#else

namespace neurode {
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
} // namespace neurode

#endif
