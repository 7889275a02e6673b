// AMX: counts of pairs as products of bytes, 16 x 16 sums of 64 products an instruction. On CPUs
// that have it this is three times as fast as popcounts; the rest is as in AVX-512. Compiled with
// -mavx512{f,bw,dq,vl,vpopcntdq} -mamx-{tile,int8}.
//
// A tile register holds 16 rows of 64 bytes. With k the summed index,
//
//     left   row m, byte k: bits as 0 or 1
//     right  row k / 4, bytes 4 c + k % 4 of column c: bits as 0 or 1, or signs as -1, 0, 1
//     sum    [16, 16] int32
//
// Panels hold such tiles one after the other, 1 KiB each, [16 rows or columns][k / 64]; four sums
// of 2 x 2 tiles are kept in registers. Blocks of k are short enough for the panels of both sides
// to stay in the outer cache of a core; between blocks the sums rest in memory.
#include "kernels.h"
#include "layout.h"

#if defined(__x86_64__)
#include "vector_avx512.h"
// after the vectors it is written with
#include "kernels_impl.h"

namespace bae_fast {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSide = 16;          // rows of a tile, columns of a tile of sums
constexpr int64_t kGroupWords = 16;    // words transposed at once: 512 of k
constexpr int64_t kBlockWords = 64;    // words of a block of k: 2048 of k
constexpr int64_t kBlockTiles = kBlockWords / 2;
constexpr int64_t kLeftRows = 512;     // rows of a panel: covariance
constexpr int64_t kSumRows = 576;      // rows whose sums rest in memory: backward
constexpr int64_t kWidth = kMaxStrip;  // columns of a right panel

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the tiles of this thread, and puts back what another library had configured.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    alignas(64) const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette != 0) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }

 private:
  alignas(64) TileConfig before_;
};

// Transposes 16 x 16 words.
inline void transpose_16(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {
    const __m512i t0 = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    const __m512i t1 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    const __m512i t2 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]);
    const __m512i t3 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    b[i] = _mm512_unpacklo_epi64(t0, t2);
    b[i + 1] = _mm512_unpackhi_epi64(t0, t2);
    b[i + 2] = _mm512_unpacklo_epi64(t1, t3);
    b[i + 3] = _mm512_unpackhi_epi64(t1, t3);
  }
  // b[4 g + c] has, in 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + c
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i t0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);
    const __m512i t1 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xDD);
    const __m512i t2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i t3 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xDD);
    a[c] = _mm512_shuffle_i32x4(t0, t2, 0x88);
    a[8 + c] = _mm512_shuffle_i32x4(t0, t2, 0xDD);
    a[4 + c] = _mm512_shuffle_i32x4(t1, t3, 0x88);
    a[12 + c] = _mm512_shuffle_i32x4(t1, t3, 0xDD);
  }
}

// ---- panels -------------------------------------------------------------------------------------

// 512 bits of one row to eight tiles.
inline void expand_left(__m512i bits, uint8_t* out) {
  alignas(64) uint64_t part[8];
  _mm512_store_si512(part, bits);
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) {
    _mm512_store_si512(out + t * kTileBytes, _mm512_maskz_set1_epi8(part[t], 1));
  }
}

// The four bits `nibble` of each word as four bytes of 0 or 1.
inline __m512i nibble_bytes(__m512i words, int nibble) {
  const __m512i spread = _mm512_set_epi32(
      0x0C0C0C0C, 0x08080808, 0x04040404, 0, 0x0C0C0C0C, 0x08080808, 0x04040404, 0, 0x0C0C0C0C,
      0x08080808, 0x04040404, 0, 0x0C0C0C0C, 0x08080808, 0x04040404, 0);
  const __m512i from = _mm512_add_epi8(spread, _mm512_set1_epi8(static_cast<char>(nibble / 2)));
  const __m512i pick = _mm512_set1_epi32(nibble % 2 == 0 ? 0x08040201 : 0x80402010);
  return _mm512_min_epu8(_mm512_and_si512(_mm512_shuffle_epi8(words, from), pick),
                         _mm512_set1_epi8(1));
}

// One word of 16 columns, 32 of k, to half a tile.
inline void expand_right(__m512i words, uint8_t* out) {
#pragma GCC unroll 8
  for (int nibble = 0; nibble < 8; ++nibble) {
    _mm512_store_si512(out + nibble * 64, nibble_bytes(words, nibble));
  }
}

inline void expand_signs(__m512i above, __m512i below, uint8_t* out) {
#pragma GCC unroll 8
  for (int nibble = 0; nibble < 8; ++nibble) {
    _mm512_store_si512(out + nibble * 64, _mm512_sub_epi8(nibble_bytes(above, nibble),
                                                          nibble_bytes(below, nibble)));
  }
}

inline __mmask16 first_words(int64_t count) {
  return count >= 16 ? 0xFFFF : static_cast<__mmask16>(count <= 0 ? 0 : (1u << count) - 1);
}

// ---- products -----------------------------------------------------------------------------------

// sums [32, 32] of two rows and two columns of tiles; starts from what is there when `resume`.
inline void multiply(const uint8_t* left, int64_t left_step, const uint8_t* right,
                     int64_t right_step, int64_t tiles, bool resume, int32_t* sums,
                     int64_t stride) {
  const int64_t bytes = stride * 4;
  if (resume) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + kSide, bytes);
    _tile_loadd(2, sums + kSide * stride, bytes);
    _tile_loadd(3, sums + kSide * stride + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    _tile_loadd(4, left + t * kTileBytes, 64);
    _tile_loadd(6, right + t * kTileBytes, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, right + right_step + t * kTileBytes, 64);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, left + left_step + t * kTileBytes, 64);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kSide, bytes);
  _tile_stored(2, sums + kSide * stride, bytes);
  _tile_stored(3, sums + kSide * stride + kSide, bytes);
}

constexpr int64_t kPanelStep = kBlockTiles * kTileBytes;  // bytes between 16 rows or columns
constexpr int64_t kRightBytes = kWidth / kSide * kPanelStep;

// ---- covariance ---------------------------------------------------------------------------------

constexpr int64_t kCovarianceScratch =
    kLeftRows / kSide * kPanelStep + kRightBytes + kLeftRows * kWidth * 4;

// Sum of |V| and the signs for 32 features i and 32 features j.
inline int64_t finish(const CovarianceTile& t, int64_t i, int64_t j, const int32_t* sums,
                      int64_t stride) {
  int64_t total = 0;
  if (t.n_rows < 1 << 15) {
    for (int64_t r0 = 0; r0 < 32; r0 += 8) {
      __m512i sum = _mm512_setzero_si512();  // of 16 |V|: 32 bits hold it
#pragma GCC unroll 8
      for (int64_t r = r0; r < r0 + 8; ++r) {
        uint32_t above = 0, below = 0;
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          const __m512i ones = Vector::shifted_counts(t.counts + j + c * kSide);
          const __m512i pairs =
              _mm512_add_epi32(ones, _mm512_loadu_si512(sums + r * stride + c * kSide));
          const __m512i v =
              Vector::dot_pairs(pairs, static_cast<int32_t>(t.n_rows), t.counts[i + r]);
          sum = Vector::add_absolute(sum, v);
          above |= Vector::above_zero(v) << c * kSide;
          below |= Vector::below_zero(v) << c * kSide;
        }
        if (t.above != nullptr) {
          const int64_t at = (i + r - t.i0) * t.planes_stride + (j - t.j0) / kWordBits;
          t.above[at] = above;
          t.below[at] = below;
        }
      }
      total += Vector::sum_unsigned(sum);
    }
    return total;
  }
  for (int64_t r = 0; r < 32; ++r) {
    uint32_t above = 0, below = 0;
    for (int64_t c = 0; c < 32; ++c) {
      const int64_t v = t.n_rows * static_cast<int64_t>(sums[r * stride + c]) -
                        static_cast<int64_t>(t.counts[i + r]) * t.counts[j + c];
      total += v < 0 ? -v : v;
      above |= static_cast<uint32_t>(v > 0) << c;
      below |= static_cast<uint32_t>(v < 0) << c;
    }
    if (t.above != nullptr) {
      const int64_t at = (i + r - t.i0) * t.planes_stride + (j - t.j0) / kWordBits;
      t.above[at] = above;
      t.below[at] = below;
    }
  }
  return total;
}

int64_t covariance_tile_amx(const CovarianceTile& t) {
  const Tiles configured;
  uint8_t* const left = t.scratch;
  uint8_t* const right = left + kLeftRows / kSide * kPanelStep;
  int32_t* const resting = reinterpret_cast<int32_t*>(right + kRightBytes);
  alignas(64) int32_t local[32 * 32];
  const bool one_block = t.words <= kBlockWords;
  int64_t total = 0;
  for (int64_t j0 = t.j0; j0 < t.j1; j0 += kWidth) {
    const int64_t j1 = t.j1 - j0 < kWidth ? t.j1 : j0 + kWidth;
    for (int64_t w0 = 0; w0 < t.words; w0 += kBlockWords) {
      const int64_t words = t.words - w0 < kBlockWords ? t.words - w0 : kBlockWords;
      const int64_t tiles = (words + 1) / 2;
      for (int64_t i = t.i0; i < t.i1 && (j0 == t.j0 || !one_block); i += kSide) {
        for (int64_t w = 0; w < words; w += kGroupWords) {
          __m512i a[16];
          for (int64_t r = 0; r < 16; ++r) {
            a[r] = w + r < words ? Vector::load(t.columns + (w0 + w + r) * t.stride + i)
                                 : _mm512_setzero_si512();
          }
          transpose_16(a);
          for (int64_t r = 0; r < 16; ++r) {
            expand_left(a[r], left + (i - t.i0) / kSide * kPanelStep + w / 2 * kTileBytes + r * 64);
          }
        }
      }
      for (int64_t w = 0; w < tiles * 2; ++w) {
        for (int64_t j = j0; j < j1; j += kSide) {
          const __m512i columns = w < words ? Vector::load(t.columns + (w0 + w) * t.stride + j)
                                            : _mm512_setzero_si512();
          expand_right(columns, right + (j - j0) / kSide * kPanelStep + w * (kTileBytes / 2));
        }
      }
      for (int64_t j = j0; j < j1; j += 32) {
        for (int64_t i = t.i0; i < t.i1; i += 32) {
          int32_t* sums = one_block ? local : resting + (i - t.i0) * kWidth + (j - j0);
          const int64_t stride = one_block ? 32 : kWidth;
          multiply(left + (i - t.i0) / kSide * kPanelStep, kPanelStep,
                   right + (j - j0) / kSide * kPanelStep, kPanelStep, tiles, w0 > 0, sums, stride);
          if (w0 + words == t.words) total += finish(t, i, j, sums, stride);
        }
      }
    }
  }
  return total;
}

// ---- backward of the encoder --------------------------------------------------------------------

// a left panel of 32 rows, a right panel, sums
int64_t backward_scratch_amx(int64_t) { return 2 * kPanelStep + kRightBytes + kSumRows * kWidth * 4; }

template <typename T>
void backward_strip_amx(const BackwardStrip<T>& s) {
  alignas(64) double counts_signs[kWidth] = {};  // n^T S, an integer
  ColumnSums<T> sums;
  uint8_t* const left = s.scratch;
  uint8_t* const right = left + 2 * kPanelStep;
  int32_t* const products = reinterpret_cast<int32_t*>(right + kRightBytes);
  const bool covariance = s.above != nullptr;
  const int64_t digits = covariance ? s.n_digits : 0, rows = digits + s.n;
  const int64_t columns = round_up(s.columns, 32);
  for (int64_t n0 = 0; n0 < rows; n0 += kSumRows) {
    const int64_t n1 = rows - n0 < kSumRows ? rows : n0 + kSumRows;
    for (int64_t w0 = 0; covariance && w0 < s.sign_words; w0 += kBlockWords) {
      const Tiles configured;
      const int64_t words = s.sign_words - w0 < kBlockWords ? s.sign_words - w0 : kBlockWords;
      const int64_t tiles = (words + 1) / 2;
      for (int64_t j = 0; j < columns; j += kSide) {
        for (int64_t w = 0; w < tiles * 2; w += kGroupWords) {
          const __mmask16 used = first_words(words - w);
          __m512i above[16], below[16];
          for (int64_t c = 0; c < 16; ++c) {
            const int64_t at = (j + c) * s.planes_stride + w0 + w;
            const __mmask16 mask = j + c < s.columns ? used : 0;
            above[c] = _mm512_maskz_loadu_epi32(mask, s.above + (mask != 0 ? at : 0));
            below[c] = _mm512_maskz_loadu_epi32(mask, s.below + (mask != 0 ? at : 0));
          }
          transpose_16(above);
          transpose_16(below);
          uint8_t* to = right + j / kSide * kPanelStep + w * (kTileBytes / 2);
          for (int64_t r = 0; r < 16 && w + r < tiles * 2; ++r) {
            expand_signs(above[r], below[r], to + r * (kTileBytes / 2));
          }
        }
      }
      for (int64_t n = n0; n < n1; n += 32) {
        for (int64_t r = 0; r < 32; ++r) {
          const int64_t row = n + r < n1 ? n + r : n1 - 1;
          const uint32_t* bits = row < digits ? s.digits + row * s.sign_words
                                              : s.rows + (row - digits) * s.rows_stride;
          for (int64_t w = 0; w < words; w += kGroupWords) {
            expand_left(_mm512_maskz_loadu_epi32(first_words(words - w), bits + w0 + w),
                        left + r / kSide * kPanelStep + w / 2 * kTileBytes + r % kSide * 64);
          }
        }
        for (int64_t j = 0; j < columns; j += 32) {
          multiply(left, kPanelStep, right + j / kSide * kPanelStep, kPanelStep, tiles, w0 > 0,
                   products + (n - n0) * kWidth + j, kWidth);
        }
      }
    }
    for (int64_t n = n0; n < n1; ++n) {
      const int32_t* product = products + (n - n0) * kWidth;
      if (n < digits) {
        const double weight = static_cast<double>(int64_t{1} << n);
        for (int64_t j = 0; j < columns; ++j) counts_signs[j] += weight * product[j];
      } else {
        backward_row(s, n - digits, product, counts_signs);
        sums.add(s.g + (n - digits) * s.g_stride, s.columns);
      }
    }
  }
  sums.store(s.column_sum, s.columns);
}

void backward_strip_amx_f32(const BackwardStrip<float>& s) { backward_strip_amx(s); }
void backward_strip_amx_f64(const BackwardStrip<double>& s) { backward_strip_amx(s); }

constexpr Kernels make_amx_kernels() {
  Kernels k = make_kernels("amx");
  k.strip = kWidth;
  k.covariance_scratch = kCovarianceScratch;
  k.backward_scratch = backward_scratch_amx;
  k.covariance_tile = covariance_tile_amx;
  k.backward_strip_f32 = backward_strip_amx_f32;
  k.backward_strip_f64 = backward_strip_amx_f64;
  return k;
}

}  // namespace

const Kernels kAmxKernels = make_amx_kernels();

}  // namespace bae_fast
#endif
