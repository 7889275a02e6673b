// What kernels that write or multiply planes of signs share: 32 x 32 bits turned, where the planes
// lie, and what a product with them becomes.
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

// Takes N (B S) - n^T S of two columns side by side, row by row: exact in int64, rounded to fp32
// once, then scaled.
struct StoreScaled {
  float* out;
  long long stride;
  const long long* counts_signs;
  long long n_rows;
  float scale;
  int at = 0;
  bool two = false;
  long long n_t_s[2] = {0, 0};

  __device__ __forceinline__ void column(int first, bool both) {
    at = first;
    two = both;
    n_t_s[0] = counts_signs[first];
    n_t_s[1] = both ? counts_signs[first + 1] : 0;
  }
  __device__ __forceinline__ float value(int sum, long long of_counts) const {
    return static_cast<float>(n_rows * sum - of_counts) * scale;
  }
  __device__ __forceinline__ void pair(int row, int first, int second) const {
    float* const to = out + row * stride + at;
    const float a = value(first, n_t_s[0]), b = value(second, n_t_s[1]);
    if (two && stride % 2 == 0) {
      store2(to, a, b);
    } else {
      to[0] = a;
      if (two) to[1] = b;
    }
  }
};

}  // namespace bae_fast
