// The kernels, once for every instruction set. A file kernels_<level>.cpp defines `Vector` in an
// unnamed namespace and includes this text, so that no function here has external linkage.
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

namespace bae_fast {
namespace {

using Counts = typename Vector::Counts;

constexpr int kRowsBlock = Vector::kRowsBlock;
constexpr int kRegisters = Vector::kRegisters;
constexpr int kLanes = Vector::kLanes;
constexpr int kBlockColumns = kLanes * kRegisters;
static_assert(kStrip % kBlockColumns == 0 && kRowsBlock * kRegisters <= 16);

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

void transpose(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns,
               uint32_t* out, int64_t out_stride) {
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
    const int64_t diagonal = j / kStrip * kStrip;
    const int64_t i1 = t.upper ? diagonal + kStrip : t.i1;
    for (int64_t i = t.i0; i < i1; i += kRowsBlock) {
      const int64_t times = t.upper && i < diagonal ? 2 : 1;
      Counts counts[kRowsBlock][kRegisters];
      const uint32_t* a[kRowsBlock];
      for (int r = 0; r < kRowsBlock; ++r) {
        a[r] = t.columns + i + r;
        for (int c = 0; c < kRegisters; ++c) {
          counts[r][c] = narrow ? Vector::shifted_counts(t.counts + j + c * kLanes)
                                : Vector::no_counts();
        }
      }
      count_pairs<false>(a, t.stride, t.columns + j, t.stride, t.words, counts);
      if (narrow) {
        Counts sum = Vector::no_counts();
#pragma GCC unroll 8
        for (int r = 0; r < kRowsBlock; ++r) {
#pragma GCC unroll 8
          for (int c = 0; c < kRegisters; ++c) {
            const Counts v = Vector::dot_pairs(counts[r][c], static_cast<int32_t>(t.n_rows),
                                               t.counts[i + r]);
            sum = Vector::add_absolute(sum, v);
            if (t.above != nullptr) {
              const int64_t column = j + c * kLanes - t.j0;
              store_signs(t.above, t.planes_stride, i + r - t.i0, column, Vector::above_zero(v));
              store_signs(t.below, t.planes_stride, i + r - t.i0, column, Vector::below_zero(v));
            }
          }
        }
        total += times * Vector::sum_unsigned(sum);
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
            total += times * (v < 0 ? -v : v);
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

// ---- backward of the encoder --------------------------------------------------------------------

// Between the product with W_dec^T and the two products that follow: one row of the strip, with its
// row of B S (unused without a covariance) and n^T S.
template <typename T>
inline void backward_row(const BackwardStrip<T>& s, int64_t n, const int32_t* product,
                         const double* counts_signs) {
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
  if (s.above != nullptr) {
    for (int64_t j = 0; j < columns; ++j) {
      // both terms are integers below 2^53: the difference is exact
      g[j] += static_cast<T>((s.n_rows * product[j] - counts_signs[j]) * s.scale);
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
  }
  for (int64_t n0 = 0; n0 < s.n; n0 += kRowsBlock) {
    if (s.above != nullptr) {
      for (int r = 0; r < kRowsBlock; ++r) {
        rows[r] = s.rows + (n0 + r < s.n ? n0 + r : s.n - 1) * s.rows_stride;
      }
      sign_product(rows, above, below, s.sign_words, products);
    }
    for (int64_t n = n0; n < s.n && n < n0 + kRowsBlock; ++n) {
      backward_row(s, n, products[n - n0], counts_signs);
      sums.add(s.g + n * s.g_stride, s.columns);
    }
  }
  sums.store(s.column_sum, s.columns);
}

void backward_strip_f32(const BackwardStrip<float>& s) { backward_strip(s); }
void backward_strip_f64(const BackwardStrip<double>& s) { backward_strip(s); }

// ---- bits x dense -------------------------------------------------------------------------------

// One cache line of columns; the compiler splits it where registers are narrower.
typedef float Line __attribute__((vector_size(64), aligned(4)));
constexpr int64_t kLineColumns = 16;

// out[0 .. 16 kLines) += sum of the listed rows.
template <int kLines>
inline void add_rows(const float* dense, int64_t stride, const int32_t* list, int64_t count,
                     float* out) {
  Line sum[kLines];
#pragma GCC unroll 4
  for (int l = 0; l < kLines; ++l) __builtin_memset(&sum[l], 0, sizeof(Line));
  for (int64_t k = 0; k < count; ++k) {
    const float* row = dense + list[k] * stride;
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l) {
      Line line;
      __builtin_memcpy(&line, row + l * kLineColumns, sizeof(line));
      sum[l] += line;
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < kLines; ++l) {
    Line line;
    __builtin_memcpy(&line, out + l * kLineColumns, sizeof(line));
    line += sum[l];
    __builtin_memcpy(out + l * kLineColumns, &line, sizeof(line));
  }
}

void gather_product(const BitsProduct& p) {
  int32_t list[kProductDepth];
  for (int64_t k0 = 0; k0 < p.depth; k0 += kProductDepth) {
    const int64_t words = n_words(p.depth - k0 < kProductDepth ? p.depth - k0 : kProductDepth);
    const float* dense = p.dense + k0 * p.dense_stride;
    for (int64_t m = 0; m < p.rows; ++m) {
      const uint32_t* bits = p.bits + m * p.bits_stride + k0 / kWordBits;
      float* out = p.out + m * p.out_stride;
      int64_t count = 0;
      for (int64_t w = 0; w < words; ++w) {
        for (uint32_t rest = bits[w]; rest != 0; rest &= rest - 1) {
          list[count++] = static_cast<int32_t>(w * kWordBits + __builtin_ctz(rest));
        }
      }
      if (!p.add && k0 == 0) {
        for (int64_t c = 0; c < p.columns; ++c) out[c] = 0;
      }
      if (count == 0) continue;
      int64_t c = 0;
      for (; c + 4 * kLineColumns <= p.columns; c += 4 * kLineColumns) {
        add_rows<4>(dense + c, p.dense_stride, list, count, out + c);
      }
      for (; c + kLineColumns <= p.columns; c += kLineColumns) {
        add_rows<1>(dense + c, p.dense_stride, list, count, out + c);
      }
      for (; c < p.columns; ++c) {
        float sum = 0;
        for (int64_t k = 0; k < count; ++k) sum += dense[list[k] * p.dense_stride + c];
        out[c] += sum;
      }
    }
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          kStrip,
          0,
          backward_scratch,
          0,
          transpose,
          column_counts,
          threshold_f32,
          threshold_f64,
          threshold_bf16,
          covariance_tile,
          backward_strip_f32,
          backward_strip_f64,
          gather_product,
          nullptr,
          0,
          nullptr};
}

}  // namespace
}  // namespace bae_fast
