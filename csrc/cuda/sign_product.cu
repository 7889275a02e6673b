// Products of packed bits with the signs of V: scale (N (B S)_nj - (n^T S)_j).
//
// B is row-packed, S symmetric and given as rows of its planes P = [V > 0] and M = [V < 0], so both
// operands are contiguous along the features that are summed. B S is the difference of two 1-bit
// products, made in one int32 accumulator with M's complement (product.cuh). The result is exact in
// int64 and rounded to fp32 once, before it is scaled. n^T S is the same product with the binary
// digits of n as rows (`digit_product`): few rows, kept as integers.
#include "product.cuh"
#include "signs.cuh"

namespace bae_fast {

template <typename S, typename Store>
__device__ __forceinline__ void signed_sums(const int* bits, long long bits_stride, int rows,
                                            const int* planes, long long plane_stride,
                                            long long signs_stride, int columns, int width,
                                            int aligned, Store store) {
  const TileAt tile =
      grouped_tile(block_index(), ceil_div(rows, S::kRows), ceil_div(columns, S::kColumns));
  const int row0 = tile.i * S::kRows, column0 = tile.j * S::kColumns;
  Accumulators<S> sums;
  const Operand left{bits + row0 * bits_stride, bits_stride, rows - row0};
  const int* const above = planes + column0 * signs_stride;
  const Operand right[2] = {{above, signs_stride, columns - column0},
                            {above + plane_stride, signs_stride, columns - column0}};
  if (aligned != 0) {
    product<S, true>(sums, left, right, width);
  } else {
    product<S, false>(sums, left, right, width);
  }

  const int warp = thread_index() / kLanes, lane = thread_index() % kLanes;
  const int warp_row = row0 + warp / S::kWarpsN * S::kWarpRows;
  const int warp_column = column0 + warp % S::kWarpsN * S::kWarpColumns;
#pragma unroll
  for (int n = 0; n < S::kFragmentsN; ++n) {
    const int column = warp_column + n * 8 + result_column(lane, 0);
    if (column >= columns) continue;
    store.column(column, column + 1 < columns);
#pragma unroll
    for (int m = 0; m < S::kFragmentsM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + result_row(lane, 2 * half);
        const int ones = sums.ones[m][half];
        if (row < rows) {
          store.pair(row, sums.c[m][n][2 * half] - ones, sums.c[m][n][2 * half + 1] - ones);
        }
      }
    }
  }
}

struct StoreIntegers {
  int* out;
  long long stride;
  int at = 0;
  bool two = false;

  __device__ __forceinline__ void column(int first, bool both) {
    at = first;
    two = both;
  }
  __device__ __forceinline__ void pair(int row, int first, int second) const {
    int* const to = out + row * stride + at;
    to[0] = first;
    if (two) to[1] = second;
  }
};

}  // namespace bae_fast

// The shape's threads and shared memory a block. Strides are in words; `aligned`: rows of both
// operands start on 16 bytes. Where `unless` is given and not zero nothing is made.
extern "C" __global__ void __launch_bounds__(bae_fast::SignShape::kThreads, 1)
    sign_product(const int* bits, long long bits_stride, int rows, const int* planes,
                 long long plane_stride, long long signs_stride, int columns, int width,
                 int aligned, const long long* counts_signs, const long long* n_rows,
                 const float* scale, float* out, long long out_stride, const int* unless) {
  if (unless != nullptr && *unless != 0) return;
  bae_fast::signed_sums<bae_fast::SignShape>(
      bits, bits_stride, rows, planes, plane_stride, signs_stride, columns, width, aligned,
      bae_fast::StoreScaled{out, out_stride, counts_signs, *n_rows, *scale});
}

extern "C" __global__ void __launch_bounds__(bae_fast::DigitShape::kThreads, 1)
    digit_product(const int* bits, long long bits_stride, int rows, const int* planes,
                  long long plane_stride, long long signs_stride, int columns, int width,
                  int aligned, int* out, long long out_stride, const int* unless) {
  if (unless != nullptr && *unless != 0) return;
  bae_fast::signed_sums<bae_fast::DigitShape>(bits, bits_stride, rows, planes, plane_stride,
                                              signs_stride, columns, width, aligned,
                                              bae_fast::StoreIntegers{out, out_stride});
}
