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

// One thread's share of the copies of an operand, made once: in the loop only pointers move. It
// copies one chunk of every `kApart`th row, and rows so far apart have their chunks alike.
template <int Rows, int Threads>
struct Copies {
  static constexpr int kApart = Threads / kStageChunks;
  static_assert(Rows % kApart == 0 && kApart % 8 == 0, "every thread copies as many chunks");
  const int* first;        // the operand's: an address that is not read must still be one of it
  const int* from;         // of the thread's chunk in its first row, at the next stage
  long long step;          // from one of its rows to the next, in words
  int rows, words, place;  // left from its first row and chunk on; where that lies in a stage

  __device__ __forceinline__ Copies(const Operand& operand, int width) {
    const int row = thread_index() / kStageChunks, chunk = thread_index() % kStageChunks;
    first = operand.words;
    from = first + row * operand.stride + chunk * kChunkWords;
    step = kApart * operand.stride;
    rows = operand.rows - row;
    words = width - chunk * kChunkWords;
    place = chunk_at(row, chunk);
  }

  // Starts the copies of the next stage, 512 bits a row.
  template <bool Aligned>
  __device__ __forceinline__ void start(unsigned* stage) {
    const int inside = words < 0 ? 0 : words < kChunkWords ? words : kChunkWords;
    const int* source = from;
#pragma unroll
    for (int part = 0; part < Rows / kApart; ++part) {
      const int count = part * kApart < rows ? inside : 0;
      unsigned* const to = stage + place + part * kApart * kStageWords;
      if (Aligned) {
        copy_chunk(to, count > 0 ? source : first, count * 4);
      } else {
#pragma unroll
        for (int w = 0; w < kChunkWords; ++w) {
          copy_word(to + w, w < count ? source + w : first, w < count ? 4 : 0);
        }
      }
      source += step;
    }
    from += kStageWords;
    words -= kStageWords;
  }
};

// The same for all operands of a product, the left one first.
template <typename S>
struct Stages {
  Copies<S::kRows, S::kThreads> left;
  Copies<S::kColumns, S::kThreads> right, below;  // `below` with two planes only

  __device__ __forceinline__ Stages(const Operand& a, const Operand (&b)[S::kPlanes], int width)
      : left(a, width), right(b[0], width), below(b[S::kPlanes - 1], width) {}

  template <bool Aligned>
  __device__ __forceinline__ void start(unsigned* stage) {
    left.template start<Aligned>(stage);
    right.template start<Aligned>(stage + S::kRows * kStageWords);
    if (S::kPlanes == 2) {
      below.template start<Aligned>(stage + (S::kRows + S::kColumns) * kStageWords);
    }
  }
};

// The second plane enters as its complement: popc(a & p) + popc(a & ~m) is popc(a & p) -
// popc(a & m) + popc(a), one accumulator for both planes.
template <typename S>
__device__ __forceinline__ void multiply_stage(Accumulators<S>& sums, const unsigned* stage,
                                               int warp_m, int warp_n, int lane) {
  // rows of fragments lie 16 apart, where chunks have the same places: one address a slice
  const unsigned* const lefts = stage + warp_m * S::kWarpRows * kStageWords;
  const unsigned* const rights = stage + (S::kRows + warp_n * S::kWarpColumns) * kStageWords;
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    const unsigned* const a_at = lefts + chunk_at(left_row(lane), left_chunk(slice, lane));
    const unsigned* const b_at = rights + chunk_at(right_row(lane), right_chunk(slice, lane));
    unsigned a[S::kFragmentsM][4];
#pragma unroll
    for (int m = 0; m < S::kFragmentsM; ++m) {
      load_matrices(a[m], a_at + m * 16 * kStageWords);
      if (S::kPlanes == 2) {
        sums.ones[m][0] += count_ones(a[m][0]) + count_ones(a[m][2]);
        sums.ones[m][1] += count_ones(a[m][1]) + count_ones(a[m][3]);
      }
    }
#pragma unroll
    for (int plane = 0; plane < S::kPlanes; ++plane) {
#pragma unroll
      for (int n = 0; n < S::kFragmentsN; n += 2) {
        unsigned b[4];
        load_matrices(b, b_at + (plane * S::kColumns + n * 8) * kStageWords);
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
// `Aligned`: rows of all operands start on 16 bytes.
template <typename S, bool Aligned>
__device__ __forceinline__ void product(Accumulators<S>& sums, const Operand& left,
                                        const Operand (&right)[S::kPlanes], int width) {
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
  Stages<S> copies(left, right, width);
  const int steps = ceil_div(width, kStageWords);
  // a group is committed at every step, full or empty, so that their number says which has arrived
#pragma unroll
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) copies.template start<Aligned>(memory + step * kStride);
    commit_copies();
  }
  int slot = 0, free_slot = S::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<S::kStages - 2>();
    synchronize();  // everybody's copies are here, and nobody reads the slot that is free now
    const int next = step + S::kStages - 1;
    if (next < steps) copies.template start<Aligned>(memory + free_slot * kStride);
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
