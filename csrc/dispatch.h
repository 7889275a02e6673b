// The instruction set in use: the best that the CPU has, or the one that was forced.
#pragma once

#include <initializer_list>

#include "kernels.h"

namespace bae_fast {

enum class Simd : int64_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3, kAmx = 4 };

// The best level of this CPU.
Simd best_simd();

// Whether this CPU runs the level.
bool has_simd(Simd level);

// Uses the level from now on; the CPU must have it.
void set_simd(Simd level);

Simd current_simd();

const Kernels& kernels();

}  // namespace bae_fast
