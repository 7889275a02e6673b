// Chooses the kernels once, by what the CPU says it has; compiled for any CPU.
#include "dispatch.h"

namespace bae_fast {
namespace {

const Kernels& table(Simd level) {
#if defined(__x86_64__)
  if (level == Simd::kAvx512) return kAvx512Kernels;
  if (level == Simd::kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (level == Simd::kNeon) return kNeonKernels;
#endif
  (void)level;
  return kScalarKernels;
}

const Kernels*& current() {
  static const Kernels* chosen = &table(best_simd());
  return chosen;
}

}  // namespace

bool has_simd(Simd level) {
  if (level == Simd::kScalar) return true;
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the wide registers
  if (level == Simd::kAvx2) return __builtin_cpu_supports("avx2");
  if (level == Simd::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vpopcntdq");
  }
#elif defined(__aarch64__)
  if (level == Simd::kNeon) return true;
#endif
  return false;
}

Simd best_simd() {
  for (Simd level : {Simd::kAvx512, Simd::kAvx2, Simd::kNeon}) {
    if (has_simd(level)) return level;
  }
  return Simd::kScalar;
}

void set_simd(Simd level) { current() = &table(level); }

const Kernels& kernels() { return *current(); }

}  // namespace bae_fast
