// Covariance of packed bits: sum |V_ij| and the planes [V > 0], [V < 0] of its sign.
//
//     V_ij = N n_ij - n_i n_j,    n_ij = popc(a_i & a_j),    V_ii = 0 here
//
// a_i is row i of the feature-packed bits. A block makes 128 x 128 of n_ij by 1-bit matrix
// instructions and V from the registers it lies in: in int32 where N^2 < 2^31, in int64 beyond.
// Only tiles that reach the diagonal or lie above it are made; a 32 x 32 square of signs above the
// diagonal is written twice, as it is and transposed, one on the diagonal once. |V| is summed in
// int64, one number a block: no atomics, the same sum in any order.
//
// sign_slab makes the planes for some rows against all columns instead.
#include "product.cuh"
#include "signs.cuh"

namespace bae_fast {

// Widened absolute values of four numbers: below 2^29 in int32, so that four fit 32 bits.
__device__ __forceinline__ unsigned long long sum4(const int (&v)[4]) {
  unsigned sum = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) sum += static_cast<unsigned>(v[k] < 0 ? -v[k] : v[k]);
  return sum;
}
__device__ __forceinline__ unsigned long long sum4(const long long (&v)[4]) {
  unsigned long long sum = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) sum += static_cast<unsigned long long>(v[k] < 0 ? -v[k] : v[k]);
  return sum;
}

// V of one warp's part of a tile: its sum of |V| and its bits, which go to shared memory. With
// `Diagonal` the part meets the diagonal, where offset + row == column.
template <typename Value, bool Diagonal>
__device__ __forceinline__ unsigned long long take_values(Accumulators<PairShape>& sums, Value n,
                                                          int warp_m, int warp_n, int lane,
                                                          int offset, bool signs) {
  using S = PairShape;
  unsigned* const memory = shared_memory();
  const auto* counts = reinterpret_cast<const Value*>(memory + kCountsAt);
  // of the lane's first value; those of others differ by constants
  const int distance = offset + warp_m * S::kWarpRows + result_row(lane, 0) -
                       warp_n * S::kWarpColumns - result_column(lane, 0);
  unsigned long long total = 0;
#pragma unroll
  for (int m = 0; m < S::kFragmentsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_m * S::kWarpRows + m * 16 + result_row(lane, 2 * half);
      const Value minus_ni = -counts[row];
      unsigned above[2] = {0, 0}, below[2] = {0, 0};
#pragma unroll
      for (int f = 0; f < S::kFragmentsN; f += 2) {
        if (sizeof(Value) > 4) {
          // 64 bits of every count and product at once would not fit the registers
          forget_memory();
#pragma unroll
          for (int k = 0; k < 4; ++k) not_before(sums.c[m][f + k / 2][2 * half + k % 2]);
        }
        Value v[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int fragment = f + k / 2, reg = 2 * half + k % 2;
          const int column = warp_n * S::kWarpColumns + fragment * 8 + result_column(lane, reg);
          v[k] = n * static_cast<Value>(sums.c[m][fragment][reg]) +
                 minus_ni * counts[S::kRows + column];
          const int beyond = fragment * 8 + result_column(0, reg) - m * 16 - result_row(0, reg);
          if (Diagonal && distance == beyond) v[k] = 0;
          const unsigned bit = 1u << sign_bit(lane, fragment, reg);
          if (v[k] > 0) above[fragment / 4] |= bit;
          if (v[k] < 0) below[fragment / 4] |= bit;
          if (Diagonal && distance > beyond) v[k] = 0;  // counted where it is mirrored
        }
        total += sum4(v);
      }
      if (signs) {
        // each of a row's four lanes has some bits of four words; each ends with one whole word
        const bool odd = lane_plane(lane) != 0, high = lane_word(lane) != 0;
        unsigned kept[2];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          kept[w] = odd ? below[w] : above[w];
          kept[w] |= shuffle_xor(odd ? above[w] : below[w], 1);
        }
        unsigned word = high ? kept[1] : kept[0];
        word |= shuffle_xor(high ? kept[0] : kept[1], 2);
        memory[sign_at(lane_plane(lane), row, warp_n * 2 + lane_word(lane))] = word;
      }
    }
  }
  return total;
}

// Both planes of a tile from shared memory to row i, column j of the result's tiles.
__device__ __forceinline__ void write_tile(const Signs& to, int i, int j, int n_rows,
                                           bool triangle) {
  const unsigned* const memory = shared_memory();
#pragma unroll
  for (int part = 0; part < kSignWords / PairShape::kThreads; ++part) {
    const int index = part * PairShape::kThreads + thread_index();
    const int word = index % kTileWords, row = index / kTileWords % PairShape::kRows;
    const int plane = index / (kTileWords * PairShape::kRows);
    const int at = i * PairShape::kRows + row, at_word = j * kTileWords + word;
    const bool kept = !triangle || at / kWordBits <= at_word;
    if (kept && at < n_rows && at_word < to.words) {
      to.planes[plane * to.plane_stride + at * to.stride + at_word] =
          static_cast<int>(memory[sign_at(plane, row, word)]);
    }
  }
}

// The squares above the diagonal once more, transposed: a warp takes 32 columns of a plane at once.
__device__ __forceinline__ void write_mirror(const Signs& to, int i, int j, int k) {
  static_assert(kMirrorWords == 4 && 2 * kTileWords % PairShape::kWarps == 0, "");
  const unsigned* const memory = shared_memory();
  const int warp = thread_index() / kLanes, lane = thread_index() % kLanes;
  const int first = i * kMirrorWords;
#pragma unroll
  for (int part = warp; part < 2 * kTileWords; part += PairShape::kWarps) {
    const int plane = part % 2, word = part / 2;
    int turned[kMirrorWords];
#pragma unroll
    for (int r = 0; r < kMirrorWords; ++r) {
      const unsigned here = memory[sign_at(plane, r * kWordBits + lane, word)];
      turned[r] = static_cast<int>(transpose(here, lane));
    }
    const int column_word = j * kTileWords + word, column = column_word * kWordBits + lane;
    if (column >= k) continue;
    int* const row = to.planes + plane * to.plane_stride + column * to.stride + first;
    if (i < j && to.stride % 4 == 0 && to.plane_stride % 4 == 0) {
      store4(row, turned[0], turned[1], turned[2], turned[3]);
      continue;
    }
#pragma unroll
    for (int r = 0; r < kMirrorWords; ++r) {
      if (first + r < column_word) row[r] = turned[r];
    }
  }
}

// Rows `first` .. `first + rows` of V against all k columns, or with `Triangle` the upper triangle.
template <typename Value, bool Triangle>
__device__ __forceinline__ void pairs(const int* features, long long stride, int width,
                                      const long long* counts, const long long* n_rows,
                                      long long* block_sums, const Signs& signs, int first,
                                      int rows, int k) {
  using S = PairShape;
  TileAt tile = triangle_tile(block_index(), k);
  if (!Triangle)
    tile = grouped_tile(block_index(), ceil_div(rows, S::kRows), ceil_div(k, S::kColumns));
  const int row0 = first + tile.i * S::kRows, column0 = tile.j * S::kColumns;
  const int here = rows - tile.i * S::kRows, across = k - column0;
  Accumulators<S> sums;
  const Operand left{features + row0 * stride, stride, here};
  const Operand right[1] = {{features + column0 * stride, stride, across}};
  product<S, true>(sums, left, right, width);

  unsigned* const memory = shared_memory();
  auto* const tile_counts = reinterpret_cast<Value*>(memory + kCountsAt);
  for (int c = thread_index(); c < S::kRows + S::kColumns; c += S::kThreads) {
    const int column = c - S::kRows;
    const bool inside = column < 0 ? c < here : column < across;
    const int at = column < 0 ? row0 + c : column0 + column;
    tile_counts[c] = inside ? static_cast<Value>(counts[at]) : 0;
  }
  synchronize();
  const int warp = thread_index() / kLanes, lane = thread_index() % kLanes;
  const int warp_m = warp / S::kWarpsN, warp_n = warp % S::kWarpsN;
  const Value n = static_cast<Value>(*n_rows);
  const int offset = row0 - column0;
  const bool keep = signs.planes != nullptr;
  unsigned long long total = 0;
  if (!Triangle) {
    // a slab may start anywhere, so its diagonal may cross any warp's part
    take_values<Value, true>(sums, n, warp_m, warp_n, lane, offset, keep);
  } else {
    // 64 x 64 a warp, at multiples of 64: on the diagonal, above it, or below and not needed
    static_assert(S::kWarpRows == S::kWarpColumns, "a warp's part is square");
    const int row = row0 + warp_m * S::kWarpRows, column = column0 + warp_n * S::kWarpColumns;
    if (row == column) {
      total = take_values<Value, true>(sums, n, warp_m, warp_n, lane, offset, keep);
    } else if (row < column) {
      total = take_values<Value, false>(sums, n, warp_m, warp_n, lane, 0, keep);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      const unsigned low = shuffle_xor(static_cast<unsigned>(total), mask);
      const unsigned high = shuffle_xor(static_cast<unsigned>(total >> 32), mask);
      total += static_cast<unsigned long long>(high) << 32 | low;
    }
    if (lane == 0) reinterpret_cast<unsigned long long*>(memory + kSumsAt)[warp] = total;
  }
  synchronize();
  if (Triangle && thread_index() == 0) {
    const auto* parts = reinterpret_cast<const unsigned long long*>(memory + kSumsAt);
    unsigned long long sum = 0;
    for (int w = 0; w < S::kWarps; ++w) sum += parts[w];
    block_sums[block_index()] = static_cast<long long>(2 * sum);
  }
  if (signs.planes == nullptr) return;
  write_tile(signs, tile.i, tile.j, rows, Triangle);
  if (Triangle) write_mirror(signs, tile.i, tile.j, k);
}

}  // namespace bae_fast

// What is started: PairShape's threads and shared memory a block. `planes` may be null in
// `covariance`, `unless` anywhere: where it is not zero nothing is made. Strides are in words.
#define BAE_FAST_PAIRS(name, Value, Triangle)                                                      \
  extern "C" __global__ void __launch_bounds__(bae_fast::PairShape::kThreads,                      \
                                               bae_fast::kPairBlocks)                              \
      name(const int* features, long long stride, int width, const long long* counts,              \
           const long long* n_rows, long long* block_sums, int* planes, long long plane_stride,    \
           long long signs_stride, int words, int first, int rows, int k, const int* unless) {     \
    if (unless != nullptr && *unless != 0) return;                                                 \
    bae_fast::pairs<Value, Triangle>(features, stride, width, counts, n_rows, block_sums,          \
                                     {planes, plane_stride, signs_stride, words}, first, rows, k); \
  }

BAE_FAST_PAIRS(covariance, int, true)
BAE_FAST_PAIRS(covariance_wide, long long, true)
BAE_FAST_PAIRS(sign_slab, int, false)
BAE_FAST_PAIRS(sign_slab_wide, long long, false)
