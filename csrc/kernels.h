// What an instruction set provides: one table of functions on raw pointers, filled by each
// kernels_<level>.cpp from the same text (kernels_impl.h). Strides are in elements.
//
// Only types are defined here: a file compiled with AVX flags must emit no function that the
// linker could choose for the others too.
#pragma once

#include <cstdint>

namespace bae_fast {

struct CovarianceTile {
  const uint32_t* columns;  // column-packed [words, stride], zero columns up to a multiple of 64
  int64_t stride;
  int64_t words;          // ceil(N / 32)
  const int32_t* counts;  // ones per column, zero-padded as the columns are
  int64_t n_rows;         // N
  int64_t i0, i1;         // rows of the tile: features, multiples of 4 apart
  int64_t j0, j1;         // columns of the tile: features, multiples of 64 apart
  uint32_t* above;        // [V > 0], row-packed [i1 - i0, planes_stride], or null
  uint32_t* below;        // [V < 0]
  int64_t planes_stride;
  uint8_t* scratch;  // covariance_scratch bytes, cache line aligned
  bool same_rows;    // i0, i1 and scratch are those of the call before
  bool upper;        // i0 == j0: j > i alone counts, planes are unspecified elsewhere
};

template <typename T>
struct BackwardStrip {
  T* g;  // [n, g_stride], gradient at the bits on entry, at pre on return
  int64_t g_stride;
  int64_t n;
  int64_t columns;       // at most 256
  const T* shift;        // per column, or null
  const T* curvature;    // per column, or null
  const uint32_t* bits;  // row-packed, first word of the strip
  int64_t bits_stride;
  const uint32_t* above;  // sign planes [V > 0] of the strip, row-packed [columns, ...]; or null
  const uint32_t* below;  // [V < 0]
  int64_t planes_stride;
  // B S [n, products_stride] and n^T S of the strip where they are there already, in place of
  // planes
  const int32_t* products;
  int64_t products_stride;
  const double* counts_signs;
  int64_t sign_words;    // ceil(K / 32)
  const uint32_t* rows;  // row-packed, all columns: the rows at hand
  int64_t rows_stride;
  const uint32_t* digits;  // bit b of the counts, row-packed [n_digits, sign_words]
  int64_t n_digits;
  double n_rows;
  double scale;            // of N (B S) - n^T S
  const uint32_t* window;  // row-packed, first word of the strip, or null
  int64_t window_stride;
  const T* factor;  // [n, factor_stride], multiplies g, or null
  int64_t factor_stride;
  bool official;       // g (1 - g)
  const bool* keep;    // rows that count, or null
  double* column_sum;  // [columns], sums of the result over rows
  uint8_t* scratch;    // backward_scratch(sign_words) bytes, cache line aligned
};

// out [rows, columns] (+)= bits [rows, depth] dense [depth, columns].
struct BitsProduct {
  const uint32_t* bits;  // row-packed
  int64_t bits_stride;
  const float* dense;
  int64_t dense_stride;
  float* out;
  int64_t out_stride;
  int64_t rows, depth;
  int64_t columns;   // for bits_product at most product_columns
  bool add;          // to what out holds
  uint8_t* scratch;  // gather_scratch or product_scratch bytes, cache line aligned
};

// out [columns] (+)= sum of the listed rows of a dense matrix, read where they lie.
struct ListedRows {
  const int32_t* list;
  int64_t count;
  const void* dense;  // float, or bf16 numbers where `half`
  bool half;
  int64_t dense_stride;
  int64_t columns;
  float* out;
  bool add;  // to what out holds
};

// Elements (i, k) of a matrix at data[i * row + k * column]; one of the strides is 1.
struct Matrix {
  enum Element { kFloat, kBfloat16, kBits };  // bits: row-packed, `row` in words
  const void* data;
  int64_t row, column;
  Element element;
};

// One strip of columns of a product. The left side is packed before, for all threads; the right
// side is read where it lies.
struct UnitStrip {
  const uint8_t* left;  // panels of Units::pack
  Matrix right;         // (k, column)
  int64_t rows, depth;
  int64_t columns;   // at most Units::columns
  int64_t digits;    // where floats are split, 3: as exact as fp32; 1: operands rounded to bf16
  uint8_t* scratch;  // Units::scratch bytes, or Screen's, cache line aligned
  Matrix source;     // the left side where it lies: for a Screen
};

// Bits and window of x W + b.
struct EncodeStrip {
  const float* bias;
  const bool* keep;  // rows that count, or null
  float width;
  uint32_t* words;  // row-packed, first word of the strip
  int64_t words_stride;
  uint32_t* window;  // or null
  int64_t window_stride;
};

// Products of dense matrices, sums in fp32. Where floats are split, a result is false for an
// operand of three digits that is not below 2^127 in size: then what was written is of no use.
struct Units {
  int64_t rows;     // packed at once
  int64_t columns;  // of a strip
  int64_t scratch;
  bool split;  // into digits; else numbers are multiplied as they are
  int64_t (*panel_bytes)(int64_t rows, int64_t depth, int64_t digits);
  // Packs `rows` rows from first, a multiple of `rows`, of [total, depth].
  bool (*pack)(const Matrix& left, int64_t first, int64_t total, int64_t depth, int64_t digits,
               uint8_t* panel);
  bool (*encode)(const UnitStrip& strip, const EncodeStrip& out);
  // out (+)= left right, fp32
  bool (*product)(const UnitStrip& strip, float* out, int64_t out_stride, bool add);
};

constexpr int64_t kScreenedAtOnce = 4096;  // rows of a strip

// Bits of x W + b as those of float64 sums, by products of integers (screened_encode.h). A result
// is false where the operands are not finite or too large, or where the integers decide too few of
// the bits: then what was written is of no use.
struct Screen {
  int64_t rows;                       // packed at once
  int64_t least_rows;                 // that it is faster for than the next
  int64_t tried;                      // rows that show whether it decides enough; or 0
  int64_t depth;                      // the most that is summed
  int64_t (*columns)(int64_t depth);  // of a strip
  int64_t (*panel_bytes)(int64_t rows, int64_t depth);
  int64_t (*scratch_bytes)(int64_t depth);
  bool (*pack)(const Matrix& left, int64_t first, int64_t total, int64_t depth, uint8_t* panel);
  bool (*encode)(const UnitStrip& strip, const EncodeStrip& out);
};

// Lists of rows of a panel: that of output j is index[begin[j step] .. begin[j step + 1]).
template <typename T>
struct SparseLists {
  const int64_t* begin;
  int64_t step;
  int64_t count;          // outputs
  const uint16_t* index;  // rows of the panel
  const T* panel;         // zero past the width, up to a whole register, where that is not whole
  int64_t panel_stride;
  int64_t width;  // columns: at most kPanelBytes of them, or whole cache lines
};

template <typename T>
struct SparseKernels {
  // value[k] += panel row index[k] . row j of the weight, k in list j.
  void (*dots)(const SparseLists<T>& lists, const T* weight, int64_t weight_stride, T* value);

  // Row j of out += sum over k in list j of value[k] times panel row index[k].
  void (*sums)(const SparseLists<T>& lists, const T* value, T* out, int64_t out_stride);

  // out [columns, rows] = in [rows, columns], transposed.
  void (*transpose)(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                    int64_t out_stride);
};

// out[k] += popcount(row & above) - popcount(row & below) for row index[k], or row k without index.
struct SignCounts {
  const uint32_t* rows;  // row-packed
  int64_t rows_stride;
  const uint16_t* index;  // or null
  int64_t count;
  const uint32_t* above;
  const uint32_t* below;
  int64_t words;
  int32_t* out;
};

// One row of a search for a code: see search.cpp.
struct SearchRow {
  float* gain;        // [columns], of flipping each bit
  float* direction;   // [columns], 1 where the bit is off, -1 where it is on
  float* best;        // [ceil(columns / kSearchBlock)], not set on entry
  const float* gram;  // [columns, columns]
  int64_t columns, most;
  float least;
};

constexpr int64_t kSearchBlock = 64;  // columns whose largest gain is kept

struct Kernels {
  const char* name;
  int64_t strip;  // columns of a strip: a multiple of 64, at most 256
  int64_t covariance_scratch;
  int64_t (*backward_scratch)(int64_t sign_words);
  int64_t gather_scratch;
  int64_t product_columns;  // of bits_product; a multiple of 64
  int64_t product_scratch;

  // Transposes bits: rows [rows <= 32, in_stride] of `columns` bits into one word per column,
  // out[column * out_stride].
  void (*transpose)(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns,
                    uint32_t* out, int64_t out_stride);

  // Adds the ones of each of n columns of column-packed [words, stride] words.
  void (*column_counts)(const uint32_t* columns, int64_t stride, int64_t words, int64_t n,
                        int64_t* counts);

  // [pre > 0] and [|pre| < width] of one row, packed; window may be null.
  void (*threshold_f32)(const float* pre, int64_t columns, float width, uint32_t* words,
                        uint32_t* window);
  void (*threshold_f64)(const double* pre, int64_t columns, double width, uint32_t* words,
                        uint32_t* window);
  void (*threshold_bf16)(const uint16_t* pre, int64_t columns, float width, uint32_t* words,
                         uint32_t* window);

  // Sum of |V| over the tile; its sign planes where asked for.
  int64_t (*covariance_tile)(const CovarianceTile& tile);

  void (*backward_strip_f32)(const BackwardStrip<float>& strip);
  void (*backward_strip_f64)(const BackwardStrip<double>& strip);

  // The same for a strip with `products`, which the two above do not read.
  void (*backward_given_f32)(const BackwardStrip<float>& strip);
  void (*backward_given_f64)(const BackwardStrip<double>& strip);

  // Flips bits of one row, the one that gains most first, until none gains more than `least` or
  // `most` are flipped; returns their number.
  int64_t (*search_row)(const SearchRow& row);

  // By adding the rows of `dense` where bits are one: cost goes with the number of ones.
  void (*gather_product)(const BitsProduct& product);

  // At the same cost for any bits. False where `dense` is not finite and the kernel needs it to be:
  // then what was written is of no use.
  bool (*bits_product)(const BitsProduct& product);

  const Units* units;        // or null
  const Screen* screens[2];  // by bytes, then by pairs (screened_bytes.h), or null

  // kernels_sparse.h
  SparseKernels<float> sparse_f32;
  SparseKernels<double> sparse_f64;
  void (*sign_counts)(const SignCounts& signs);

  // Writes the number of every one among the bits of n words, rising, and returns how many there
  // are: as many as out must have room for.
  int64_t (*set_bits)(const uint32_t* words, int64_t n, int32_t* out);

  void (*add_listed_rows)(const ListedRows& rows);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace bae_fast
