// Bits of x W + b by products of 16-bit integers, exact: a pre-activation is needed only as far as
// to say on which side of zero (and of the window's width) it lies. Integers say that of nearly all
// of them, with a bound on their error that holds whatever the numbers are; the others are summed
// anew, in float64 where fp32 does not decide either. So a bit is that of the float64 sum, and
// products take half the time of those in fp32.
//
// A row x and a column w become integers, x = s p + dx and w = t q + dw, with steps
//
//     s = max(|x| / kNorm, max |x_k| / kLargest)
//
// so that p_k fits 16 bits and, by Cauchy-Schwarz, no sum of p_k q_k leaves 32 bits. Then
//
//     |x.w - s t p.q|  =  |s p.dw + dx.w|  <=  (|x| + |dx|) |dw| + |dx| |w|
//
// where norms are measured, not estimated. All of this is done in fp32, whose own errors are far
// below: kSlack covers them (u = 2^-24). 3 u of the conversion, the product and the sum that make
// the pre-activation, 2 u of the distance to a threshold, and 2 u of each of dx and dw, all
// relative to |x| |w| + |b| + width; kGrowth covers those of a product of two norms. A norm of n
// squares in any order is off by at most (n + 2) u, which `grown` adds.
//
// Written with Fma (fma_products.h) and a struct Pairs:
//
//     kLanes, kRows       sums of a vector; rows of a block of sums
//     Numbers             a vector of int32
//     zero, load, store, add, broadcast    of sums, or of pairs of 16-bit integers in an int32
//     multiply_add        adds the two products of each pair
#pragma once

#include "kernels.h"
#include "layout.h"

namespace bae_fast {
namespace {

constexpr int64_t kScreenRows = Pairs::kRows, kScreenLanes = Pairs::kLanes;
constexpr int64_t kScreenColumns = 2 * kScreenLanes;  // of a block of sums
constexpr int64_t kScreenStrip = 128;
constexpr int64_t kScreenWords = kScreenStrip / kWordBits;
// (kNorm (1 + growth) + sqrt(n) / 2)^2 < 2^31 up to this many numbers
constexpr int64_t kMostScreened = 1 << 15;
constexpr int64_t kScreenRowsAtOnce = 1024;  // whose doubts are kept
constexpr float kNorm = 46000.0f, kLargest = 32766.0f;
constexpr float kSlack = 0x1p-20f, kGrowth = 1 + 0x1p-10f;
// Beyond, squares overflow or vanish. Smaller numbers count as errors altogether.
constexpr float kMostNumber = 1e15f, kLeastNumber = 1e-10f;
// More than what sums of products lose where products are too small for fp32.
constexpr float kVanishing = 0x1p-120f;
constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer, which the low bits then are

using Floats = float __attribute__((vector_size(kScreenLanes * 4)));
using Integers = int32_t __attribute__((vector_size(kScreenLanes * 4)));
using Halves = int16_t __attribute__((vector_size(kScreenLanes * 2)));

template <typename V>
inline V load_vector(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <typename V>
inline void store_vector(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

inline float root(float v) { return __builtin_sqrtf(v); }

inline Floats size_of(Floats v) { return (Floats)((Integers)v & 0x7FFFFFFF); }

inline float sum_of(const Floats& v) {
  float sum = 0;
  for (int i = 0; i < kScreenLanes; ++i) sum += v[i];
  return sum;
}

inline float largest_of(const Floats& v) {
  float most = 0;
  for (int i = 0; i < kScreenLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// At least the norm, of a sum of n squares.
inline float grown(float squares, int64_t n) {
  return root(squares) * (1 + 0x1p-23f * static_cast<float>(n + 16));
}

// What stands for a row or a column of n numbers.
struct Scale {
  float step, inverse;
  bool fits;

  Scale(float squares, float largest) {
    fits = largest < kMostNumber && squares < kMostNumber * kMostNumber;  // not so for NaN
    const float by_norm = root(squares) / kNorm, by_size = largest / kLargest;
    step = largest < kLeastNumber ? 0 : by_norm > by_size ? by_norm : by_size;
    inverse = step > 0 ? 1 / step : 0;
  }
};

// Bounds of the norms of a row or a column, and of its error. The squares of numbers that count as
// errors altogether may have vanished.
struct Norms {
  float whole, error;

  Norms(float step, float squares, float errors, float largest, int64_t n) {
    if (step > 0) {
      whole = grown(squares, n);
      error = grown(errors, n);
    } else {
      whole = error = grown(static_cast<float>(n), n) * (largest + 0x1p-100f);
    }
  }
};

// ---- rows ---------------------------------------------------------------------------------------

// Of a row in a panel: s, (|x| + |dx|) and |dx|.
struct ScreenedRow {
  float step, whole, error;
};

inline int64_t screened_groups(int64_t rows) { return (rows + kScreenRows - 1) / kScreenRows; }
inline int64_t pairs_of(int64_t depth) { return (depth + 1) / 2; }

// [rows] of ScreenedRow, whole cache lines of them; then [group][pair of k][kRows] pairs.
inline int64_t screened_rows_bytes(int64_t rows) {
  return round_up(screened_groups(rows) * kScreenRows * static_cast<int64_t>(sizeof(ScreenedRow)),
                  64);
}

int64_t screen_panel_bytes(int64_t rows, int64_t depth) {
  return screened_rows_bytes(rows) +
         round_up(screened_groups(rows) * kScreenRows * pairs_of(depth) * 4, 64);
}

inline int32_t* screened_left(uint8_t* panel, int64_t rows, int64_t depth, int64_t group) {
  return reinterpret_cast<int32_t*>(panel + screened_rows_bytes(rows)) +
         group * kScreenRows * pairs_of(depth);
}

// Number (row, column) of a matrix of floats or of bf16 numbers.
inline float number_at(const Matrix& m, int64_t row, int64_t column) {
  const int64_t at = row * m.row + column * m.column;
  return m.element == Matrix::kFloat ? static_cast<const float*>(m.data)[at]
                                     : number(static_cast<const uint16_t*>(m.data)[at]);
}

// A vector of them, side by side.
inline Floats numbers_at(const Matrix& m, int64_t row, int64_t column) {
  const int64_t at = row * m.row + column;
  return m.element == Matrix::kFloat ? (Floats)Fma::load(static_cast<const float*>(m.data) + at)
                                     : (Floats)Fma::load(static_cast<const uint16_t*>(m.data) + at);
}

// kScreenLanes numbers of a row from k on, zero past the depth.
inline Floats numbers_of_row(const Matrix& m, int64_t row, int64_t k, int64_t depth) {
  if (k + kScreenLanes <= depth && m.column == 1) return numbers_at(m, row, k);
  Floats v = {};
  for (int64_t i = 0; i < kScreenLanes && k + i < depth; ++i) v[i] = number_at(m, row, k + i);
  return v;
}

bool screen_pack(const Matrix& left, int64_t first, int64_t total, int64_t depth, uint8_t* panel) {
  ScreenedRow* const row = reinterpret_cast<ScreenedRow*>(panel) + first;
  int32_t* const pairs = screened_left(panel, total, depth, first / kScreenRows);
  bool fits = true;
  for (int64_t r = 0; r < kScreenRows; ++r) {
    if (first + r >= total) {
      row[r] = {0, 0, 0};
      for (int64_t k = 0; k < pairs_of(depth); ++k) pairs[k * kScreenRows + r] = 0;
      continue;
    }
    Floats squares = {}, sizes = {}, errors = {};
    for (int64_t k = 0; k < depth; k += kScreenLanes) {
      const Floats v = numbers_of_row(left, first + r, k, depth), size = size_of(v);
      squares += v * v;
      sizes = size > sizes ? size : sizes;
    }
    const float square = sum_of(squares), largest = largest_of(sizes);
    const Scale scale(square, largest);
    fits = fits && scale.fits;
    if (!scale.fits) continue;
    for (int64_t k = 0; k < depth; k += kScreenLanes) {
      const Floats v = numbers_of_row(left, first + r, k, depth);
      const Floats high = v * scale.inverse + kMagic;
      const Floats error = v - (high - kMagic) * scale.step;
      errors += error * error;
      int32_t pair[kScreenLanes / 2];
      store_vector(pair, __builtin_convertvector((Integers)high, Halves));
      for (int64_t i = 0; i < kScreenLanes / 2 && k / 2 + i < pairs_of(depth); ++i) {
        pairs[(k / 2 + i) * kScreenRows + r] = pair[i];
      }
    }
    const Norms norms(scale.step, square, sum_of(errors), largest, depth);
    row[r] = {scale.step, norms.whole + norms.error, norms.error};
  }
  return fits;
}

// ---- columns ------------------------------------------------------------------------------------

// Of the columns of a strip: t, |dw| with the slack of |w|, |w|, the slack of b and of the width,
// and b. Past the last column 0.
struct ScreenedColumns {
  alignas(64) float step[kScreenStrip], error[kScreenStrip], whole[kScreenStrip];
  alignas(64) float slack[kScreenStrip], bias[kScreenStrip];
};

// kScreenLanes numbers of row k from a column on, zero past the last of `columns`.
inline Floats numbers_of_columns(const Matrix& m, int64_t k, int64_t column, int64_t columns) {
  if (column + kScreenLanes <= columns && m.column == 1) return numbers_at(m, k, column);
  Floats v = {};
  for (int64_t i = 0; i < kScreenLanes && column + i < columns; ++i) {
    v[i] = number_at(m, k, column + i);
  }
  return v;
}

// Quantises a strip to pairs [kScreenColumns columns][pair of k][kScreenColumns] and copies it to
// numbers [depth][kScreenStrip], as rows a power of two apart would push each other out of the
// caches. False where the numbers do not fit.
bool screen_columns(const Matrix& m, int64_t depth, int64_t columns, int32_t* pairs, float* numbers,
                    ScreenedColumns& out) {
  constexpr int64_t kVectors = kScreenStrip / kScreenLanes;
  const int64_t used = (columns + kScreenColumns - 1) / kScreenColumns * 2;
  Floats squares[kVectors] = {}, largest[kVectors] = {}, errors[kVectors] = {};
  Floats step[kVectors] = {}, inverse[kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    float* const to = numbers + k * kScreenStrip;
    for (int64_t c = 0; c < used; ++c) {
      const Floats v = numbers_of_columns(m, k, c * kScreenLanes, columns), size = size_of(v);
      store_vector(to + c * kScreenLanes, v);
      squares[c] += v * v;
      largest[c] = size > largest[c] ? size : largest[c];
    }
  }
  for (int64_t c = 0; c < used * kScreenLanes; ++c) {
    const int64_t at = c / kScreenLanes, lane = c % kScreenLanes;
    const Scale scale(squares[at][lane], largest[at][lane]);
    if (!scale.fits) return false;
    step[at][lane] = out.step[c] = scale.step;
    inverse[at][lane] = scale.inverse;
  }
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t c = 0; c < used; ++c) {
      const float* const from = numbers + k * kScreenStrip + c * kScreenLanes;
      const Floats a = load_vector<Floats>(from);
      const Floats b = k + 1 < depth ? load_vector<Floats>(from + kScreenStrip) : Floats{};
      const Floats high_a = a * inverse[c] + kMagic, high_b = b * inverse[c] + kMagic;
      const Floats error_a = a - (high_a - kMagic) * step[c];
      const Floats error_b = b - (high_b - kMagic) * step[c];
      errors[c] += error_a * error_a;
      errors[c] += error_b * error_b;
      // the low 16 bits of a number that kMagic was added to are the integer's
      store_vector(pairs + c / 2 * kScreenColumns * pairs_of(depth) + k / 2 * kScreenColumns +
                       c % 2 * kScreenLanes,
                   ((Integers)high_a & 0xFFFF) | (Integers)high_b << 16);
    }
  }
  for (int64_t c = 0; c < used * kScreenLanes; ++c) {
    const int64_t at = c / kScreenLanes, lane = c % kScreenLanes;
    const Norms norms(out.step[c], squares[at][lane], errors[at][lane], largest[at][lane], depth);
    out.error[c] = (norms.error + kSlack * norms.whole) * kGrowth;
    out.whole[c] = norms.whole * kGrowth;
  }
  return true;
}

// ---- sums ---------------------------------------------------------------------------------------

// Words of one row from its sums, and those of the columns that they do not decide.
inline void screen_row(const int32_t* sums, const ScreenedRow& row, const ScreenedColumns& column,
                       int64_t columns, float width, uint32_t* words, uint32_t* window,
                       uint32_t* doubts) {
  alignas(64) float pre[kScreenStrip], margin[kScreenStrip];
  for (int64_t c = 0; c < kScreenStrip; c += kScreenLanes) {
    const Floats sum = __builtin_convertvector(load_vector<Integers>(sums + c), Floats);
    const Floats v = sum * load_vector<Floats>(column.step + c) * row.step +
                     load_vector<Floats>(column.bias + c);
    const Floats size = size_of(v);
    Floats nearest = size;
    if (window != nullptr) {
      const Floats edge = size_of(size - width);
      nearest = edge < nearest ? edge : nearest;
    }
    const Floats bound = row.whole * load_vector<Floats>(column.error + c) +
                         row.error * load_vector<Floats>(column.whole + c) +
                         load_vector<Floats>(column.slack + c);
    store_vector(pre + c, v);
    store_vector(margin + c, nearest - bound);
  }
  uint32_t sure[kScreenWords];
  threshold_f32(pre, columns, width, words, window);
  threshold_f32(margin, columns, 0, sure, nullptr);  // NaN is not above zero
  for (int64_t w = 0; w < n_words(columns); ++w) {
    const int64_t rest = columns - w * kWordBits;
    doubts[w] = ~sure[w] & (rest < kWordBits ? (1u << rest) - 1 : ~0u);
  }
}

// ---- doubts -------------------------------------------------------------------------------------

// Sum in a fixed order, for any instruction set the same.
template <typename T, int kSums>
inline T dot(const float* a, const float* b, int64_t n) {
  T sum[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= n; k += kSums) {
    for (int64_t i = 0; i < kSums; ++i) {
      sum[i] += static_cast<T>(a[k + i]) * static_cast<T>(b[k + i]);
    }
  }
  for (int64_t i = 0; k + i < n; ++i) {
    sum[i] += static_cast<T>(a[k + i]) * static_cast<T>(b[k + i]);
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

// By a sum in fp32 where that decides, else by one in float64, of products that float64 holds
// exactly. In fp32 a sum of products is off by at most (n / 64 + 8) u |x| |w|, as no number takes
// part in more additions; the slack of b and of the width is that of the integers' sums.
struct Decision {
  bool on, inside;
};

inline Decision decide(const float* x, const float* w, int64_t n, float norms, float bias,
                       float slack, float width) {
  const float quick = dot<float, 64>(x, w, n) + bias, size = __builtin_fabsf(quick);
  const float edge = __builtin_fabsf(size - width), nearest = edge < size ? edge : size;
  const float bound = norms * (0x1p-24f * static_cast<float>(n / 64 + 16)) + slack;
  if (nearest > bound) return {quick > 0, size < width};
  const double pre = dot<double, 32>(x, w, n) + static_cast<double>(bias);
  return {pre > 0, __builtin_fabs(pre) < static_cast<double>(width)};
}

// Columns that are turned to lie in one piece each, at once.
constexpr int64_t kTurned = Fma::kLanes;

// numbers [depth][kScreenStrip] from a column on, to [kTurned][depth]
void turn_columns(const float* numbers, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + kTurned <= depth; k += kTurned) {
    typename Fma::Numbers block[kTurned];
    for (int64_t i = 0; i < kTurned; ++i) block[i] = Fma::load(numbers + (k + i) * kScreenStrip);
    Fma::transpose(block);
    for (int64_t i = 0; i < kTurned; ++i) Fma::store(out + i * depth + k, block[i]);
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < kTurned; ++i) out[i * depth + k] = numbers[k * kScreenStrip + i];
  }
}

inline void set_bit(uint32_t& word, int64_t bit, bool on) {
  word = (word & ~(1u << bit)) | static_cast<uint32_t>(on) << bit;
}

// What a strip needs beside its panels.
struct ScreenScratch {
  int32_t *pairs, *tile;
  uint32_t* doubts;  // [rows at once][kScreenWords]
  float *numbers, *turned, *row;

  static int64_t bytes(int64_t depth) {
    return round_up((kScreenStrip * pairs_of(depth) + kScreenRows * kScreenStrip +
                     kScreenRowsAtOnce * kScreenWords + (kScreenStrip + kTurned + 1) * depth) *
                        4,
                    64);
  }
  ScreenScratch(uint8_t* memory, int64_t depth) {
    pairs = reinterpret_cast<int32_t*>(memory);
    tile = pairs + kScreenStrip * pairs_of(depth);
    doubts = reinterpret_cast<uint32_t*>(tile + kScreenRows * kScreenStrip);
    numbers = reinterpret_cast<float*>(doubts + kScreenRowsAtOnce * kScreenWords);
    turned = numbers + kScreenStrip * depth;
    row = turned + kTurned * depth;
  }
};

// Decides what the integers left open of rows first .. last.
void settle(const UnitStrip& s, const EncodeStrip& e, const ScreenedColumns& of_column,
            int64_t first, int64_t last, const ScreenScratch& scratch) {
  constexpr uint32_t kOfGroup = (1u << kTurned) - 1;
  const ScreenedRow* const rows = reinterpret_cast<const ScreenedRow*>(s.left);
  for (int64_t column = 0; column < s.columns; column += kTurned) {
    const int64_t word = column / kWordBits, bit = column % kWordBits;
    bool turned = false;
    for (int64_t row = first; row < last; ++row) {
      uint32_t open = scratch.doubts[(row - first) * kScreenWords + word] >> bit & kOfGroup;
      if (open == 0) continue;
      if (!turned) turn_columns(scratch.numbers + column, s.depth, scratch.turned);
      turned = true;
      const float* x = scratch.row;
      if (s.source.column == 1 && s.source.element == Matrix::kFloat) {
        x = static_cast<const float*>(s.source.data) + row * s.source.row;
      } else {
        for (int64_t k = 0; k < s.depth; ++k) scratch.row[k] = number_at(s.source, row, k);
      }
      for (; open != 0; open &= open - 1) {
        const int64_t c = __builtin_ctz(open);
        const Decision is = decide(x, scratch.turned + c * s.depth, s.depth,
                                   rows[row].whole * of_column.whole[column + c],
                                   e.bias[column + c], of_column.slack[column + c], e.width);
        set_bit(e.words[row * e.words_stride + word], bit + c, is.on);
        if (e.window != nullptr) {
          set_bit(e.window[row * e.window_stride + word], bit + c, is.inside);
        }
      }
    }
  }
}

// ---- a strip ------------------------------------------------------------------------------------

// Columns of a strip: its panels stay in the outer cache of a core.
int64_t screen_columns_at_once(int64_t depth) {
  return depth <= 2048 ? kScreenStrip : depth <= 4096 ? kScreenStrip / 2 : kWordBits;
}

bool screen_encode(const UnitStrip& s, const EncodeStrip& e) {
  const int64_t pairs = pairs_of(s.depth);
  const ScreenScratch scratch(s.scratch, s.depth);
  ScreenedColumns column{};
  if (!screen_columns(s.right, s.depth, s.columns, scratch.pairs, scratch.numbers, column)) {
    return false;
  }
  for (int64_t c = 0; c < s.columns; ++c) {
    column.bias[c] = e.bias[c];
    column.slack[c] = kSlack * (__builtin_fabsf(e.bias[c]) + e.width) + kVanishing;
  }
  const ScreenedRow* const rows = reinterpret_cast<const ScreenedRow*>(s.left);
  for (int64_t first = 0; first < s.rows; first += kScreenRowsAtOnce) {
    const int64_t last = s.rows - first < kScreenRowsAtOnce ? s.rows : first + kScreenRowsAtOnce;
    int64_t open = 0;
    for (int64_t m = first; m < last; ++m) {
      const int64_t of_group = m % kScreenRows;
      if (of_group == 0 || m == first) {
        const int32_t* const left =
            screened_left(const_cast<uint8_t*>(s.left), s.rows, s.depth, m / kScreenRows);
        for (int64_t c = 0; c < s.columns; c += kScreenColumns) {
          multiply_block<Pairs>(left, scratch.pairs + c * pairs, pairs, scratch.tile + c,
                                kScreenStrip, false);
        }
      }
      uint32_t* const words = e.words + m * e.words_stride;
      uint32_t* const window = e.window == nullptr ? nullptr : e.window + m * e.window_stride;
      uint32_t* const of_row = scratch.doubts + (m - first) * kScreenWords;
      if (e.keep != nullptr && !e.keep[m]) {
        for (int64_t w = 0; w < n_words(s.columns); ++w) {
          words[w] = of_row[w] = 0;
          if (window != nullptr) window[w] = 0;
        }
        continue;
      }
      screen_row(scratch.tile + of_group * kScreenStrip, rows[m], column, s.columns, e.width, words,
                 window, of_row);
      for (int64_t w = 0; w < n_words(s.columns); ++w) open += popcount(of_row[w]);
    }
    // as many sums of single entries would take as long as products in fp32 of all
    if (open > (last - first) * s.columns / 4 + 64) return false;
    if (open > 0) settle(s, e, column, first, last, scratch);
  }
  return true;
}

constexpr Screen kScreen = {kScreenRows,        kMostScreened,        screen_columns_at_once,
                            screen_panel_bytes, ScreenScratch::bytes, screen_pack,
                            screen_encode};

}  // namespace
}  // namespace bae_fast
