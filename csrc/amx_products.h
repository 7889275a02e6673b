// Products of dense matrices, and of bits and floats, on AMX.
//
// Dense. A float is the sum of three bf16 numbers, exactly: its nearest one, the nearest one to
// what is left, and the rest. A product of floats is then the sum of six products of bf16 numbers;
// the other three are below 2^-26 of it and left out, which is less than one rounding of fp32. With
// one digit the operands are rounded to bf16, as torch does. Sums are in fp32.
//
//     left   row m, bf16 2 p + h:   (m, k = p + 16 h)
//     right  row p, bf16 2 c + h:   (k = p + 16 h, column c)
//     sum    [16, 16] fp32, 32 of k an instruction
//
// Panels hold tiles one after the other, 1 KiB each, [16 rows or columns][k / 32][digit]. 32 rows
// of a block of k stay in the inner cache while the right panel streams; sums rest in memory.
//
// Bits x floats. The floats of one column and one block of k become integers of 32 bits with one
// common power of two, and their four bytes are multiplied by the bits as bytes: integer sums,
// exact. What is rounded is 2^-32 of the largest entry of the column, so entries down to 2^-7 of it
// are exact.
#pragma once

#include "amx_tiles.h"

namespace bae_fast {
namespace {

constexpr int64_t kUnitColumns = 256;
constexpr int64_t kUnitRows = 1024;  // rows whose sums rest in memory
constexpr int64_t kUnitSide = 2 * kSide;

// Tiles of a block of k.
constexpr int64_t unit_tiles(int64_t digits) { return digits == 3 ? 4 : 12; }
constexpr int64_t group_bytes(int64_t digits) { return unit_tiles(digits) * digits * kTileBytes; }
constexpr int64_t kUnitScratch =
    kUnitColumns / kSide * group_bytes(1) + kUnitRows * kUnitColumns * 4;
static_assert(group_bytes(3) <= group_bytes(1));

// ---- panels -------------------------------------------------------------------------------------

// 32 numbers as pairs (p, p + 16): one 32-bit lane a pair, one vector a digit. `peak` keeps the
// largest size, as bits.
template <int kDigits>
inline void split(__m512 low, __m512 high, __m512i (&out)[kDigits], __m512i& peak) {
  if constexpr (kDigits == 1) {
    const __m512i pairs =
        _mm512_set_epi32(0x001F000F, 0x001E000E, 0x001D000D, 0x001C000C, 0x001B000B, 0x001A000A,
                         0x00190009, 0x00180008, 0x00170007, 0x00160006, 0x00150005, 0x00140004,
                         0x00130003, 0x00120002, 0x00110001, 0x00100000);
    out[0] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  } else {
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    const __m512i half = _mm512_set1_epi32(0x8000), sign = _mm512_set1_epi32(0x7FFFFFFF);
    peak = _mm512_max_epu32(peak, _mm512_and_si512(_mm512_castps_si512(low), sign));
    peak = _mm512_max_epu32(peak, _mm512_and_si512(_mm512_castps_si512(high), sign));
#pragma GCC unroll 3
    for (int digit = 0; digit < kDigits; ++digit) {
      const __m512i l = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(low), half), top);
      const __m512i h = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(high), half), top);
      out[digit] = _mm512_or_si512(_mm512_srli_epi32(l, 16), h);
      low = _mm512_sub_ps(low, _mm512_castsi512_ps(l));
      high = _mm512_sub_ps(high, _mm512_castsi512_ps(h));
    }
  }
}

// Two vectors of 16 bf16 numbers as pairs.
inline __m512i pair(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Elements k .. k + 31 of row i, contiguous; zero from `depth` on.
template <int kDigits>
inline void load_along(const Matrix& m, int64_t stride, int64_t i, int64_t k, int64_t depth,
                       __m512i (&out)[kDigits], __m512i& peak) {
  const int64_t rest = depth - k;
  const __mmask16 low = first_words(rest), high = first_words(rest - 16);
  if (m.element == Matrix::kFloat) {
    const float* at = static_cast<const float*>(m.data) + i * stride + k;
    split(_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at + 16), out, peak);
  } else if (m.element == Matrix::kBfloat16) {
    const uint16_t* at = static_cast<const uint16_t*>(m.data) + i * stride + k;
    out[0] = pair(_mm256_maskz_loadu_epi16(low, at), _mm256_maskz_loadu_epi16(high, at + 16));
  } else {
    const uint32_t word = static_cast<const uint32_t*>(m.data)[i * stride + k / kWordBits];
    const uint32_t valid = rest >= kWordBits ? ~0u : (1u << rest) - 1;
    const uint32_t bits = word & valid;
    uint32_t spread_low = bits & 0xFFFF, spread_high = bits >> 16;
    for (int step = 8; step > 0; step /= 2) {
      const uint32_t keep = step == 8   ? 0x00FF00FF
                            : step == 4 ? 0x0F0F0F0F
                            : step == 2 ? 0x33333333
                                        : 0x55555555;
      spread_low = (spread_low | spread_low << step) & keep;
      spread_high = (spread_high | spread_high << step) & keep;
    }
    out[0] = _mm512_maskz_set1_epi16(spread_low | spread_high << 1, 0x3F80);
  }
}

// Elements (k, c .. c + 15) and (k + 16, ...) where c is contiguous; zero from `depth` on and where
// `used` is not set.
template <int kDigits>
inline void load_across(const Matrix& m, int64_t stride, int64_t k, int64_t c, int64_t depth,
                        __mmask16 used, __m512i (&out)[kDigits], __m512i& peak) {
  const __mmask16 low = k < depth ? used : 0, high = k + 16 < depth ? used : 0;
  if (m.element == Matrix::kFloat) {
    const float* at = static_cast<const float*>(m.data) + k * stride + c;
    split(_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at + 16 * stride), out, peak);
  } else {
    const uint16_t* at = static_cast<const uint16_t*>(m.data) + k * stride + c;
    out[0] =
        pair(_mm256_maskz_loadu_epi16(low, at), _mm256_maskz_loadu_epi16(high, at + 16 * stride));
  }
}

// Tiles of k0 .. k0 + 32 tiles for 16 rows from `first`; transposed by words where the rows, and
// not k, are contiguous. `total` rows there are.
template <int kDigits>
inline void pack_rows(const Matrix& m, int64_t first, int64_t total, int64_t k0, int64_t tiles,
                      int64_t depth, uint8_t* out, __m512i& peak) {
  const __mmask16 used = first_words(total - first);
  for (int64_t t = 0; t < tiles; ++t) {
    __m512i tile[kDigits][kSide];
    for (int64_t r = 0; r < kSide; ++r) {
      __m512i parts[kDigits];
      if (m.element == Matrix::kBits || m.column == 1) {
        for (int digit = 0; digit < kDigits; ++digit) parts[digit] = _mm512_setzero_si512();
        if (first + r < total) {
          load_along(m, m.row, first + r, k0 + t * 32, depth, parts, peak);
        }
      } else {
        load_across(m, m.column, k0 + t * 32 + r, first, depth, used, parts, peak);
      }
      for (int digit = 0; digit < kDigits; ++digit) tile[digit][r] = parts[digit];
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      if (m.element != Matrix::kBits && m.column != 1) transpose_16(tile[digit]);
      for (int64_t r = 0; r < kSide; ++r) {
        _mm512_store_si512(out + (t * kDigits + digit) * kTileBytes + r * 64, tile[digit][r]);
      }
    }
  }
}

// The same for the right side, all columns of a strip: rows of a tile are pairs of k.
template <int kDigits>
inline void pack_columns(const Matrix& m, int64_t columns, int64_t k0, int64_t tiles, int64_t depth,
                         uint8_t* out, __m512i& peak) {
  constexpr int64_t kGroup = group_bytes(kDigits);
  const int64_t padded = round_up(columns, kUnitSide);
  for (int64_t t = 0; t < tiles; ++t) {
    uint8_t* const to = out + t * kDigits * kTileBytes;
    for (int64_t r = 0; m.column == 1 && r < kSide; ++r) {
      for (int64_t c = 0; c < padded; c += kSide) {
        __m512i parts[kDigits];
        load_across(m, m.row, k0 + t * 32 + r, c, depth, first_words(columns - c), parts, peak);
        for (int digit = 0; digit < kDigits; ++digit) {
          _mm512_store_si512(to + c / kSide * kGroup + digit * kTileBytes + r * 64, parts[digit]);
        }
      }
    }
    for (int64_t c = 0; m.column != 1 && c < padded; c += kSide) {
      __m512i tile[kDigits][kSide];
      for (int64_t r = 0; r < kSide; ++r) {
        __m512i parts[kDigits];
        for (int digit = 0; digit < kDigits; ++digit) parts[digit] = _mm512_setzero_si512();
        if (c + r < columns) load_along(m, m.column, c + r, k0 + t * 32, depth, parts, peak);
        for (int digit = 0; digit < kDigits; ++digit) tile[digit][r] = parts[digit];
      }
      for (int digit = 0; digit < kDigits; ++digit) {
        transpose_16(tile[digit]);
        for (int64_t r = 0; r < kSide; ++r) {
          _mm512_store_si512(to + c / kSide * kGroup + digit * kTileBytes + r * 64, tile[digit][r]);
        }
      }
    }
  }
}

inline bool all_below_the_limit(__m512i peak) {
  return _mm512_reduce_max_epu32(peak) < 0x7F000000;  // 2^127: rounding up stays finite
}

int64_t panel_bytes(int64_t rows, int64_t depth, int64_t digits) {
  const int64_t block = unit_tiles(digits) * 32;
  return (rows + kUnitSide - 1) / kUnitSide * ((depth + block - 1) / block) * 2 *
         group_bytes(digits);
}

// Panels of the left side are [block of k][32 rows].
template <int kDigits>
bool pack_left(const Matrix& left, int64_t first, int64_t total, int64_t depth, uint8_t* panel) {
  constexpr int64_t kBlock = unit_tiles(kDigits) * 32;
  const int64_t groups = (total + kUnitSide - 1) / kUnitSide;
  __m512i peak = _mm512_setzero_si512();
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    const int64_t tiles = ((depth - k0 < kBlock ? depth - k0 : kBlock) + 31) / 32;
    uint8_t* const to =
        panel + (k0 / kBlock * groups + first / kUnitSide) * 2 * group_bytes(kDigits);
    for (int64_t half = 0; half < 2; ++half) {
      pack_rows<kDigits>(left, first + half * kSide, total, k0, tiles, depth,
                         to + half * group_bytes(kDigits), peak);
    }
  }
  return all_below_the_limit(peak);
}

bool pack(const Matrix& left, int64_t first, int64_t total, int64_t depth, int64_t digits,
          uint8_t* panel) {
  return digits == 3 ? pack_left<3>(left, first, total, depth, panel)
                     : pack_left<1>(left, first, total, depth, panel);
}

// ---- products -----------------------------------------------------------------------------------

// sums, four tiles [16, 16] of 32 rows and 32 columns, from zero. Products of small digits come
// first within a tile. `between(t)` runs between one tile of k and the next: vector work that hides
// there.
template <int kDigits, typename Between>
inline __attribute__((always_inline)) void multiply_digits(const uint8_t* left,
                                                           const uint8_t* right, int64_t tiles,
                                                           float* sums, Between between) {
  finish_stores();
  zero_sums();
  for (int64_t t = 0; t < tiles; ++t) {
#pragma GCC unroll 3
    for (int p = kDigits - 1; p >= 0; --p) {
      const uint8_t* l = left + (t * kDigits + p) * kTileBytes;
      _tile_loadd(4, l, 64);
      _tile_loadd(5, l + group_bytes(kDigits), 64);
#pragma GCC unroll 3
      for (int q = kDigits - 1 - p; q >= 0; --q) {
        const uint8_t* r = right + (t * kDigits + q) * kTileBytes;
        _tile_loadd(6, r, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, r + group_bytes(kDigits), 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    between(t);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// Adds lines l0 .. l1 of a block of sums to those that rest; they start there with the first block
// of k.
inline void rest(const float* sums, float* resting, bool first, int64_t l0, int64_t l1) {
  for (int64_t at = l0 * 16; at < l1 * 16; at += 16) {
    __m512 v = _mm512_load_ps(sums + at);
    if (!first) v = _mm512_add_ps(v, _mm512_load_ps(resting + at));
    _mm512_store_ps(resting + at, v);
  }
}

// Row r of a block of sums, its first and second 16 columns.
inline const float* block_row(const float* sums, int64_t r) {
  return sums + r / kSide * 512 + r % kSide * 16;
}

// Fetches the right side's next block of k while the products of this one run: its lines lie on
// many pages, and nothing else would ask for them in time.
class FetchAhead {
 public:
  FetchAhead(const Matrix& m, int64_t columns, int64_t k0, int64_t k1, int64_t steps) {
    const int64_t size = m.element == Matrix::kFloat ? 4 : 2, block = k1 > k0 ? k1 - k0 : 0;
    const bool across = m.column == 1;
    at_ = static_cast<const char*>(m.data) + k0 * m.row * size;
    stride_ = (across ? m.row : m.column) * size;
    width_ = (across ? columns : block) * size;
    rows_ = across ? block : columns;
    share_ = (rows_ * ((width_ + 63) / 64) + steps - 1) / steps;
  }
  void step() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i) {
      _mm_prefetch(at_ + offset_, _MM_HINT_T1);
      offset_ += 64;
      if (offset_ < width_) continue;
      offset_ = 0, at_ += stride_, --rows_;
    }
  }

 private:
  const char* at_;
  int64_t stride_, width_, rows_, share_, offset_ = 0;
};

// Calls finish(sums, row, column) for each 32 x 32 block of the strip.
template <int kDigits, typename Finish>
bool for_each_block(const UnitStrip& s, Finish finish) {
  constexpr int64_t kBlock = unit_tiles(kDigits) * 32, kGroup = group_bytes(kDigits);
  const Tiles configured;
  uint8_t* const right = s.scratch;
  float* const resting = reinterpret_cast<float*>(right + kUnitColumns / kSide * kGroup);
  const int64_t groups = (s.rows + kUnitSide - 1) / kUnitSide;
  const int64_t across = (s.columns + kUnitSide - 1) / kUnitSide;
  alignas(64) float local[2][1024];
  int turn = 0;
  float* pending = nullptr;  // where the sums of the block before go
  int64_t k_pending = 0;
  __m512i peak = _mm512_setzero_si512();
  for (int64_t g0 = 0; g0 < groups; g0 += kUnitRows / kUnitSide) {
    const int64_t g1 = groups - g0 < kUnitRows / kUnitSide ? groups : g0 + kUnitRows / kUnitSide;
    for (int64_t k0 = 0; k0 < s.depth; k0 += kBlock) {
      const int64_t tiles = ((s.depth - k0 < kBlock ? s.depth - k0 : kBlock) + 31) / 32;
      const int64_t share = (64 + tiles - 1) / tiles, k1 = k0 + kBlock;
      pack_columns<kDigits>(s.right, s.columns, k0, tiles, s.depth, right, peak);
      FetchAhead next(s.right, s.columns, k1, k1 + kBlock < s.depth ? k1 + kBlock : s.depth,
                      (g1 - g0) * across * tiles);
      for (int64_t g = g0; g < g1; ++g) {
        const uint8_t* const left = s.left + (k0 / kBlock * groups + g) * 2 * kGroup;
        for (int64_t c = 0; c < across; ++c) {
          multiply_digits<kDigits>(
              left, right + c * 2 * kGroup, tiles, local[turn], [&](int64_t t) {
                // the next rows, from wherever the panels of all threads are kept
                const int64_t piece = 2 * kGroup / (across * tiles);
                const uint8_t* at = left + 2 * kGroup + (c * tiles + t) * piece;
                for (int64_t line = 0; line < piece; line += 64)
                  _mm_prefetch(at + line, _MM_HINT_T1);
                next.step();
                if (pending == nullptr) return;
                const int64_t l0 = t * share < 64 ? t * share : 64;
                rest(local[turn ^ 1], pending, k_pending == 0, l0,
                     l0 + share < 64 ? l0 + share : 64);
              });
          pending = resting + ((g - g0) * across + c) * 1024;
          k_pending = k0;
          turn ^= 1;
        }
      }
    }
    rest(local[turn ^ 1], pending, k_pending == 0, 0, 64);
    pending = nullptr;
    for (int64_t g = g0; g < g1; ++g) {
      for (int64_t c = 0; c < across; ++c) {
        finish(resting + ((g - g0) * across + c) * 1024, g * kUnitSide, c * kUnitSide);
      }
    }
  }
  return all_below_the_limit(peak);
}

template <int kDigits>
bool encode_strip(const UnitStrip& s, const EncodeStrip& e) {
  const __m512 zero = _mm512_setzero_ps(), limit = _mm512_set1_ps(e.width);
  return for_each_block<kDigits>(s, [&](const float* sums, int64_t row, int64_t column) {
    const __mmask16 used_0 = first_words(s.columns - column);
    const __mmask16 used_1 = first_words(s.columns - column - kSide);
    const __m512 bias_0 = _mm512_maskz_loadu_ps(used_0, e.bias + column);
    const __m512 bias_1 = _mm512_maskz_loadu_ps(used_1, e.bias + column + kSide);
    for (int64_t r = 0; r < kUnitSide && row + r < s.rows; ++r) {
      const __m512 v0 = _mm512_add_ps(_mm512_load_ps(block_row(sums, r)), bias_0);
      const __m512 v1 = _mm512_add_ps(_mm512_load_ps(block_row(sums, r) + 256), bias_1);
      const bool kept = e.keep == nullptr || e.keep[row + r];
      const __mmask16 in_0 = kept ? used_0 : 0, in_1 = kept ? used_1 : 0;
      // NaN compares false both times
      const uint32_t word =
          static_cast<uint32_t>(_mm512_mask_cmp_ps_mask(in_1, v1, zero, _CMP_GT_OQ)) << 16 |
          _mm512_mask_cmp_ps_mask(in_0, v0, zero, _CMP_GT_OQ);
      e.words[(row + r) * e.words_stride + column / kWordBits] = word;
      if (e.window == nullptr) continue;
      const __mmask16 near_0 = _mm512_mask_cmp_ps_mask(in_0, _mm512_abs_ps(v0), limit, _CMP_LT_OQ);
      const __mmask16 near_1 = _mm512_mask_cmp_ps_mask(in_1, _mm512_abs_ps(v1), limit, _CMP_LT_OQ);
      e.window[(row + r) * e.window_stride + column / kWordBits] =
          static_cast<uint32_t>(near_1) << 16 | near_0;
    }
  });
}

bool unit_encode(const UnitStrip& s, const EncodeStrip& e) {
  return s.digits == 3 ? encode_strip<3>(s, e) : encode_strip<1>(s, e);
}

template <int kDigits>
bool product_strip(const UnitStrip& s, float* out, int64_t stride, bool add) {
  return for_each_block<kDigits>(s, [&](const float* sums, int64_t row, int64_t column) {
    for (int64_t r = 0; r < kUnitSide && row + r < s.rows; ++r) {
      float* to = out + (row + r) * stride + column;
      for (int64_t half = 0; half < 2; ++half) {
        const __mmask16 used = first_words(s.columns - column - half * kSide);
        __m512 v = _mm512_load_ps(block_row(sums, r) + half * 256);
        if (used == 0) continue;
        if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(used, to + half * kSide));
        _mm512_mask_storeu_ps(to + half * kSide, used, v);
      }
    }
  });
}

bool unit_product(const UnitStrip& s, float* out, int64_t stride, bool add) {
  return s.digits == 3 ? product_strip<3>(s, out, stride, add)
                       : product_strip<1>(s, out, stride, add);
}

constexpr Units kUnits = {kUnitSide,   kUnitColumns, kUnitScratch, true,
                          panel_bytes, pack,         unit_encode,  unit_product};

// ---- bits x floats ------------------------------------------------------------------------------

constexpr int64_t kFixedColumns = 512;
constexpr int64_t kFixedRows = 1024;
constexpr int64_t kFixedDepth = 512;
constexpr int64_t kFixedTiles = kFixedDepth / 64;
constexpr int64_t kFixedStep = kFixedTiles * kTileBytes;
constexpr int kBytes = 4;
constexpr int64_t kFixedScratch =
    kFixedRows / kSide * kFixedStep + kBytes * kFixedStep + 2 * kFixedDepth * 4 * kSide * 4;

// Rows k .. of 64 columns of a block, copied side by side while other products run: the lines of
// one column lie on pages of their own and in few sets of the caches. Keeps the largest size by
// column.
class Stage {
 public:
  Stage(const BitsProduct& p, int64_t k0, int64_t depth, int64_t c, float* to)
      : from_(p.dense + k0 * p.dense_stride + c), stride_(p.dense_stride), rest_(depth), to_(to) {
    for (int64_t i = 0; i < 4; ++i) {
      used_[i] = first_words(p.columns - c - i * kSide);
      peak[i] = _mm512_setzero_si512();
    }
  }
  // Copies up to `rows` rows.
  void advance(int64_t rows) {
    for (; rows > 0 && rest_ > 0; --rows, --rest_, from_ += stride_, to_ += kStageColumns) {
      for (int64_t i = 0; i < 4; ++i) {
        __builtin_prefetch(from_ + 24 * stride_ + i * kSide);
        const __m512 v = _mm512_maskz_loadu_ps(used_[i], from_ + i * kSide);
        // sizes as integers: NaN is above all
        peak[i] = _mm512_max_epu32(peak[i], _mm512_castps_si512(_mm512_abs_ps(v)));
        _mm512_store_ps(to_ + i * kSide, v);
      }
    }
  }

  static constexpr int64_t kStageColumns = 4 * kSide;
  __m512i peak[4];

 private:
  const float* from_;
  int64_t stride_, rest_;
  float* to_;
  __mmask16 used_[4];
};

// 16 columns of a staged block of k as integers times a power of two, by bytes: [byte][k / 64]
// tiles. Returns the exponents.
inline __m512 pack_fixed(const float* staged, __m512i peak, int64_t depth, int64_t tiles,
                         uint8_t* out) {
  // all below 2^31; a column of zeros stays zero
  const __m512 size = _mm512_castsi512_ps(peak);
  const __m512 shift =
      _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(size, _mm512_setzero_ps(), _CMP_GT_OQ),
                          _mm512_set1_ps(30), _mm512_getexp_ps(size));
  const __m512i order = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  for (int64_t k = 0; k < tiles * 64; k += 4) {
    __m512i row[4];
    for (int64_t r = 0; r < 4; ++r) {
      const __mmask16 mask = k + r < depth ? 0xFFFF : 0;
      row[r] = _mm512_cvtps_epi32(_mm512_scalef_ps(
          _mm512_maskz_load_ps(mask, staged + (k + r) * Stage::kStageColumns), shift));
    }
    // lanes of 128 bits hold 4 columns: 4 x 4 words of (row, column), then bytes (byte, row)
    const __m512i t0 = _mm512_unpacklo_epi32(row[0], row[1]);
    const __m512i t1 = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i t2 = _mm512_unpacklo_epi32(row[2], row[3]);
    const __m512i t3 = _mm512_unpackhi_epi32(row[2], row[3]);
    __m512i column[4];  // four rows of column 4 l + i in lane l, by byte
    column[0] = _mm512_shuffle_epi8(_mm512_unpacklo_epi64(t0, t2), order);
    column[1] = _mm512_shuffle_epi8(_mm512_unpackhi_epi64(t0, t2), order);
    column[2] = _mm512_shuffle_epi8(_mm512_unpacklo_epi64(t1, t3), order);
    column[3] = _mm512_shuffle_epi8(_mm512_unpackhi_epi64(t1, t3), order);
    const __m512i u0 = _mm512_unpacklo_epi32(column[0], column[1]);
    const __m512i u1 = _mm512_unpackhi_epi32(column[0], column[1]);
    const __m512i u2 = _mm512_unpacklo_epi32(column[2], column[3]);
    const __m512i u3 = _mm512_unpackhi_epi32(column[2], column[3]);
    uint8_t* to = out + k / 64 * kTileBytes + k % 64 / 4 * 64;
    _mm512_store_si512(to, _mm512_unpacklo_epi64(u0, u2));
    _mm512_store_si512(to + kFixedStep, _mm512_unpackhi_epi64(u0, u2));
    _mm512_store_si512(to + 2 * kFixedStep, _mm512_unpacklo_epi64(u1, u3));
    _mm512_store_si512(to + 3 * kFixedStep, _mm512_unpackhi_epi64(u1, u3));
  }
  return _mm512_sub_ps(_mm512_setzero_ps(), shift);
}

// Adds the sums of the four bytes, rows r0 .. r1 of 16, to rows of out.
inline void add_fixed(const int32_t (*sums)[kSide * kSide], int64_t r0, int64_t r1, __m512 exponent,
                      __mmask16 used, bool add, float* out, int64_t stride) {
  out += r0 * stride;
  for (int64_t r = r0; r < r1; ++r, out += stride) {
    // both below 2^26
    const __m512i low =
        _mm512_add_epi32(_mm512_load_si512(sums[0] + r * kSide),
                         _mm512_slli_epi32(_mm512_load_si512(sums[1] + r * kSide), 8));
    const __m512i high =
        _mm512_add_epi32(_mm512_load_si512(sums[2] + r * kSide),
                         _mm512_slli_epi32(_mm512_load_si512(sums[3] + r * kSide), 8));
    const __m512 sum = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536)),
                                     _mm512_cvtepi32_ps(low));
    __m512 v = _mm512_scalef_ps(sum, exponent);
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(used, out));
    _mm512_mask_storeu_ps(out, used, v);
  }
}

// Blocks of 1024 rows by 512 of k; in one, 64 columns are staged while the 64 before are
// multiplied, 16 of them at a time, whose bytes stay in the inner cache while the bits stream.
bool fixed_product(const BitsProduct& p) {
  alignas(64) int32_t sums[2][kBytes][kSide * kSide];
  const Tiles configured;
  uint8_t* const right = p.scratch;
  uint8_t* const left = right + kBytes * kFixedStep;
  float* staged[2];
  staged[0] = reinterpret_cast<float*>(left + kFixedRows / kSide * kFixedStep);
  staged[1] = staged[0] + kFixedDepth * Stage::kStageColumns;
  __m512i peak = _mm512_setzero_si512();
  for (int64_t m0 = 0; m0 < p.rows; m0 += kFixedRows) {
    const int64_t m1 = p.rows - m0 < kFixedRows ? p.rows : m0 + kFixedRows;
    const int64_t groups = (m1 - m0 + kSide - 1) / kSide;
    for (int64_t k0 = 0; k0 < p.depth; k0 += kFixedDepth) {
      const int64_t depth = p.depth - k0 < kFixedDepth ? p.depth - k0 : kFixedDepth;
      const int64_t tiles = (depth + 63) / 64;
      const __mmask16 words = first_words(n_words(depth));
      for (int64_t m = m0; m < m0 + groups * kSide; ++m) {
        uint8_t* to = left + (m - m0) / kSide * kFixedStep + m % kSide * 64;
        fetch_to_write(to + kFixedStep, kTileBytes);
        const uint32_t* row = p.bits + (m < m1 ? m : m1 - 1) * p.bits_stride + k0 / kWordBits;
        expand_left(_mm512_maskz_loadu_epi32(words, row), to);
      }
      Stage stage(p, k0, depth, 0, staged[0]);
      stage.advance(depth);
      for (int64_t c0 = 0; c0 < p.columns; c0 += Stage::kStageColumns) {
        __m512i sizes[4];
        for (int64_t i = 0; i < 4; ++i) {
          sizes[i] = stage.peak[i];
          peak = _mm512_max_epu32(peak, sizes[i]);
        }
        const bool more = c0 + Stage::kStageColumns < p.columns;
        stage = Stage(p, k0, more ? depth : 0, c0 + Stage::kStageColumns, staged[1]);
        const int64_t steps = 4 * groups * tiles, share = (depth + steps - 1) / steps;
        for (int64_t i = 0; i < 4 && c0 + i * kSide < p.columns; ++i) {
          const int64_t c = c0 + i * kSide;
          const __m512 exponent = pack_fixed(staged[0] + i * kSide, sizes[i], depth, tiles, right);
          const __mmask16 used = first_words(p.columns - c);
          const bool add = p.add || k0 > 0;
          const int64_t lines = (kSide + tiles - 1) / tiles;
          const auto finish = [&](int64_t g, int64_t r0, int64_t r1) {
            const int64_t m = m0 + g * kSide, rows = m1 - m < kSide ? m1 - m : kSide;
            add_fixed(sums[g % 2], r0, r1 < rows ? r1 : rows, exponent, used, add,
                      p.out + m * p.out_stride + c, p.out_stride);
          };
          for (int64_t g = 0; g < groups; ++g) {
            const uint8_t* l = left + g * kFixedStep;
            finish_stores();
            zero_sums();
            for (int64_t t = 0; t < tiles; ++t) {
              _tile_loadd(4, l + t * kTileBytes, 64);
              _tile_loadd(5, right + t * kTileBytes, 64);
              _tile_dpbuud(0, 4, 5);
              _tile_loadd(6, right + kFixedStep + t * kTileBytes, 64);
              _tile_dpbuud(1, 4, 6);
              _tile_loadd(7, right + 2 * kFixedStep + t * kTileBytes, 64);
              _tile_dpbuud(2, 4, 7);
              _tile_loadd(5, right + 3 * kFixedStep + t * kTileBytes, 64);
              _tile_dpbusd(3, 4, 5);
              // vector work hides between the products: the rows before, and the columns to come
              if (g > 0) finish(g - 1, t * lines, (t + 1) * lines);
              for (int64_t r = t * lines; r < (t + 1) * lines; ++r) {
                __builtin_prefetch(p.out + (m0 + g * kSide + r) * p.out_stride + c, 1);
              }
              stage.advance(share);
            }
            _tile_stored(0, sums[g % 2][0], 64);
            _tile_stored(1, sums[g % 2][1], 64);
            _tile_stored(2, sums[g % 2][2], 64);
            _tile_stored(3, sums[g % 2][3], 64);
          }
          finish(groups - 1, 0, kSide);
        }
        stage.advance(depth);
        float* const swap = staged[0];
        staged[0] = staged[1], staged[1] = swap;
      }
    }
  }
  return _mm512_reduce_max_epu32(peak) < 0x7F800000;
}

}  // namespace
}  // namespace bae_fast
