// The rate of the 1-bit matrix instruction: nothing but it, from registers, for ceilings.py.
#include "instructions.cuh"

namespace bae_fast {
constexpr int kIndependent = 8;  // products in flight a warp: none waits for the one before
}

// Every warp multiplies `repeats` x 8 times 16 x 8 x 256 bits. `out` takes one number a thread.
extern "C" __global__ void __launch_bounds__(256) bit_rate(int* out, int repeats) {
  using namespace bae_fast;
  int sums[kIndependent][4] = {};
  const unsigned a[4] = {0x55555555u + threadIdx.x, 0x33333333u, 0x0f0f0f0fu, 0x00ff00ffu};
  for (int turn = 0; turn < repeats; ++turn) {
#pragma unroll
    for (int i = 0; i < kIndependent; ++i) multiply_bits(sums[i], a, 0xffffffffu, threadIdx.x);
  }
  int total = 0;
#pragma unroll
  for (int i = 0; i < kIndependent; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) total += sums[i][r];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
