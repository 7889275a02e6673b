// B S by look-ups in tables of bytes. A file kernels_<level>.cpp defines `Lookup` in an unnamed
// namespace after kernels_shared.h and includes this text.
//
// For g summed features (4 or 6) and one column, the sum of the signs over the bits that are set is
// a table of 2^g signed bytes; one byte shuffle looks it up for as many rows as a register has
// bytes. Three-valued signs need one look-up, where popcounts need two planes: g x 32 or g x 64
// products a shuffle and an add.
//
//     lanes   [step][row], a byte: the bits of one row in the g features of the step
//     index   [column][step]: where the table of the step is found
//
// Bytes are widened before they pass 127, 16-bit sums after a chunk of features; between chunks the
// sums rest in memory in int32. Both sides of a chunk stay in the outer cache.

namespace bae_fast {
namespace {

// Rows whose sums rest in memory: as many as whole panels hold, and the digits of n.
constexpr int64_t kWholeRows = 512, kSumRows = kWholeRows + 64;
constexpr int kAtOnce = Lookup::kColumns;
constexpr int64_t kUnroll = 4;  // steps: short loops, whose ends are foreseen
static_assert(Lookup::kUnitSteps % kUnroll == 0);

// 16-bit sums of the looked-up bytes: columns, registers of rows, even and odd bytes.
template <int kVectors>
using Sums = typename Lookup::Wide[kAtOnce][kVectors][2];

// Not inline: the sums shall stay in memory, the bytes in registers.
template <int kVectors, bool kSigned>
__attribute__((noinline)) void look_up(const uint8_t* lanes, const uint8_t* const (&index)[kAtOnce],
                                       int64_t steps, Sums<kVectors>& sums) {
  constexpr int64_t kFlush = (kSigned ? 127 : 255) / Lookup::kGroup / kUnroll * kUnroll;
#pragma GCC unroll 8
  for (int c = 0; c < kAtOnce; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[c][v][0] = sums[c][v][1] = Lookup::zero();
  }
  for (int64_t s0 = 0; s0 < steps; s0 += kFlush) {
    const int64_t s1 = steps - s0 < kFlush ? steps : s0 + kFlush;
    typename Lookup::Bytes bytes[kAtOnce][kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kAtOnce; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) bytes[c][v] = Lookup::zero();
    }
    for (int64_t s = s0; s < s1; s += kUnroll) {
#pragma GCC unroll 4
      for (int64_t u = s; u < s + kUnroll; ++u) {
        typename Lookup::Bytes rows[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          rows[v] = Lookup::load(lanes + (u * kVectors + v) * Lookup::kRows);
        }
#pragma GCC unroll 8
        for (int c = 0; c < kAtOnce; ++c) {
          const typename Lookup::Bytes table = Lookup::table(index[c], u);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            bytes[c][v] = Lookup::add(bytes[c][v], Lookup::look_up(table, rows[v]));
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kAtOnce; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const auto even = Lookup::template even<kSigned>(bytes[c][v]);
        const auto odd = Lookup::template odd<kSigned>(bytes[c][v]);
        sums[c][v][0] = Lookup::add_wide(sums[c][v][0], even);
        sums[c][v][1] = Lookup::add_wide(sums[c][v][1], odd);
      }
    }
  }
}

// Rows as panels of lanes: registers of a panel, a power of two.
inline int panel_vectors(int64_t rows) {
  int vectors = Lookup::kVectors;
  while (vectors > 1 && (vectors - 1) * Lookup::kRows >= rows) vectors /= 2;
  return vectors;
}

// Adds kAtOnce columns of one chunk to the sums [column][row of the panel].
template <int kVectors>
inline void add_products(int vectors, const uint8_t* lanes, const uint8_t* const (&index)[kAtOnce],
                         int64_t steps, bool resume, int32_t* out) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return add_products<kVectors / 2>(vectors, lanes, index, steps, resume, out);
    }
  }
  Sums<kVectors> sums;
  look_up<kVectors, true>(lanes, index, steps, sums);
  for (int c = 0; c < kAtOnce; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      Lookup::add_to(out + (c * kVectors + v) * Lookup::kRows, sums[c][v], resume);
    }
  }
}

constexpr int64_t kChunkSteps = Lookup::kChunkWords / Lookup::kUnitWords * Lookup::kUnitSteps;
// of one column; columns do not share a set of the cache
constexpr int64_t kIndexBytes = kChunkSteps * Lookup::kIndexBytes + 64;

int64_t lookup_backward_scratch(int64_t) {
  return kSumRows * kChunkSteps + kMaxStrip * kIndexBytes + kSumRows * kMaxStrip * 4;
}

template <typename T>
void lookup_backward_strip(const BackwardStrip<T>& s) {
  alignas(64) double counts_signs[kMaxStrip] = {};  // n^T S, an integer
  alignas(64) int32_t narrow_counts_signs[kMaxStrip] = {};
  constexpr int64_t kPanelRows = Lookup::kVectors * Lookup::kRows;
  constexpr int64_t kGroupWords = 4 * Lookup::kUnitWords;  // read from each row at once
  alignas(64) uint32_t words_of_rows[kGroupWords][kPanelRows];
  constexpr int64_t kTurned = 16;  // rows turned at once: one cache line of each column's sums
  alignas(64) int32_t products[kTurned][kMaxStrip];
  ColumnSums<T> column_sums;
  uint8_t* const lanes = s.scratch;
  uint8_t* const index = lanes + kSumRows * kChunkSteps;
  int32_t* const resting = reinterpret_cast<int32_t*>(index + kMaxStrip * kIndexBytes);
  const bool covariance = s.above != nullptr, narrow = counts_signs_fit(s);
  const int64_t digits = covariance ? s.n_digits : 0, rows = digits + s.n;
  const int64_t columns = round_up(s.columns, kAtOnce);
  for (int64_t n0 = 0, n1 = 0; n0 < rows; n0 = n1) {
    n1 = rows - n0 <= kSumRows ? rows : n0 + kWholeRows;
    for (int64_t w0 = 0; covariance && w0 < s.sign_words; w0 += Lookup::kChunkWords) {
      const int64_t words =
          s.sign_words - w0 < Lookup::kChunkWords ? s.sign_words - w0 : Lookup::kChunkWords;
      const int64_t units = (words + Lookup::kUnitWords - 1) / Lookup::kUnitWords;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = (j < s.columns ? j : 0) * s.planes_stride + w0;
        Lookup::fill_index(s.above + at, s.below + at, words, index + j * kIndexBytes);
      }
      for (int64_t n = n0; n < n1;) {
        const int vectors = panel_vectors(n1 - n);
        const int64_t panel = vectors * Lookup::kRows;
        uint8_t* const to = lanes + (n - n0) * kChunkSteps;
        for (int64_t g = 0; g < words; g += kGroupWords) {
          for (int64_t r = 0; r < panel; ++r) {
            const int64_t row = n + r < n1 ? n + r : n1 - 1;
            const uint32_t* bits = row < digits ? s.digits + row * s.sign_words
                                                : s.rows + (row - digits) * s.rows_stride;
            uint32_t group[kGroupWords] = {};
            if (g + kGroupWords <= words) {
              __builtin_memcpy(group, bits + w0 + g, sizeof(group));
            } else {
              __builtin_memcpy(group, bits + w0 + g, (words - g) * sizeof(uint32_t));
            }
            for (int64_t k = 0; k < kGroupWords; ++k) words_of_rows[k][r] = group[k];
          }
          for (int64_t k = 0; k < kGroupWords && g + k < words; k += Lookup::kUnitWords) {
            const int64_t step = (g + k) / Lookup::kUnitWords * Lookup::kUnitSteps;
            for (int v = 0; v < vectors; ++v) {
              Lookup::fill_lanes(words_of_rows[k] + v * Lookup::kRows, kPanelRows,
                                 to + step * panel + v * Lookup::kRows, panel);
            }
          }
        }
        for (int64_t j = 0; j < columns; j += kAtOnce) {
          const uint8_t* of_column[kAtOnce];
          for (int c = 0; c < kAtOnce; ++c) of_column[c] = index + (j + c) * kIndexBytes;
          add_products<Lookup::kVectors>(vectors, to, of_column, units * Lookup::kUnitSteps, w0 > 0,
                                         resting + (n - n0) * kMaxStrip + j * panel);
        }
        n += panel;
      }
    }
    for (int64_t n = n0; n < n1;) {
      const int64_t panel = panel_vectors(n1 - n) * Lookup::kRows;
      for (int64_t r0 = 0; r0 < panel && n + r0 < n1; r0 += kTurned) {
        for (int64_t j = 0; covariance && j < columns; ++j) {
          const int32_t* from = resting + (n - n0) * kMaxStrip + j * panel + r0;
          for (int64_t r = 0; r < kTurned; ++r) products[r][j] = from[r];
        }
        for (int64_t row = n + r0; row < n1 && row < n + r0 + kTurned; ++row) {
          const int32_t* product = products[row - n - r0];
          if (row < digits) {
            const double weight = static_cast<double>(int64_t{1} << row);
            for (int64_t j = 0; j < s.columns; ++j) counts_signs[j] += weight * product[j];
            for (int64_t j = 0; narrow && row + 1 == digits && j < s.columns; ++j) {
              narrow_counts_signs[j] = static_cast<int32_t>(counts_signs[j]);
            }
            continue;
          }
          if (narrow) {
            backward_row(s, row - digits, product, narrow_counts_signs);
          } else {
            backward_row(s, row - digits, product, counts_signs);
          }
          column_sums.add(s.g + (row - digits) * s.g_stride, s.columns);
        }
      }
      n += panel;
    }
  }
  column_sums.store(s.column_sum, s.columns);
}

void lookup_backward_strip_f32(const BackwardStrip<float>& s) { lookup_backward_strip(s); }
void lookup_backward_strip_f64(const BackwardStrip<double>& s) { lookup_backward_strip(s); }

}  // namespace
}  // namespace bae_fast
