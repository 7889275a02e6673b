// Products of dense matrices by fused multiply-adds, and what is done to a strip of them at once.
// Written with a struct Fma of vectors of numbers:
//
//     kLanes, kRows       numbers of a vector; rows of a block of sums
//     Numbers             a vector
//     zero, load, store, add      load takes floats, or bf16 numbers
//     broadcast, multiply_add
//     transpose(vectors)  kLanes vectors
//
// Sums of kRows rows and two vectors of columns stay in registers while k runs: a step reads two
// vectors of the right side and broadcasts kRows numbers of the left one. With AVX2 these are 6 and
// 16, in 12 of 16 registers; with AVX-512 12 and 32, in 24 of 32.
//
//     left   [block of k][kRows rows]: number (k, row) at kRows k + row
//     right  [kFmaColumns columns] of one block of k: number (k, column) at kFmaColumns k + column
//
// Two vectors of columns over a block of k, 16 or 32 KiB, stay in the innermost caches while rows
// stream by; kFmaRowsInCache rows and all columns of a strip stay in the next. A sum is that of k
// in rising order, block by block, whatever the shape, the strip and the number of threads are.
#pragma once

#include "kernels.h"
#include "layout.h"

namespace bae_fast {
namespace {

constexpr int64_t kFmaRows = Fma::kRows, kFmaLanes = Fma::kLanes, kFmaColumns = 2 * kFmaLanes;
constexpr int64_t kFmaDepth = 256;                             // a block of k
constexpr int64_t kFmaRowsInCache = 96 / kFmaRows * kFmaRows;  // whole groups
constexpr int64_t kFmaStrip = 256;                             // columns
// of an encode, whose sums rest in memory; whole groups
constexpr int64_t kFmaRowsAtOnce = 1026 / kFmaRows * kFmaRows;
constexpr int64_t kFmaLeft = kFmaRows * kFmaDepth, kFmaRight = kFmaColumns * kFmaDepth;
constexpr int64_t kFmaRightPanel = kFmaStrip / kFmaColumns * kFmaRight;
static_assert(kFmaStrip % kFmaColumns == 0);

// ---- panels -------------------------------------------------------------------------------------

int64_t fma_panel_bytes(int64_t rows, int64_t depth, int64_t) {
  const int64_t groups = (rows + kFmaRows - 1) / kFmaRows;
  return groups * ((depth + kFmaDepth - 1) / kFmaDepth) * kFmaLeft * 4;
}

// The panel of a group of rows and the block that begins at k0.
inline float* left_panel(uint8_t* panel, int64_t group, int64_t groups, int64_t k0) {
  return reinterpret_cast<float*>(panel) + (k0 / kFmaDepth * groups + group) * kFmaLeft;
}

template <typename T>
void pack_left_rows(const Matrix& m, int64_t first, int64_t total, int64_t depth, uint8_t* panel) {
  const int64_t groups = (total + kFmaRows - 1) / kFmaRows;
  const int64_t used = total - first < kFmaRows ? total - first : kFmaRows;
  const T* const from = static_cast<const T*>(m.data) + first * m.row;
  for (int64_t k0 = 0; k0 < depth; k0 += kFmaDepth) {
    const int64_t k1 = depth - k0 < kFmaDepth ? depth : k0 + kFmaDepth;
    float* to = left_panel(panel, first / kFmaRows, groups, k0);
    for (int64_t k = k0; k < k1; ++k, to += kFmaRows) {
      const T* const at = from + k * m.column;
      for (int64_t r = 0; r < kFmaRows; ++r) to[r] = r < used ? number(at[r * m.row]) : 0.0f;
    }
  }
}

bool fma_pack(const Matrix& left, int64_t first, int64_t total, int64_t depth, int64_t,
              uint8_t* panel) {
  if (left.element == Matrix::kFloat) {
    pack_left_rows<float>(left, first, total, depth, panel);
  } else {
    pack_left_rows<uint16_t>(left, first, total, depth, panel);
  }
  return true;
}

// Rows k0 .. k0 + depth of all columns of a strip.
template <typename T>
void pack_right(const Matrix& m, int64_t columns, int64_t k0, int64_t depth, float* panel) {
  const T* const from = static_cast<const T*>(m.data) + k0 * m.row;
  for (int64_t c = 0; c < columns; c += kFmaColumns, panel += kFmaRight) {
    const int64_t used = columns - c < kFmaColumns ? columns - c : kFmaColumns;
    const T* const at = from + c * m.column;
    int64_t done = 0;  // of k, by vectors
    if (used == kFmaColumns && m.column == 1) {
      for (; done < depth; ++done) {
        float* const to = panel + done * kFmaColumns;
        Fma::store(to, Fma::load(at + done * m.row));
        Fma::store(to + kFmaLanes, Fma::load(at + done * m.row + kFmaLanes));
      }
    } else if (used == kFmaColumns) {
      for (; done + kFmaLanes <= depth; done += kFmaLanes) {
        for (int64_t half = 0; half < kFmaColumns; half += kFmaLanes) {
          typename Fma::Numbers block[kFmaLanes];
          for (int64_t i = 0; i < kFmaLanes; ++i) {
            block[i] = Fma::load(at + (half + i) * m.column + done);
          }
          Fma::transpose(block);
          for (int64_t i = 0; i < kFmaLanes; ++i) {
            Fma::store(panel + (done + i) * kFmaColumns + half, block[i]);
          }
        }
      }
    }
    for (; done < depth; ++done) {
      for (int64_t j = 0; j < kFmaColumns; ++j) {
        panel[done * kFmaColumns + j] = j < used ? number(at[done * m.row + j * m.column]) : 0.0f;
      }
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

// out [kRows, 2 kLanes] (+)= left right over `depth` of k, with vectors V: Fma, or Pairs of
// screened_encode.h and Quads of screened_bytes.h, whose k are two and four integers.
template <typename V, typename T>
inline void multiply_block(const T* left, const T* right, int64_t depth, T* out, int64_t stride,
                           bool add) {
  typename V::Numbers sum[V::kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < V::kRows; ++r) sum[r][0] = sum[r][1] = V::zero();
  for (int64_t k = 0; k < depth; ++k, left += V::kRows, right += 2 * V::kLanes) {
    const typename V::Numbers first = V::load(right), second = V::load(right + V::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < V::kRows; ++r) {
      const typename V::Numbers of_row = V::broadcast(left + r);
      sum[r][0] = V::multiply_add(of_row, first, sum[r][0]);
      sum[r][1] = V::multiply_add(of_row, second, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < V::kRows; ++r) {
    T* const to = out + r * stride;
    if (add) {
      sum[r][0] = V::add(V::load(to), sum[r][0]);
      sum[r][1] = V::add(V::load(to + V::kLanes), sum[r][1]);
    }
    V::store(to, sum[r][0]);
    V::store(to + V::kLanes, sum[r][1]);
  }
}

// The same where fewer rows or columns there are.
inline void multiply_edge(const float* left, const float* right, int64_t depth, int64_t rows,
                          int64_t columns, float* out, int64_t stride, bool add) {
  alignas(64) float block[kFmaRows * kFmaColumns];
  multiply_block<Fma>(left, right, depth, block, kFmaColumns, false);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      float& to = out[r * stride + c];
      to = add ? to + block[r * kFmaColumns + c] : block[r * kFmaColumns + c];
    }
  }
}

// Rows first .. last of a product; the first of them is the first of `out`, and of a group.
void multiply_rows(const UnitStrip& s, int64_t first, int64_t last, float* out, int64_t stride,
                   bool add) {
  float* const panel = reinterpret_cast<float*>(s.scratch);
  const int64_t groups = (s.rows + kFmaRows - 1) / kFmaRows;
  for (int64_t k0 = 0; k0 < s.depth; k0 += kFmaDepth) {
    const int64_t depth = s.depth - k0 < kFmaDepth ? s.depth - k0 : kFmaDepth;
    if (s.right.element == Matrix::kFloat) {
      pack_right<float>(s.right, s.columns, k0, depth, panel);
    } else {
      pack_right<uint16_t>(s.right, s.columns, k0, depth, panel);
    }
    const float* const left = left_panel(const_cast<uint8_t*>(s.left), 0, groups, k0);
    for (int64_t m0 = first; m0 < last; m0 += kFmaRowsInCache) {
      const int64_t m1 = last - m0 < kFmaRowsInCache ? last : m0 + kFmaRowsInCache;
      for (int64_t c = 0; c < s.columns; c += kFmaColumns) {
        const float* const right = panel + c / kFmaColumns * kFmaRight;
        const int64_t columns = s.columns - c < kFmaColumns ? s.columns - c : kFmaColumns;
        for (int64_t m = m0; m < m1; m += kFmaRows) {
          const float* const rows = left + m / kFmaRows * kFmaLeft;
          float* const to = out + (m - first) * stride + c;
          if (columns == kFmaColumns && m + kFmaRows <= m1) {
            multiply_block<Fma>(rows, right, depth, to, stride, add || k0 > 0);
          } else {
            const int64_t used = m1 - m < kFmaRows ? m1 - m : kFmaRows;
            multiply_edge(rows, right, depth, used, columns, to, stride, add || k0 > 0);
          }
        }
      }
    }
  }
}

bool fma_product(const UnitStrip& s, float* out, int64_t stride, bool add) {
  multiply_rows(s, 0, s.rows, out, stride, add);
  return true;
}

bool fma_encode(const UnitStrip& s, const EncodeStrip& e) {
  float* const sums = reinterpret_cast<float*>(s.scratch) + kFmaRightPanel;
  for (int64_t row = 0; row < s.rows; ++row) {
    if (row % kFmaRowsAtOnce == 0) {
      const int64_t last = s.rows - row < kFmaRowsAtOnce ? s.rows : row + kFmaRowsAtOnce;
      multiply_rows(s, row, last, sums, kFmaStrip, false);
    }
    uint32_t* const words = e.words + row * e.words_stride;
    uint32_t* const window = e.window == nullptr ? nullptr : e.window + row * e.window_stride;
    if (e.keep != nullptr && !e.keep[row]) {
      for (int64_t w = 0; w < n_words(s.columns); ++w) words[w] = 0;
      for (int64_t w = 0; window != nullptr && w < n_words(s.columns); ++w) window[w] = 0;
      continue;
    }
    float* const pre = sums + row % kFmaRowsAtOnce * kFmaStrip;
    for (int64_t c = 0; c < s.columns; ++c) pre[c] += e.bias[c];
    threshold_f32(pre, s.columns, e.width, words, window);
  }
  return true;
}

constexpr int64_t kFmaScratch = (kFmaRightPanel + kFmaRowsAtOnce * kFmaStrip) * 4;

constexpr Units kFmaUnits = {kFmaRows,        kFmaStrip, kFmaScratch, false,
                             fma_panel_bytes, fma_pack,  fma_encode,  fma_product};

}  // namespace
}  // namespace bae_fast
