// Pairs counted by popcounts, beside what kernels_shared.h gives every instruction set.
//
// Counting. For a word of row or feature a and `Vector::kLanes` columns b, one word each,
//
//     count_j += popcount(a & b_j)
//
// Lanes are different columns, a is broadcast: no sum across lanes is ever needed. A block of
// kRowsBlock x kRegisters registers of counts stays in registers over all words.
//
// Covariance. V_ij = N n_ij - n_i n_j. While N < 2^15 a lane starts at n_j 2^16 and counts n_ij
// below it: one multiply-add of 16-bit pairs, (n_ij, n_j) . (N, -n_i), gives V in int32. A sum of
// 16 |V| <= N^2 / 4 fits 32 bits there; beyond, V is formed in int64.
//
// Signs. (B S)_nj = popcount(B_n & P_j) - popcount(B_n & M_j) over words of i, P = [V > 0],
// M = [V < 0]; and n^T S = sum_b 2^b (D_b S), D_b the bits of weight 2^b of the counts.

#pragma once

#include "kernels_shared.h"

namespace bae_fast {
namespace {

using Counts = typename Vector::Counts;

constexpr int kRowsBlock = Vector::kRowsBlock;
constexpr int kRegisters = Vector::kRegisters;
constexpr int kLanes = Vector::kLanes;
constexpr int kBlockColumns = kLanes * kRegisters;
static_assert(kStrip % kBlockColumns == 0 && kRowsBlock * kRegisters <= 16);

// ---- counts of pairs ----------------------------------------------------------------------------

// counts[i][j] += (or -= with kSubtract) popcounts of a[i] & b_j over the words.
template <bool kSubtract>
inline __attribute__((always_inline)) void count_pairs(const uint32_t* const* a, int64_t a_step,
                                                       const uint32_t* b, int64_t b_step,
                                                       int64_t words,
                                                       Counts (&counts)[kRowsBlock][kRegisters]) {
  for (int64_t w0 = 0; w0 < words; w0 += Vector::kFlush) {
    const int64_t w1 = words - w0 < Vector::kFlush ? words : w0 + Vector::kFlush;
    typename Vector::Partial partial[kRowsBlock][kRegisters];
#pragma GCC unroll 8
    for (int i = 0; i < kRowsBlock; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; ++j) partial[i][j] = Vector::zero();
    }
    for (int64_t w = w0; w < w1; ++w) {
      typename Vector::Words columns[kRegisters];
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; ++j) columns[j] = Vector::load(b + w * b_step + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRowsBlock; ++i) {
        const typename Vector::Words row = Vector::broadcast(a[i][w * a_step]);
#pragma GCC unroll 8
        for (int j = 0; j < kRegisters; ++j) {
          partial[i][j] = Vector::add_count(partial[i][j], row, columns[j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRowsBlock; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; ++j) {
        const Counts total = Vector::widen(partial[i][j]);
        counts[i][j] =
            kSubtract ? Vector::subtract(counts[i][j], total) : Vector::add(counts[i][j], total);
      }
    }
  }
}

// ---- covariance ---------------------------------------------------------------------------------

inline void store_signs(uint32_t* plane, int64_t stride, int64_t row, int64_t column,
                        uint32_t mask) {
  static_assert(kLanes % 8 == 0);
  __builtin_memcpy(reinterpret_cast<uint8_t*>(plane + row * stride) + column / 8, &mask,
                   kLanes / 8);
}

int64_t covariance_tile(const CovarianceTile& t) {
  const bool narrow = t.n_rows < 1 << 15;
  int64_t total = 0;
  for (int64_t j = t.j0; j < t.j1; j += kBlockColumns) {
    const int64_t i1 = t.upper && t.i1 > j + kBlockColumns ? j + kBlockColumns : t.i1;
    for (int64_t i = t.i0; i < i1; i += kRowsBlock) {
      const bool diagonal = t.upper && i + kRowsBlock > j;  // holds pairs that do not count
      Counts counts[kRowsBlock][kRegisters];
      const uint32_t* a[kRowsBlock];
      for (int r = 0; r < kRowsBlock; ++r) {
        a[r] = t.columns + i + r;
        for (int c = 0; c < kRegisters; ++c) {
          counts[r][c] =
              narrow ? Vector::shifted_counts(t.counts + j + c * kLanes) : Vector::no_counts();
        }
      }
      count_pairs<false>(a, t.stride, t.columns + j, t.stride, t.words, counts);
      if (narrow) {
        Counts sum = Vector::no_counts();
#pragma GCC unroll 8
        for (int r = 0; r < kRowsBlock; ++r) {
#pragma GCC unroll 8
          for (int c = 0; c < kRegisters; ++c) {
            const Counts v =
                Vector::dot_pairs(counts[r][c], static_cast<int32_t>(t.n_rows), t.counts[i + r]);
            const int64_t from = i + r + 1 - (j + c * kLanes);  // first lane that counts
            if (!diagonal || from <= 0) {
              sum = Vector::add_absolute(sum, v);
            } else if (from < kLanes) {
              alignas(64) int32_t lane[kLanes];
              __builtin_memcpy(lane, &v, sizeof(v));
              for (int64_t k = from; k < kLanes; ++k) total += lane[k] < 0 ? -lane[k] : lane[k];
            }
            if (t.above != nullptr) {
              const int64_t column = j + c * kLanes - t.j0;
              store_signs(t.above, t.planes_stride, i + r - t.i0, column, Vector::above_zero(v));
              store_signs(t.below, t.planes_stride, i + r - t.i0, column, Vector::below_zero(v));
            }
          }
        }
        total += Vector::sum_unsigned(sum);
        continue;
      }
      for (int r = 0; r < kRowsBlock; ++r) {
        for (int c = 0; c < kRegisters; ++c) {
          uint32_t n_ij[kLanes], above = 0, below = 0;
          __builtin_memcpy(n_ij, &counts[r][c], sizeof(n_ij));
          const int64_t column = j + c * kLanes;
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t v = t.n_rows * static_cast<int64_t>(n_ij[lane]) -
                              static_cast<int64_t>(t.counts[i + r]) * t.counts[column + lane];
            if (!diagonal || column + lane > i + r) total += v < 0 ? -v : v;
            above |= static_cast<uint32_t>(v > 0) << lane;
            below |= static_cast<uint32_t>(v < 0) << lane;
          }
          if (t.above != nullptr) {
            store_signs(t.above, t.planes_stride, i + r - t.i0, column - t.j0, above);
            store_signs(t.below, t.planes_stride, i + r - t.i0, column - t.j0, below);
          }
        }
      }
    }
  }
  return total;
}

// ---- product with the signs ---------------------------------------------------------------------

// B S for kRowsBlock rows and the strip's 64 columns; planes [words, 64].
inline void sign_product(const uint32_t* const* rows, const uint32_t* above, const uint32_t* below,
                         int64_t words, int32_t (&out)[kRowsBlock][kStrip]) {
  for (int64_t j = 0; j < kStrip; j += kBlockColumns) {
    Counts counts[kRowsBlock][kRegisters];
    for (int r = 0; r < kRowsBlock; ++r) {
      for (int c = 0; c < kRegisters; ++c) counts[r][c] = Vector::no_counts();
    }
    count_pairs<false>(rows, 1, above + j, kStrip, words, counts);
    count_pairs<true>(rows, 1, below + j, kStrip, words, counts);
    for (int r = 0; r < kRowsBlock; ++r) {
      for (int c = 0; c < kRegisters; ++c) {
        __builtin_memcpy(&out[r][j + c * kLanes], &counts[r][c], sizeof(Counts));
      }
    }
  }
}

int64_t backward_scratch(int64_t sign_words) {
  return 2 * sign_words * kStrip * static_cast<int64_t>(sizeof(uint32_t));
}

// Transposes a plane by words: [columns, planes_stride] to [sign_words, 64], zero past the columns.
template <typename T>
inline void transpose_words(const BackwardStrip<T>& s, const uint32_t* plane, uint32_t* out) {
  constexpr int64_t kBlock = 16;  // one cache line of each row at a time
  for (int64_t w0 = 0; w0 < s.sign_words; w0 += kBlock) {
    const int64_t w1 = s.sign_words - w0 < kBlock ? s.sign_words : w0 + kBlock;
    for (int64_t j = 0; j < kStrip; ++j) {
      for (int64_t w = w0; w < w1; ++w) {
        out[w * kStrip + j] = j < s.columns ? plane[j * s.planes_stride + w] : 0;
      }
    }
  }
}

template <typename T>
void backward_strip(const BackwardStrip<T>& s) {
  alignas(64) int32_t products[kRowsBlock][kStrip];
  alignas(64) double counts_signs[kStrip] = {};  // n^T S, an integer
  alignas(64) int32_t narrow_counts_signs[kStrip] = {};
  const bool narrow = counts_signs_fit(s);
  ColumnSums<T> sums;
  const uint32_t* rows[kRowsBlock];
  uint32_t* const above = reinterpret_cast<uint32_t*>(s.scratch);
  uint32_t* const below = above + s.sign_words * kStrip;
  if (s.above != nullptr) {
    transpose_words(s, s.above, above);
    transpose_words(s, s.below, below);
    for (int64_t b = 0; b < s.n_digits; b += kRowsBlock) {
      for (int r = 0; r < kRowsBlock; ++r) {
        rows[r] = s.digits + (b + r < s.n_digits ? b + r : s.n_digits - 1) * s.sign_words;
      }
      sign_product(rows, above, below, s.sign_words, products);
      for (int r = 0; r < kRowsBlock && b + r < s.n_digits; ++r) {
        const double weight = static_cast<double>(int64_t{1} << (b + r));
        for (int64_t j = 0; j < kStrip; ++j) counts_signs[j] += weight * products[r][j];
      }
    }
    for (int64_t j = 0; narrow && j < kStrip; ++j) {
      narrow_counts_signs[j] = static_cast<int32_t>(counts_signs[j]);
    }
  }
  for (int64_t n0 = 0; n0 < s.n; n0 += kRowsBlock) {
    if (s.above != nullptr) {
      for (int r = 0; r < kRowsBlock; ++r) {
        rows[r] = s.rows + (n0 + r < s.n ? n0 + r : s.n - 1) * s.rows_stride;
      }
      sign_product(rows, above, below, s.sign_words, products);
    }
    for (int64_t n = n0; n < s.n && n < n0 + kRowsBlock; ++n) {
      if (narrow) {
        backward_row(s, n, products[n - n0], narrow_counts_signs);
      } else {
        backward_row(s, n, products[n - n0], counts_signs);
      }
      sums.add(s.g + n * s.g_stride, s.columns);
    }
  }
  sums.store(s.column_sum, s.columns);
}

void backward_strip_f32(const BackwardStrip<float>& s) { backward_strip(s); }
void backward_strip_f64(const BackwardStrip<double>& s) { backward_strip(s); }

constexpr Kernels make_kernels(const char* name, int64_t product_columns) {
  Kernels k = make_shared_kernels(name, product_columns);
  k.backward_scratch = backward_scratch;
  k.covariance_tile = covariance_tile;
  k.backward_strip_f32 = backward_strip_f32;
  k.backward_strip_f64 = backward_strip_f64;
  return k;
}

}  // namespace
}  // namespace bae_fast
