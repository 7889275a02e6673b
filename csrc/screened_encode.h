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
// relative to (|x| + |dx|) |w| + |b| + width; kGrowth covers those of a product of two norms, and
// what is relative to |dw| in place of |w|. A norm of n squares in any order is off by at most
// (n + 2) u, which `grown` adds.
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
constexpr int64_t kScreenStrip = 128, kMostStrips = 4;
constexpr int64_t kScreenWords = kScreenStrip / kWordBits, kWideWords = kMostStrips * kScreenWords;
// Rows that all strips take in turn, so that they stay in the outermost cache; whole groups.
constexpr int64_t kScreenBlock = 252;
static_assert(kScreenBlock % kScreenRows == 0);
// (kNorm (1 + growth) + sqrt(n) / 2)^2 < 2^31 up to this many numbers
constexpr int64_t kMostScreened = 1 << 15;
constexpr float kSlack = 0x1p-20f, kGrowth = 1 + 0x1p-10f;
// Beyond, squares overflow or vanish. Smaller numbers count as errors altogether.
constexpr float kMostNumber = 1e15f, kLeastNumber = 1e-10f;
// More than what sums of products lose where products are too small for fp32.
constexpr float kVanishing = 0x1p-120f;
// adding it rounds to an integer, which the low bits then are
constexpr float kMagic = 0x1.8p23f;
constexpr int32_t kMagicInteger = 0x4B400000;  // its bits

using Floats = float __attribute__((vector_size(kScreenLanes * 4)));
using Integers = int32_t __attribute__((vector_size(kScreenLanes * 4)));
constexpr int64_t kClasses = kScreenLanes / 2;

// Integers of 16 bits, two of an int32.
struct ByPairs {
  using Block = Pairs;
  using Small = int16_t __attribute__((vector_size(kScreenLanes * 2)));
  static constexpr int64_t kOf = 2, kBits = 16;
  static constexpr float kNorm = 46000.0f, kLargest = 32766.0f;
  static constexpr int32_t kOffset = 0;  // added to those of rows
  static constexpr bool kByLane = false;
  // A strip is given up where more than one entry in so many is open after `done` rows, each time
  // that kJudged are: as many sums of single entries would take as long as products in fp32 of all.
  static constexpr int64_t kJudged = 1020;
  static int64_t most_open(int64_t) { return 4; }
};

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

  Scale(float squares, float largest, float most_norm, float most) {
    fits = largest < kMostNumber && squares < kMostNumber * kMostNumber;  // not so for NaN
    const float by_norm = root(squares) / most_norm, by_size = largest / most;
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
// int32 that hold the integers of a row
template <typename I>
constexpr int64_t held(int64_t depth) {
  return (depth + I::kOf - 1) / I::kOf;
}

// [rows] of ScreenedRow, whole cache lines of them; then [group][held][kScreenRows] int32.
inline int64_t screened_rows_bytes(int64_t rows) {
  return round_up(screened_groups(rows) * kScreenRows * static_cast<int64_t>(sizeof(ScreenedRow)),
                  64);
}

template <typename I>
int64_t screen_panel_bytes(int64_t rows, int64_t depth) {
  return screened_rows_bytes(rows) +
         round_up(screened_groups(rows) * kScreenRows * held<I>(depth) * 4, 64);
}

template <typename I>
inline int32_t* screened_left(uint8_t* panel, int64_t rows, int64_t depth, int64_t group) {
  return reinterpret_cast<int32_t*>(panel + screened_rows_bytes(rows)) +
         group * kScreenRows * held<I>(depth);
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

// Of a row: its sum of squares, that of the numbers of one class, and its largest number. Number k
// is of class k / 2 mod kClasses, as are all that a lane of pairs holds.
struct RowSize {
  float squares, of_class, largest;

  RowSize(const Matrix& m, int64_t row, int64_t depth) {
    Floats sums = {}, sizes = {};
    for (int64_t k = 0; k < depth; k += kScreenLanes) {
      const Floats v = numbers_of_row(m, row, k, depth), size = size_of(v);
      sums += v * v;
      sizes = size > sizes ? size : sizes;
    }
    squares = sum_of(sums);
    of_class = 0;
    for (int64_t i = 0; i < kScreenLanes; i += 2) {
      const float both = sums[i] + sums[i + 1];
      of_class = both > of_class ? both : of_class;
    }
    largest = largest_of(sizes);
  }
};

// put(k, integers) for every vector of a row.
template <typename I, typename Put>
inline ScreenedRow quantise_row(const Matrix& m, int64_t row, int64_t depth, const RowSize& size,
                                const Scale& scale, const Put& put) {
  Floats errors = {};
  for (int64_t k = 0; k < depth; k += kScreenLanes) {
    const Floats v = numbers_of_row(m, row, k, depth);
    const Floats high = v * scale.inverse + kMagic;
    const Floats error = v - (high - kMagic) * scale.step;
    errors += error * error;
    // the low bits of a number that kMagic was added to are the integer's
    put(k, __builtin_convertvector((Integers)high + I::kOffset, typename I::Small));
  }
  const Norms norms(scale.step, size.squares, sum_of(errors), size.largest, depth);
  return {scale.step, norms.whole + norms.error, norms.error};
}

// Of one row to a panel; false where its numbers do not fit.
template <typename I>
bool screen_pack_row(const Matrix& left, int64_t row, int64_t total, int64_t depth,
                     const RowSize& size, uint8_t* panel) {
  constexpr int64_t kAtOnce = kScreenLanes / I::kOf;
  ScreenedRow& out = reinterpret_cast<ScreenedRow*>(panel)[row];
  int32_t* const to = screened_left<I>(panel, total, depth, row / kScreenRows) + row % kScreenRows;
  const Scale scale(size.squares, size.largest, I::kNorm, I::kLargest);
  if (!scale.fits) return false;
  out = quantise_row<I>(left, row, depth, size, scale, [&](int64_t k, typename I::Small integers) {
    int32_t words[kAtOnce];
    store_vector(words, integers);
    for (int64_t i = 0; i < kAtOnce && k / I::kOf + i < held<I>(depth); ++i) {
      to[(k / I::kOf + i) * kScreenRows] = words[i];
    }
  });
  return true;
}

// Rows of the last group that there are not.
template <typename I>
void screen_pack_nothing(int64_t row, int64_t total, int64_t depth, uint8_t* panel) {
  reinterpret_cast<ScreenedRow*>(panel)[row] = {0, 0, 0};
  int32_t* const to = screened_left<I>(panel, total, depth, row / kScreenRows) + row % kScreenRows;
  for (int64_t k = 0; k < held<I>(depth); ++k) to[k * kScreenRows] = 0;
}

bool screen_pack(const Matrix& left, int64_t first, int64_t total, int64_t depth, uint8_t* panel) {
  bool fits = true;
  for (int64_t row = first; row < first + kScreenRows; ++row) {
    if (row < total) {
      const RowSize size(left, row, depth);
      fits = screen_pack_row<ByPairs>(left, row, total, depth, size, panel) && fits;
    } else {
      screen_pack_nothing<ByPairs>(row, total, depth, panel);
    }
  }
  return fits;
}

// ---- columns ------------------------------------------------------------------------------------

// Of a strip: its panels stay in the outer cache of a core.
inline int64_t columns_of_strip(int64_t depth) {
  return depth <= 2048 ? kScreenStrip : depth <= 4096 ? kScreenStrip / 2 : kWordBits;
}
// Strips are copied together, as rows of W lie pages apart, and to find a page takes as long as to
// read a strip's part of it. Of very deep ones a row is long enough, and there is much to hold.
inline int64_t strips_at_once(int64_t depth) { return depth <= 4096 ? kMostStrips : 1; }
int64_t screen_columns_at_once(int64_t depth) {
  return columns_of_strip(depth) * strips_at_once(depth);
}

constexpr int64_t kScreenVectors = kScreenStrip / kScreenLanes;

// Of the columns of a strip: t, |dw| with the slack of |w|, |w|, the slack of b and of the width,
// b, and what the offset of rows adds to sums. Past the last column 0.
struct ScreenedColumns {
  alignas(64) float step[kScreenStrip], error[kScreenStrip], whole[kScreenStrip];
  alignas(64) float slack[kScreenStrip], bias[kScreenStrip];
  alignas(64) int32_t offset[kScreenStrip];

  void begin(const EncodeStrip& e, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) {
      bias[c] = e.bias[c];
      slack[c] = kSlack * (__builtin_fabsf(e.bias[c]) + e.width) + kVanishing;
    }
  }
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

// A strip copied to numbers [depth][kScreenStrip].
struct StripNumbers {
  float* numbers;
  int64_t depth, columns, used;  // vectors that columns are in, whole blocks of sums
  Floats squares[kScreenVectors] = {}, of_class[kScreenVectors] = {};
  Floats largest[kScreenVectors] = {}, sums[kClasses][kScreenVectors] = {};

  void begin(float* memory, int64_t deep, int64_t width) {
    numbers = memory;
    depth = deep;
    columns = width;
    used = (columns + kScreenColumns - 1) / kScreenColumns * 2;
  }
  // Row k of a strip that begins at a column.
  void take(const Matrix& m, int64_t k, int64_t first) {
    for (int64_t c = 0; c < used; ++c) {
      const Floats v = numbers_of_columns(m, k, first + c * kScreenLanes, first + columns);
      const Floats size = size_of(v);
      store_vector(numbers + k * kScreenStrip + c * kScreenLanes, v);
      sums[k / 2 % kClasses][c] += v * v;
      largest[c] = size > largest[c] ? size : largest[c];
    }
  }
  void end() {
    for (int64_t c = 0; c < used; ++c) {
      for (const auto& sum : sums) {
        squares[c] += sum[c];
        of_class[c] = sum[c] > of_class[c] ? sum[c] : of_class[c];
      }
    }
  }
};

// Quantises a strip to [kScreenColumns columns][held][kScreenColumns] int32. False where the
// numbers do not fit.
template <typename I>
bool screen_columns(const StripNumbers& strip, int32_t* right, ScreenedColumns& out) {
  Floats errors[kScreenVectors] = {}, step[kScreenVectors] = {}, inverse[kScreenVectors] = {};
  Integers sums[kScreenVectors] = {};
  for (int64_t c = 0; c < strip.used * kScreenLanes; ++c) {
    const int64_t at = c / kScreenLanes, lane = c % kScreenLanes;
    const float limited = I::kByLane ? strip.of_class[at][lane] : strip.squares[at][lane];
    const Scale scale(limited, strip.largest[at][lane], I::kNorm, I::kLargest);
    if (!scale.fits) return false;
    step[at][lane] = out.step[c] = scale.step;
    inverse[at][lane] = scale.inverse;
  }
  for (int64_t k = 0; k < strip.depth; k += I::kOf) {
    for (int64_t c = 0; c < strip.used; ++c) {
      const float* const from = strip.numbers + k * kScreenStrip + c * kScreenLanes;
      Integers together = {};
#pragma GCC unroll 4
      for (int64_t i = 0; i < I::kOf; ++i) {
        const Floats v =
            k + i < strip.depth ? load_vector<Floats>(from + i * kScreenStrip) : Floats{};
        const Floats high = v * inverse[c] + kMagic;
        const Floats error = v - (high - kMagic) * step[c];
        errors[c] += error * error;
        together |= ((Integers)high & ((1 << I::kBits) - 1)) << (i * I::kBits);
        if (I::kOffset != 0) sums[c] += (Integers)high - kMagicInteger;
      }
      store_vector(right + c / 2 * kScreenColumns * held<I>(strip.depth) +
                       k / I::kOf * kScreenColumns + c % 2 * kScreenLanes,
                   together);
    }
  }
  for (int64_t c = 0; c < strip.used * kScreenLanes; ++c) {
    const int64_t at = c / kScreenLanes, lane = c % kScreenLanes;
    const Norms norms(out.step[c], strip.squares[at][lane], errors[at][lane],
                      strip.largest[at][lane], strip.depth);
    out.error[c] = (norms.error + kSlack * norms.whole) * kGrowth;
    out.whole[c] = norms.whole * kGrowth;
    out.offset[c] = sums[at][lane] * I::kOffset;
  }
  return true;
}

// ---- sums ---------------------------------------------------------------------------------------

// Words of one row from its sums, and those of the columns that they do not decide.
template <typename I>
inline void screen_row(const int32_t* sums, const ScreenedRow& row, const ScreenedColumns& column,
                       int64_t columns, float width, uint32_t* words, uint32_t* window,
                       uint32_t* doubts) {
  alignas(64) float pre[kScreenStrip], margin[kScreenStrip];
  for (int64_t c = 0; c < kScreenStrip; c += kScreenLanes) {
    Integers of_integers = load_vector<Integers>(sums + c);
    if (I::kOffset != 0) of_integers -= load_vector<Integers>(column.offset + c);
    const Floats sum = __builtin_convertvector(of_integers, Floats);
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

// What strips need beside their panels.
template <typename I>
struct ScreenScratch {
  int32_t *right, *tile;
  uint32_t *words, *window, *doubts;  // [row][kWideWords]
  float *numbers, *turned, *row;

  static int64_t bytes(int64_t depth) {
    const int64_t columns = strips_at_once(depth) * kScreenStrip;
    return round_up((columns * held<I>(depth) + kScreenRows * kScreenStrip +
                     3 * kScreenedAtOnce * kWideWords + (columns + kTurned + 1) * depth) *
                        4,
                    64);
  }
  ScreenScratch(uint8_t* memory, int64_t depth) {
    const int64_t columns = strips_at_once(depth) * kScreenStrip;
    right = reinterpret_cast<int32_t*>(memory);
    tile = right + columns * held<I>(depth);
    words = reinterpret_cast<uint32_t*>(tile + kScreenRows * kScreenStrip);
    window = words + kScreenedAtOnce * kWideWords;
    doubts = window + kScreenedAtOnce * kWideWords;
    numbers = reinterpret_cast<float*>(doubts + kScreenedAtOnce * kWideWords);
    turned = numbers + columns * depth;
    row = turned + kTurned * depth;
  }
};

// One of several strips side by side. Its words lie together with those of the others, in the
// scratch: in the code every row is pages apart.
struct Strip {
  UnitStrip s{};
  EncodeStrip e{};
  StripNumbers numbers{};
  ScreenedColumns columns{};
  int32_t* right = nullptr;
  uint32_t* doubts = nullptr;
  int64_t open = 0;

  void set(int64_t row, int64_t column, bool on, bool inside) const {
    const int64_t at = row * kWideWords + column / kWordBits, bit = column % kWordBits;
    set_bit(e.words[at], bit, on);
    if (e.window != nullptr) set_bit(e.window[at], bit, inside);
  }

  template <typename I>
  void begin(const UnitStrip& all, const EncodeStrip& out, int64_t index,
             const ScreenScratch<I>& scratch) {
    const int64_t width = columns_of_strip(all.depth), first = index * width;
    s = all;
    s.columns = all.columns - first < width ? all.columns - first : width;
    e = out;
    e.bias += first;
    e.words = scratch.words + first / kWordBits;
    e.window = out.window == nullptr ? nullptr : scratch.window + first / kWordBits;
    e.words_stride = e.window_stride = kWideWords;
    numbers.begin(scratch.numbers + index * kScreenStrip * s.depth, s.depth, s.columns);
    columns.begin(e, s.columns);
    right = scratch.right + index * kScreenStrip * held<I>(s.depth);
    doubts = scratch.doubts + first / kWordBits;
  }
};

// Sets what a sum that is off by `bound` at most says of an entry; false where it says nothing.
inline bool decide_entry(const Strip& strip, int64_t row, int64_t column, float pre, float bound) {
  const float size = __builtin_fabsf(pre), edge = __builtin_fabsf(size - strip.e.width);
  if (!((edge < size ? edge : size) > bound)) return false;  // so for NaN
  strip.set(row, column, pre > 0, size < strip.e.width);
  return true;
}

// Decides what the integers left open: by a sum in fp32 where that does, else by one in float64,
// of products that float64 holds exactly. In fp32 a sum of products is off by at most
// (n / 64 + 8) u |x| |w|, as no number takes part in more additions; the slack of b and of the
// width is that of the integers' sums.
template <typename I>
void settle(const Strip& strip, const ScreenScratch<I>& scratch) {
  constexpr uint32_t kOfGroup = (1u << kTurned) - 1;
  const UnitStrip& s = strip.s;
  const float rounding = 0x1p-24f * static_cast<float>(s.depth / 64 + 16);
  const ScreenedRow* const rows = reinterpret_cast<const ScreenedRow*>(s.left);
  for (int64_t first = 0; first < s.columns; first += kTurned) {
    bool turned = false;
    for (int64_t row = 0; row < s.rows; ++row) {
      const uint32_t* const doubts = strip.doubts + row * kWideWords;
      uint32_t open = doubts[first / kWordBits] >> first % kWordBits & kOfGroup;
      if (open == 0) continue;
      if (!turned) turn_columns(strip.numbers.numbers + first, s.depth, scratch.turned);
      turned = true;
      const float* x = scratch.row;
      if (s.source.column == 1 && s.source.element == Matrix::kFloat) {
        x = static_cast<const float*>(s.source.data) + row * s.source.row;
      } else {
        for (int64_t k = 0; k < s.depth; ++k) scratch.row[k] = number_at(s.source, row, k);
      }
      for (; open != 0; open &= open - 1) {
        const int64_t c = first + __builtin_ctz(open);
        const float* const w = scratch.turned + __builtin_ctz(open) * s.depth;
        const float bound =
            rows[row].whole * strip.columns.whole[c] * rounding + strip.columns.slack[c];
        const float quick = dot<float, 64>(x, w, s.depth) + strip.e.bias[c];
        if (decide_entry(strip, row, c, quick, bound)) continue;
        const double pre = dot<double, 32>(x, w, s.depth) + static_cast<double>(strip.e.bias[c]);
        strip.set(row, c, pre > 0, __builtin_fabs(pre) < static_cast<double>(strip.e.width));
      }
    }
  }
}

// ---- strips -------------------------------------------------------------------------------------

// Bits and doubts of rows first .. last; false where there are too many doubts so far.
template <typename I>
bool screen_rows(Strip& strip, int64_t first, int64_t last, int32_t* tile) {
  const UnitStrip& s = strip.s;
  const EncodeStrip& e = strip.e;
  const int64_t deep = held<I>(s.depth);
  const ScreenedRow* const rows = reinterpret_cast<const ScreenedRow*>(s.left);
  for (; first < last; first += kScreenRows) {
    const int64_t end = last - first < kScreenRows ? last : first + kScreenRows;
    const int32_t* const left =
        screened_left<I>(const_cast<uint8_t*>(s.left), s.rows, s.depth, first / kScreenRows);
    for (int64_t c = 0; c < s.columns; c += kScreenColumns) {
      multiply_block<typename I::Block>(left, strip.right + c * deep, deep, tile + c, kScreenStrip,
                                        false);
    }
    for (int64_t row = first; row < end; ++row) {
      uint32_t* const words = e.words + row * kWideWords;
      uint32_t* const window = e.window == nullptr ? nullptr : e.window + row * kWideWords;
      uint32_t* const doubts = strip.doubts + row * kWideWords;
      if (e.keep != nullptr && !e.keep[row]) {
        for (int64_t w = 0; w < n_words(s.columns); ++w) {
          words[w] = doubts[w] = 0;
          if (window != nullptr) window[w] = 0;
        }
        continue;
      }
      screen_row<I>(tile + (row - first) * kScreenStrip, rows[row], strip.columns, s.columns,
                    e.width, words, window, doubts);
      for (int64_t w = 0; w < n_words(s.columns); ++w) strip.open += popcount(doubts[w]);
    }
    const bool judged = end % I::kJudged == 0 || end == s.rows;
    if (judged && strip.open > end * s.columns / I::most_open(end) + 64) return false;
  }
  return true;
}

// Strips side by side, by blocks of rows. finer.decide(index, strip, first, last) comes after each
// block of rows, with what is open there, and finer.prepare(index, strip) once before.
template <typename I, typename Finer>
bool encode_strips(const UnitStrip& s, const EncodeStrip& e, const ScreenScratch<I>& scratch,
                   Finer&& finer) {
  Strip strip[kMostStrips];
  const int64_t width = columns_of_strip(s.depth), strips = (s.columns + width - 1) / width;
  for (int64_t i = 0; i < strips; ++i) strip[i].begin(s, e, i, scratch);
  for (int64_t k = 0; k < s.depth; ++k) {
    for (int64_t i = 0; i < strips; ++i) strip[i].numbers.take(s.right, k, i * width);
  }
  for (int64_t first = 0; first < s.rows; first += kScreenBlock) {
    const int64_t last = s.rows - first < kScreenBlock ? s.rows : first + kScreenBlock;
    for (int64_t i = 0; i < strips; ++i) {
      if (first == 0) {
        strip[i].numbers.end();
        if (!screen_columns<I>(strip[i].numbers, strip[i].right, strip[i].columns)) return false;
      }
      if (!screen_rows<I>(strip[i], first, last, scratch.tile)) return false;
      if (first == 0) finer.prepare(i, strip[i]);
      finer.decide(i, strip[i], first, last);
    }
  }
  for (int64_t i = 0; i < strips; ++i) settle(strip[i], scratch);
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t w = 0; w < n_words(s.columns); ++w) {
      const int64_t from = row * kWideWords + w;
      e.words[row * e.words_stride + w] = scratch.words[from];
      if (e.window != nullptr) e.window[row * e.window_stride + w] = scratch.window[from];
    }
  }
  return true;
}

struct NothingFiner {
  void prepare(int64_t, const Strip&) {}
  void decide(int64_t, const Strip&, int64_t, int64_t) {}
};

bool screen_encode(const UnitStrip& s, const EncodeStrip& e) {
  return encode_strips(s, e, ScreenScratch<ByPairs>(s.scratch, s.depth), NothingFiner());
}

constexpr Screen kScreen = {kScreenRows,
                            1,
                            0,
                            kMostScreened,
                            screen_columns_at_once,
                            screen_panel_bytes<ByPairs>,
                            ScreenScratch<ByPairs>::bytes,
                            screen_pack,
                            screen_encode};

}  // namespace
}  // namespace bae_fast
