// Products of bits: C[m][n] = sum over words of popc(A_m & B_n) for the tile of one block.
#pragma once

#include "instructions.cuh"

namespace bae_fast {

// Rows of bits in global memory, from the tile's first row on. Rows past `rows` and words past the
// width are read as zeros.
struct Operand {
  const int* words;
  long long stride;  // in words
  int rows;
};

// What one warp holds of the result; with two planes also the ones of its left rows, two a
// fragment.
template <typename S>
struct Accumulators {
  int c[S::kFragmentsM][S::kFragmentsN][4];
  int ones[S::kFragmentsM][2];
};

// Starts the copies of one operand's rows, 512 bits each from `word` on.
template <int Rows, int Threads>
__device__ __forceinline__ void copy_rows(unsigned* to, const Operand& from, int word, int width,
                                          bool aligned) {
  static_assert(Rows * kStageChunks % Threads == 0, "every thread copies as many chunks");
  const int chunk = thread_index() % kStageChunks, first = word + chunk * kChunkWords;
  const int left_over = width - first;
  const int inside = left_over < 0 ? 0 : left_over < kChunkWords ? left_over : kChunkWords;
#pragma unroll
  for (int part = 0; part < Rows * kStageChunks / Threads; ++part) {
    const int row = (part * Threads + thread_index()) / kStageChunks;
    const int words = row < from.rows ? inside : 0;
    // an address that is not read must still be one of the operand
    const int* const source = words > 0 ? from.words + row * from.stride + first : from.words;
    unsigned* const place = to + chunk_at(row, chunk);
    if (aligned) {
      copy_chunk(place, source, words * 4);
    } else {
#pragma unroll
      for (int w = 0; w < kChunkWords; ++w) {
        copy_word(place + w, w < words ? source + w : from.words, w < words ? 4 : 0);
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void copy_stage(unsigned* stage, const Operand& left,
                                           const Operand (&right)[S::kPlanes], int word, int width,
                                           bool aligned) {
  copy_rows<S::kRows, S::kThreads>(stage, left, word, width, aligned);
#pragma unroll
  for (int plane = 0; plane < S::kPlanes; ++plane) {
    unsigned* const to = stage + (S::kRows + plane * S::kColumns) * kStageWords;
    copy_rows<S::kColumns, S::kThreads>(to, right[plane], word, width, aligned);
  }
}

// The second plane enters as its complement: popc(a & p) + popc(a & ~m) is popc(a & p) -
// popc(a & m) + popc(a), one accumulator for both planes.
template <typename S>
__device__ __forceinline__ void multiply_stage(Accumulators<S>& sums, const unsigned* stage,
                                               int warp_m, int warp_n, int lane) {
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    unsigned a[S::kFragmentsM][4];
#pragma unroll
    for (int m = 0; m < S::kFragmentsM; ++m) {
      const int row = warp_m * S::kWarpRows + m * 16 + left_row(lane);
      load_matrices(a[m], stage + chunk_at(row, left_chunk(slice, lane)));
      if (S::kPlanes == 2) {
        sums.ones[m][0] += count_ones(a[m][0]) + count_ones(a[m][2]);
        sums.ones[m][1] += count_ones(a[m][1]) + count_ones(a[m][3]);
      }
    }
#pragma unroll
    for (int plane = 0; plane < S::kPlanes; ++plane) {
#pragma unroll
      for (int n = 0; n < S::kFragmentsN; n += 2) {
        const int row = S::kRows + plane * S::kColumns + warp_n * S::kWarpColumns + n * 8;
        unsigned b[4];
        load_matrices(b, stage + chunk_at(row + right_row(lane), right_chunk(slice, lane)));
        if (plane == 1) {
#pragma unroll
          for (int r = 0; r < 4; ++r) b[r] = ~b[r];
        }
#pragma unroll
        for (int m = 0; m < S::kFragmentsM; ++m) {
          multiply_bits(sums.c[m][n], a[m], b[0], b[1]);
          multiply_bits(sums.c[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// Leaves the product in the registers of the block's warps, and shared memory free for others.
template <typename S>
__device__ __forceinline__ void product(Accumulators<S>& sums, const Operand& left,
                                        const Operand (&right)[S::kPlanes], int width,
                                        bool aligned) {
  unsigned* const memory = shared_memory();
  const int warp = thread_index() / kLanes, lane = thread_index() % kLanes;
  const int warp_m = warp / S::kWarpsN, warp_n = warp % S::kWarpsN;
#pragma unroll
  for (int m = 0; m < S::kFragmentsM; ++m) {
    sums.ones[m][0] = sums.ones[m][1] = 0;
#pragma unroll
    for (int n = 0; n < S::kFragmentsN; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) sums.c[m][n][r] = 0;
    }
  }
  constexpr int kStride = S::kStageRows * kStageWords;
  const int steps = ceil_div(width, kStageWords);
  // a group is committed at every step, full or empty, so that their number says which has arrived
#pragma unroll
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) {
      copy_stage<S>(memory + step * kStride, left, right, step * kStageWords, width, aligned);
    }
    commit_copies();
  }
  int slot = 0, free_slot = S::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<S::kStages - 2>();
    synchronize();  // everybody's copies are here, and nobody reads the slot that is free now
    const int next = step + S::kStages - 1;
    if (next < steps) {
      copy_stage<S>(memory + free_slot * kStride, left, right, next * kStageWords, width, aligned);
    }
    commit_copies();
    multiply_stage<S>(sums, memory + slot * kStride, warp_m, warp_n, lane);
    free_slot = slot;
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
  }
  wait_copies<0>();
  synchronize();
  if (S::kPlanes == 2) {
    // the four lanes of a row have counted different words of it
#pragma unroll
    for (int m = 0; m < S::kFragmentsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums.ones[m][half] += shuffle_xor(sums.ones[m][half], 1);
        sums.ones[m][half] += shuffle_xor(sums.ones[m][half], 2);
      }
    }
  }
}

}  // namespace bae_fast
