// Chooses the kernels once, by what the CPU says it has; compiled for any CPU.
#include "dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bae_fast {
namespace {

const Kernels& table(Simd level) {
#if defined(__x86_64__)
  if (level == Simd::kAmx) return kAmxKernels;
  if (level == Simd::kAvx512) return kAvx512Kernels;
  if (level == Simd::kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (level == Simd::kNeon) return kNeonKernels;
#endif
  (void)level;
  return kScalarKernels;
}

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vpopcntdq");
}

// Linux lends the tile registers to a process that asks.
bool has_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  uint32_t a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tile = (d >> 24 & 1) != 0, int8 = (d >> 25 & 1) != 0, bf16 = (d >> 22 & 1) != 0;
  return tile && int8 && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Simd& current() {
  static Simd level = best_simd();
  return level;
}

}  // namespace

bool has_simd(Simd level) {
  if (level == Simd::kScalar) return true;
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the wide registers
  if (level == Simd::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == Simd::kAvx512) return has_avx512();
  if (level == Simd::kAmx) {
    static const bool found = has_avx512() && has_tiles();
    return found;
  }
#elif defined(__aarch64__)
  if (level == Simd::kNeon) return true;
#endif
  return false;
}

Simd best_simd() {
  for (Simd level : {Simd::kAmx, Simd::kAvx512, Simd::kAvx2, Simd::kNeon}) {
    if (has_simd(level)) return level;
  }
  return Simd::kScalar;
}

void set_simd(Simd level) { current() = level; }

Simd current_simd() { return current(); }

const Kernels& kernels() { return table(current()); }

}  // namespace bae_fast
