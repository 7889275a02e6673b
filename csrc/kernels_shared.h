// What every instruction set compiles of the same text: bits, thresholds, the arithmetic between
// the products of the backward, products of bits and dense numbers. A file kernels_<level>.cpp
// defines `Vector` in an unnamed namespace and includes this, so that no function here has external
// linkage. How pairs are counted is in kernels_impl.h (popcounts) or kernels_lookup.h (tables).
#pragma once

namespace bae_fast {
namespace {

// ---- bits ---------------------------------------------------------------------------------------

// Transposes 16 square blocks of 32 x 32 bits at once, one block a lane: rounds that swap
// off-diagonal squares of side 16, 8, 4, 2, 1 (Warren, Hacker's Delight, 2nd ed., section 7-3).
template <int kSide>
inline void swap_squares(uint32_t (*a)[16], uint32_t low) {
  for (int k = 0; k < 32; k = ((k | kSide) + 1) & ~kSide) {
    for (int lane = 0; lane < 16; ++lane) {
      const uint32_t swap = ((a[k][lane] >> kSide) ^ a[k + kSide][lane]) & low;
      a[k + kSide][lane] ^= swap;
      a[k][lane] ^= swap << kSide;
    }
  }
}

void transpose(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
               int64_t out_stride) {
  alignas(64) uint32_t a[32][16];
  const int64_t words = n_words(columns);
  for (int64_t w = 0; w < words; w += 16) {
    const int64_t used = words - w < 16 ? words - w : 16;
    if (rows == 32 && used == 16) {
      for (int64_t r = 0; r < 32; ++r) __builtin_memcpy(a[r], in + r * in_stride + w, 64);
    } else {
      for (int64_t r = 0; r < 32; ++r) {
        for (int64_t lane = 0; lane < 16; ++lane) {
          a[r][lane] = r < rows && lane < used ? in[r * in_stride + w + lane] : 0;
        }
      }
    }
    swap_squares<16>(a, 0x0000FFFF);
    swap_squares<8>(a, 0x00FF00FF);
    swap_squares<4>(a, 0x0F0F0F0F);
    swap_squares<2>(a, 0x33333333);
    swap_squares<1>(a, 0x55555555);
    for (int64_t lane = 0; lane < used; ++lane) {
      const int64_t first = (w + lane) * kWordBits;
      const int64_t last = columns - first < kWordBits ? columns - first : kWordBits;
      for (int64_t c = 0; c < last; ++c) out[(first + c) * out_stride] = a[c][lane];
    }
  }
}

inline uint32_t popcount(uint32_t v) {
  v -= (v >> 1) & 0x55555555;
  v = (v & 0x33333333) + ((v >> 2) & 0x33333333);
  return (((v + (v >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24;
}

void column_counts(const uint32_t* columns, int64_t stride, int64_t words, int64_t n,
                   int64_t* counts) {
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t j = 0; j < n; ++j) counts[j] += popcount(columns[w * stride + j]);
  }
}

// ---- threshold ----------------------------------------------------------------------------------

// NaN compares false both times.
template <typename T>
inline void compare_word(const T* pre, int64_t used, T width, uint32_t* word, uint32_t* inside) {
  uint32_t positive = 0, within = 0;
  for (int64_t t = 0; t < used; ++t) {
    positive |= static_cast<uint32_t>(pre[t] > 0) << t;
    within |= static_cast<uint32_t>(pre[t] < width && pre[t] > -width) << t;
  }
  *word = positive;
  if (inside != nullptr) *inside = within;
}

void threshold_f32(const float* pre, int64_t columns, float width, uint32_t* words,
                   uint32_t* window) {
  int64_t w = 0;
  for (; (w + 1) * kWordBits <= columns; ++w) {
    words[w] = Vector::positive(pre + w * kWordBits);
    if (window != nullptr) window[w] = Vector::within(pre + w * kWordBits, width);
  }
  if (w * kWordBits < columns) {
    compare_word(pre + w * kWordBits, columns - w * kWordBits, width, words + w,
                 window == nullptr ? nullptr : window + w);
  }
}

void threshold_f64(const double* pre, int64_t columns, double width, uint32_t* words,
                   uint32_t* window) {
  for (int64_t w = 0; w * kWordBits < columns; ++w) {
    const int64_t rest = columns - w * kWordBits;
    compare_word(pre + w * kWordBits, rest < kWordBits ? rest : kWordBits, width, words + w,
                 window == nullptr ? nullptr : window + w);
  }
}

void threshold_bf16(const uint16_t* pre, int64_t columns, float width, uint32_t* words,
                    uint32_t* window) {
  alignas(64) float wide[kWordBits];
  for (int64_t w = 0; w * kWordBits < columns; ++w) {
    const int64_t rest = columns - w * kWordBits;
    const int64_t used = rest < kWordBits ? rest : kWordBits;
    uint32_t high[kWordBits];
    for (int64_t t = 0; t < kWordBits; ++t) {
      high[t] = t < used ? static_cast<uint32_t>(pre[w * kWordBits + t]) << 16 : 0;
    }
    __builtin_memcpy(wide, high, sizeof(wide));
    const uint32_t valid = used == kWordBits ? ~0u : (1u << used) - 1;
    words[w] = Vector::positive(wide) & valid;
    if (window != nullptr) window[w] = Vector::within(wide, width) & valid;
  }
}

// ---- backward of the encoder --------------------------------------------------------------------

// Whether |N (B S) - n^T S| <= N K and both its terms fit an int32.
template <typename T>
inline bool counts_signs_fit(const BackwardStrip<T>& s) {
  return s.n_rows * static_cast<double>(s.sign_words * kWordBits) < 2147483648.0;
}

// Between the product with W_dec^T and the two products that follow: one row of the strip, with its
// row of B S (unused without a covariance) and n^T S, in an Integer that holds N (B S) - n^T S:
// int32 where counts_signs_fit, else double.
template <typename T, typename Integer>
inline void backward_row(const BackwardStrip<T>& s, int64_t n, const int32_t* product,
                         const Integer* counts_signs) {
  const int64_t columns = s.columns;
  T* g = s.g + n * s.g_stride;
  if (s.shift != nullptr) {
    for (int64_t j = 0; j < columns; ++j) g[j] += s.shift[j];
  }
  if (s.curvature != nullptr) {
    for (int64_t j = 0; j < columns; ++j) {
      const uint32_t bit = s.bits[n * s.bits_stride + j / kWordBits] >> (j % kWordBits) & 1;
      g[j] += bit != 0 ? -s.curvature[j] : s.curvature[j];
    }
  }
  if (s.above != nullptr || s.products != nullptr) {
    // both terms are integers that fit: the difference is exact, and rounded once before the scale
    const Integer n_rows = static_cast<Integer>(s.n_rows);
    const T scale = static_cast<T>(s.scale);
    for (int64_t j = 0; j < columns; ++j) {
      g[j] += static_cast<T>(n_rows * product[j] - counts_signs[j]) * scale;
    }
  }
  if (s.official) {
    for (int64_t j = 0; j < columns; ++j) g[j] *= 1 - g[j];
  }
  if (s.factor != nullptr) {
    const T* factor = s.factor + n * s.factor_stride;
    for (int64_t j = 0; j < columns; ++j) g[j] *= factor[j];
  }
  if (s.window != nullptr) {
    // not g * window: a non-finite gradient outside the window must not turn into NaN
    for (int64_t j = 0; j < columns; ++j) {
      const uint32_t word = s.window[n * s.window_stride + j / kWordBits];
      g[j] = (word >> (j % kWordBits) & 1) != 0 ? g[j] : 0;
    }
  }
  if (s.keep != nullptr && !s.keep[n]) {
    for (int64_t j = 0; j < columns; ++j) g[j] = 0;
  }
}

// Sums over rows: short ones in T, their sum in double, no worse than a pairwise sum.
template <typename T>
struct ColumnSums {
  alignas(64) T partial[kMaxStrip] = {};
  alignas(64) double total[kMaxStrip] = {};
  int64_t pending = 0;

  void flush(int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
      total[j] += partial[j];
      partial[j] = 0;
    }
    pending = 0;
  }
  void add(const T* g, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) partial[j] += g[j];
    if (++pending == 32) flush(columns);
  }
  void store(double* out, int64_t columns) {
    flush(columns);
    for (int64_t j = 0; j < columns; ++j) out[j] = total[j];
  }
};

// A strip whose products with the signs are there.
template <typename T>
void backward_given(const BackwardStrip<T>& s) {
  alignas(64) int32_t narrow_counts_signs[kMaxStrip] = {};
  const bool narrow = counts_signs_fit(s);
  for (int64_t j = 0; narrow && j < s.columns; ++j) {
    narrow_counts_signs[j] = static_cast<int32_t>(s.counts_signs[j]);
  }
  ColumnSums<T> sums;
  for (int64_t n = 0; n < s.n; ++n) {
    const int32_t* product = s.products + n * s.products_stride;
    if (narrow) {
      backward_row(s, n, product, narrow_counts_signs);
    } else {
      backward_row(s, n, product, s.counts_signs);
    }
    sums.add(s.g + n * s.g_stride, s.columns);
  }
  sums.store(s.column_sum, s.columns);
}

void backward_given_f32(const BackwardStrip<float>& s) { backward_given(s); }
void backward_given_f64(const BackwardStrip<double>& s) { backward_given(s); }

// ---- bits x dense -------------------------------------------------------------------------------

constexpr int64_t kLineColumns = 16;

// One cache line of columns in registers.
struct Line {
  typedef float Piece __attribute__((vector_size(Vector::kFloats * 4)));
  static constexpr int kPieces = kLineColumns / Vector::kFloats;
  Piece piece[kPieces];

  void operator+=(const Line& other) {
#pragma GCC unroll 4
    for (int k = 0; k < kPieces; ++k) piece[k] += other.piece[k];
  }
};

inline Line load_line(const float* p) {
  Line line;
#pragma GCC unroll 4
  for (int k = 0; k < Line::kPieces; ++k) {
    __builtin_memcpy(&line.piece[k], p + k * Vector::kFloats, sizeof(Line::Piece));
  }
  return line;
}
inline void store_line(float* p, const Line& line) {
#pragma GCC unroll 4
  for (int k = 0; k < Line::kPieces; ++k) {
    __builtin_memcpy(p + k * Vector::kFloats, &line.piece[k], sizeof(Line::Piece));
  }
}
inline void add_line(float* p, Line line) {
  line += load_line(p);
  store_line(p, line);
}

// Rows of `dense` lie on pages of their own, where nothing else fetches ahead.
inline void prefetch_line(const BitsProduct& p, int64_t row, int64_t column) {
  if (row < p.depth && column < p.columns) {
    __builtin_prefetch(p.dense + row * p.dense_stride + column, 0, 2);
  }
}

// Columns first .. of out, at most `lines` lines: stores the sums, or adds them.
inline void finish_lines(const BitsProduct& p, int64_t row, int64_t first, const float* sums,
                         int64_t lines, bool add) {
  float* out = p.out + row * p.out_stride + first;
  const int64_t rest = p.columns - first;
  const int64_t columns = rest < lines * kLineColumns ? rest : lines * kLineColumns;
  int64_t c = 0;
  for (; c + kLineColumns <= columns; c += kLineColumns) {
    if (add) {
      add_line(out + c, load_line(sums + c));
    } else {
      store_line(out + c, load_line(sums + c));
    }
  }
  for (; c < columns; ++c) out[c] = add ? out[c] + sums[c] : sums[c];
}

// ---- by adding rows -----------------------------------------------------------------------------
//
// Rows of `dense` are first copied to a block of kGatherDepth x kGatherColumns without gaps: where
// they lie, at a power of two from each other, they would share few sets of the caches. The ones of
// many rows of bits are listed once and serve all columns.

constexpr int64_t kGatherDepth = 512, kGatherColumns = 128;
constexpr int64_t kListed = 1 << 17;      // ones listed at once
constexpr int64_t kListedRows = 1 << 13;  // and their rows
constexpr int64_t kGatherScratch =
    kGatherDepth * kGatherColumns * 4 + kListed * 2 + (kListedRows + 1) * 4;

inline void copy_block(const BitsProduct& p, int64_t k0, int64_t depth, int64_t first,
                       float* block) {
  const int64_t rest = p.columns - first;
  const int64_t columns = rest < kGatherColumns ? rest : kGatherColumns;
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = p.dense + (k0 + k) * p.dense_stride + first;
    float* to = block + k * kGatherColumns;
    if (columns == kGatherColumns) {
      __builtin_memcpy(to, from, kGatherColumns * sizeof(float));
      continue;
    }
    __builtin_memcpy(to, from, columns * sizeof(float));
    for (int64_t c = columns; c < round_up(columns, kLineColumns); ++c) to[c] = 0;
  }
}

// out[0 .. 16 kLines) (+)= sum of the listed rows of the block, from zero: a blocked sum.
template <int kLines>
inline void add_rows(const float* block, const uint16_t* list, int64_t count, float* out,
                     bool add) {
  Line sum[kLines];
#pragma GCC unroll 8
  for (int l = 0; l < kLines; ++l) sum[l] = Line{};
  for (int64_t k = 0; k < count; ++k) {
    const float* row = block + list[k] * kGatherColumns;
#pragma GCC unroll 8
    for (int l = 0; l < kLines; ++l) sum[l] += load_line(row + l * kLineColumns);
  }
#pragma GCC unroll 8
  for (int l = 0; l < kLines; ++l) {
    if (add) {
      add_line(out + l * kLineColumns, sum[l]);
    } else {
      store_line(out + l * kLineColumns, sum[l]);
    }
  }
}

void gather_product(const BitsProduct& p) {
  constexpr int64_t kSpan = Vector::kLines * kLineColumns;
  static_assert(kGatherColumns % kSpan == 0);
  float* const block = reinterpret_cast<float*>(p.scratch);
  int32_t* const starts = reinterpret_cast<int32_t*>(block + kGatherDepth * kGatherColumns);
  uint16_t* const list = reinterpret_cast<uint16_t*>(starts + kListedRows + 1);
  alignas(64) float sums[kSpan];
  for (int64_t k0 = 0; k0 < p.depth; k0 += kGatherDepth) {
    const int64_t depth = p.depth - k0 < kGatherDepth ? p.depth - k0 : kGatherDepth;
    const bool add = p.add || k0 > 0;
    for (int64_t m0 = 0, m1 = 0; m0 < p.rows; m0 = m1) {
      int32_t count = 0;
      for (; m1 < p.rows && m1 - m0 < kListedRows && count + kGatherDepth <= kListed; ++m1) {
        const uint32_t* bits = p.bits + m1 * p.bits_stride + k0 / kWordBits;
        starts[m1 - m0] = count;
        for (int64_t w = 0; w < n_words(depth); ++w) {
          for (uint32_t rest = bits[w]; rest != 0; rest &= rest - 1) {
            list[count++] = static_cast<uint16_t>(w * kWordBits + __builtin_ctz(rest));
          }
        }
      }
      starts[m1 - m0] = count;
      for (int64_t c0 = 0; c0 < p.columns; c0 += kGatherColumns) {
        copy_block(p, k0, depth, c0, block);
        for (int64_t m = m0; m < m1; ++m) {
          const int32_t first = starts[m - m0], ones = starts[m - m0 + 1] - first;
          if (ones == 0 && add) continue;
          for (int64_t c = 0; c < kGatherColumns && m - m0 < kGatherDepth; c += kLineColumns) {
            prefetch_line(p, k0 + m - m0, c0 + kGatherColumns + c);  // of the next block
          }
          for (int64_t c = 0; c < kGatherColumns && c0 + c < p.columns; c += kSpan) {
            if (c0 + c + kSpan <= p.columns) {
              float* out = p.out + m * p.out_stride + c0 + c;
              add_rows<Vector::kLines>(block + c, list + first, ones, out, add);
            } else {
              add_rows<Vector::kLines>(block + c, list + first, ones, sums, false);
              finish_lines(p, m, c0 + c, sums, Vector::kLines, add);
            }
          }
        }
      }
    }
  }
}

// ---- by tables of sums --------------------------------------------------------------------------
//
// For five rows of `dense` all 32 sums are made once; then one addition serves five bits of every
// row, at any density. The tables of eight such groups stay in the inner cache, and the sums of 40
// rows of `dense` are made in registers: a blocked sum.
//
//     tables  [line of columns][group][sum], a cache line each
//     index   [40 bits of depth][row][group], a byte: where the sum is, in units of 8 bytes

constexpr int64_t kGroupBits = 5, kGroups = 8, kPassBits = kGroupBits * kGroups;
constexpr int64_t kGroupSums = int64_t{1} << kGroupBits;
constexpr int64_t kTableLines = 2;    // lines of columns
constexpr int64_t kTablePasses = 64;  // passes whose indices are made at once
constexpr int64_t kTableRows = 512;   // rows whose sums rest in memory
constexpr int64_t kSumColumns = 128;  // and their columns: written out by several lines a page
constexpr int64_t kTableColumns = kTableLines * kLineColumns;
constexpr int64_t kLineFloats = kGroups * kGroupSums * kLineColumns;  // of one line's tables
constexpr int64_t kTableScratch = kTableLines * kLineFloats * 4 +
                                  kTablePasses * kTableRows * kGroups +
                                  kTableRows * kSumColumns * 4;
static_assert(kTablePasses * kPassBits % kWordBits == 0);

// 40 bits to eight bytes of five bits, times 8.
inline uint64_t spread_groups(uint64_t bits) {
  bits = (bits & 0xFFFFF) | (bits & 0xFFFFF00000) << 12;
  bits = (bits & 0x000003FF000003FF) | (bits & 0x000FFC00000FFC00) << 6;
  bits = (bits & 0x001F001F001F001F) | (bits & 0x03E003E003E003E0) << 3;
  return bits << 3;
}

// A line of columns of one row of `dense`, zero past its end.
inline Line dense_line(const BitsProduct& p, int64_t row, int64_t column) {
  const float* from = p.dense + row * p.dense_stride + column;
  if (row < p.depth && column + kLineColumns <= p.columns) return load_line(from);
  alignas(64) float part[kLineColumns] = {};
  if (row < p.depth && column < p.columns) {
    __builtin_memcpy(part, from, (p.columns - column) * sizeof(float));
  }
  return load_line(part);
}

// out[s] = sum of the lines where s has a bit, s < 2^kCount.
template <int kCount>
inline void all_sums(const Line (&lines)[kCount], Line (&out)[1 << kCount]) {
  out[0] = Line{};
#pragma GCC unroll 4
  for (int b = 0; b < kCount; ++b) {
#pragma GCC unroll 8
    for (int s = 0; s < 1 << b; ++s) {
      out[(1 << b) + s] = lines[b];
      if (s > 0) out[(1 << b) + s] += out[s];
    }
  }
}

// Tables of the rows k .. of `dense`, at most 40, and a line of columns.
inline void make_tables(const BitsProduct& p, int64_t k, int64_t column, float* tables) {
  for (int64_t g = 0; g < kGroups; ++g) {
    const int64_t row = k + g * kGroupBits;
    const Line first[3] = {dense_line(p, row, column), dense_line(p, row + 1, column),
                           dense_line(p, row + 2, column)};
    const Line last[2] = {dense_line(p, row + 3, column), dense_line(p, row + 4, column)};
    Line low[8], high[4];
    all_sums(first, low);
    all_sums(last, high);
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
#pragma GCC unroll 8
      for (int l = 0; l < 8; ++l) {
        Line sum = low[l];
        sum += high[h];
        store_line(tables + (g * kGroupSums + h * 8 + l) * kLineColumns, sum);
      }
    }
  }
}

// sums (+)= the sums of one row's groups.
template <bool kAdd>
inline void add_groups(const float* tables, const uint8_t* index, float* sums) {
  Line sum[kTableLines];
#pragma GCC unroll 8
  for (int64_t g = 0; g < kGroups; ++g) {
    const float* at = tables + 2 * static_cast<uint64_t>(index[g]) + g * kGroupSums * kLineColumns;
#pragma GCC unroll 2
    for (int64_t l = 0; l < kTableLines; ++l) {
      if (g == 0) {
        sum[l] = load_line(at + l * kLineFloats);
      } else {
        sum[l] += load_line(at + l * kLineFloats);
      }
    }
  }
#pragma GCC unroll 2
  for (int64_t l = 0; l < kTableLines; ++l) {
    if (kAdd) {
      add_line(sums + l * kLineColumns, sum[l]);
    } else {
      store_line(sums + l * kLineColumns, sum[l]);
    }
  }
}

bool table_product(const BitsProduct& p) {
  float* const tables = reinterpret_cast<float*>(p.scratch);
  float* const sums = tables + kTableLines * kLineFloats;
  uint8_t* const index = reinterpret_cast<uint8_t*>(sums + kTableRows * kSumColumns);
  const int64_t bytes = n_words(p.depth) * 4;  // of a row of bits
  for (int64_t m0 = 0; m0 < p.rows; m0 += kTableRows) {
    const int64_t rows = p.rows - m0 < kTableRows ? p.rows - m0 : kTableRows;
    for (int64_t k0 = 0; k0 < p.depth; k0 += kTablePasses * kPassBits) {
      const int64_t rest = (p.depth - k0 + kPassBits - 1) / kPassBits;
      const int64_t passes = rest < kTablePasses ? rest : kTablePasses;
      for (int64_t m = 0; m < rows; ++m) {
        const uint8_t* bits = reinterpret_cast<const uint8_t*>(p.bits + (m0 + m) * p.bits_stride);
        for (int64_t t = 0; t < passes; ++t) {
          const int64_t at = k0 / 8 + t * kPassBits / 8;
          uint64_t word = 0;
          if (at + 8 <= bytes) {
            __builtin_memcpy(&word, bits + at, 8);
          } else {
            __builtin_memcpy(&word, bits + at, bytes - at);
          }
          word = spread_groups(word);
          __builtin_memcpy(index + (t * kTableRows + m) * kGroups, &word, 8);
        }
      }
      for (int64_t c = 0; c < p.columns; c += kTableColumns) {
        float* const of_columns = sums + c % kSumColumns * kTableRows;
        for (int64_t t = 0; t < passes; ++t) {
          const int64_t k = k0 + t * kPassBits;
          for (int64_t l = 0; l < kTableLines; ++l) {
            make_tables(p, k, c + l * kLineColumns, tables + l * kLineFloats);
          }
          // for the next tables, spread over the rows
          auto prefetch = [&](int64_t m) {
            if (m % 4 != 0 || m / 8 >= kPassBits) return;
            prefetch_line(p, k + kPassBits + m / 8, c + m % 8 / 4 * kLineColumns);
          };
          const uint8_t* of_row = index + t * kTableRows * kGroups;
          if (t == 0) {
            for (int64_t m = 0; m < rows; ++m) {
              prefetch(m);
              add_groups<false>(tables, of_row + m * kGroups, of_columns + m * kTableColumns);
            }
          } else {
            for (int64_t m = 0; m < rows; ++m) {
              prefetch(m);
              add_groups<true>(tables, of_row + m * kGroups, of_columns + m * kTableColumns);
            }
          }
        }
        const int64_t first = c / kSumColumns * kSumColumns;
        if (c + kTableColumns < first + kSumColumns && c + kTableColumns < p.columns) continue;
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t at = first; at <= c; at += kTableColumns) {
            finish_lines(p, m0 + m, at, sums + (at - first) * kTableRows + m * kTableColumns,
                         kTableLines, p.add || k0 > 0);
          }
        }
      }
    }
  }
  return true;
}

// ---- search for a code --------------------------------------------------------------------------

// The gains of a block after the flip, and the largest of them. Products with a direction are
// exact, so every instruction set gives the same gains.
inline float update_gains(float* gain, const float* direction, const float* gram, float flipped,
                          int64_t columns) {
  constexpr int64_t kLanesAtOnce = 16;
  float lane[kLanesAtOnce];
  for (float& value : lane) value = -__builtin_inff();
  int64_t j = 0;
  for (; j + kLanesAtOnce <= columns; j += kLanesAtOnce) {
    for (int64_t l = 0; l < kLanesAtOnce; ++l) {
      const float value = gain[j + l] - flipped * direction[j + l] * gram[j + l];
      gain[j + l] = value;
      lane[l] = lane[l] < value ? value : lane[l];
    }
  }
  float best = -__builtin_inff();
  for (; j < columns; ++j) {
    gain[j] -= flipped * direction[j] * gram[j];
    best = best < gain[j] ? gain[j] : best;
  }
  for (float value : lane) best = best < value ? value : best;
  return best;
}

inline float largest(const float* values, int64_t n) {
  float best = -__builtin_inff();
  for (int64_t j = 0; j < n; ++j) best = best < values[j] ? values[j] : best;
  return best;
}

int64_t search_row(const SearchRow& s) {
  const auto width = [&](int64_t first) {
    return s.columns - first < kSearchBlock ? s.columns - first : kSearchBlock;
  };
  const int64_t blocks = (s.columns + kSearchBlock - 1) / kSearchBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    s.best[b] = largest(s.gain + b * kSearchBlock, width(b * kSearchBlock));
  }
  int64_t flips = 0;
  for (; flips < s.most; ++flips) {
    int64_t top = -1;
    float gained = s.least;
    for (int64_t b = 0; b < blocks; ++b) {
      if (s.best[b] > gained) gained = s.best[b], top = b;
    }
    if (top < 0) break;  // a row that holds NaN ends here too
    int64_t at = top * kSearchBlock;
    while (s.gain[at] != gained) ++at;
    const float flipped = s.direction[at];
    const float* const gram = s.gram + at * s.columns;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t j = b * kSearchBlock;
      s.best[b] = update_gains(s.gain + j, s.direction + j, gram + j, flipped, width(j));
    }
    // flipping it back loses what was gained
    s.direction[at] = -flipped;
    s.gain[at] = -gained;
    s.best[top] = largest(s.gain + top * kSearchBlock, width(top * kSearchBlock));
  }
  return flips;
}

// All but what counts pairs. A level with a bits_product of its own says how many columns it takes.
constexpr Kernels make_shared_kernels(const char* name, int64_t product_columns) {
  Kernels k{};
  k.name = name;
  k.strip = kStrip;
  k.transpose = transpose;
  k.column_counts = column_counts;
  k.threshold_f32 = threshold_f32;
  k.threshold_f64 = threshold_f64;
  k.threshold_bf16 = threshold_bf16;
  k.gather_scratch = kGatherScratch;
  k.gather_product = gather_product;
  k.product_columns = product_columns;
  k.product_scratch = kTableScratch;
  k.bits_product = table_product;
  k.search_row = search_row;
  k.backward_given_f32 = backward_given_f32;
  k.backward_given_f64 = backward_given_f64;
  return k;
}

}  // namespace
}  // namespace bae_fast
