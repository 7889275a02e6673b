// What kernels that write planes of signs share: 32 x 32 bits turned, and where the planes lie.
#pragma once

#include "instructions.cuh"

namespace bae_fast {

// Transposes 32 x 32 bits, one word a lane: off-diagonal squares of side 16, 8, 4, 2, 1 change
// places (Warren, Hacker's Delight, 2nd ed., section 7-3).
__device__ __forceinline__ unsigned transpose(unsigned word, int lane) {
  unsigned low = 0x0000ffffu;
#pragma unroll
  for (int side = 16; side > 0; side >>= 1) {
    const unsigned other = shuffle_xor(word, side);
    word = (lane & side) != 0 ? (word & ~low) | (other >> side & low)
                              : (word & low) | (other << side & ~low);
    low ^= low << (side >> 1);
  }
  return word;
}

struct Signs {
  int* planes;  // or null: none are kept
  long long plane_stride, stride;
  int words;  // of a row
};

}  // namespace bae_fast
