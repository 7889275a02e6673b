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
#include "kernels_sparse.h"
// and what is written with both
#include "amx_products.h"

namespace bae_fast {
namespace {

constexpr int64_t kBlockWords = 16;  // words of a block of k: 512 of k, 32 rows of it in 16 KiB
constexpr int64_t kBlockTiles = kBlockWords / 2;
constexpr int64_t kLeftRows = 512;           // rows of a tile of the covariance
constexpr int64_t kSumRows = 576;            // rows whose sums rest in memory: backward
constexpr int64_t kWidth = kMaxStrip;        // columns of a right panel
constexpr int64_t kSumStride = kWidth + 16;  // not a power of two: lines in different sets

// ---- panels -------------------------------------------------------------------------------------

// The four bits `nibble` of each word as four bytes of 0 or 1.
inline __m512i nibble_bytes(__m512i words, int nibble) {
  const __m512i spread = _mm512_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0, 0x0C0C0C0C,
                                          0x08080808, 0x04040404, 0, 0x0C0C0C0C, 0x08080808,
                                          0x04040404, 0, 0x0C0C0C0C, 0x08080808, 0x04040404, 0);
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
    _mm512_store_si512(out + nibble * 64,
                       _mm512_sub_epi8(nibble_bytes(above, nibble), nibble_bytes(below, nibble)));
  }
}

constexpr int64_t kPanelStep = kBlockTiles * kTileBytes;  // bytes between 16 rows or columns
constexpr int64_t kPanelBytes = kWidth / kSide * kPanelStep;

// ---- products -----------------------------------------------------------------------------------

// sums [32, 32] of two rows and two columns of tiles; starts from what is there when `resume`.
// `between(step)` runs between the products of one k and the next: vector work that hides there.
template <typename Between>
inline __attribute__((always_inline)) void multiply(const uint8_t* left, const uint8_t* right,
                                                    int64_t tiles, bool resume, int32_t* sums,
                                                    int64_t stride, Between between) {
  const int64_t bytes = stride * 4;
  finish_stores();
  if (resume) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + kSide, bytes);
    _tile_loadd(2, sums + kSide * stride, bytes);
    _tile_loadd(3, sums + kSide * stride + kSide, bytes);
  } else {
    zero_sums();
  }
  for (int64_t t = 0; t < tiles; ++t) {
    _tile_loadd(4, left + t * kTileBytes, 64);
    _tile_loadd(6, right + t * kTileBytes, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, right + kPanelStep + t * kTileBytes, 64);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, left + kPanelStep + t * kTileBytes, 64);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    between(t);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kSide, bytes);
  _tile_stored(2, sums + kSide * stride, bytes);
  _tile_stored(3, sums + kSide * stride + kSide, bytes);
}

// ---- covariance ---------------------------------------------------------------------------------

constexpr int64_t kCovarianceScratch =
    (kLeftRows / kSide + 2) * kPanelStep + kLeftRows * kLeftRows * 4;

// A block of 32 x 32 counts of pairs, to be turned into V: its sum of |V|, and its signs.
struct Block {
  const int32_t* sums = nullptr;  // [32, 32]
  int64_t i = 0, j = 0;
};

// Rows r0 .. r1 of a block, V in int32 while N < 2^15: 16 times |V| <= 2^28 fits 32 bits without a
// sign, the total is kept in 64.
inline __attribute__((always_inline)) void finish_rows(const CovarianceTile& t, const Block& b,
                                                       int64_t r0, int64_t r1, __m512i& total) {
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  const __m512i ones_0 = Vector::shifted_counts(t.counts + b.j);
  const __m512i ones_1 = Vector::shifted_counts(t.counts + b.j + kSide);
  while (r0 < r1) {
    __m512i sum = _mm512_setzero_si512();
    for (const int64_t end = r1 - r0 < 8 ? r1 : r0 + 8; r0 < end; ++r0) {
      const uint32_t factors =
          static_cast<uint32_t>(-t.counts[b.i + r0]) << 16 | static_cast<uint32_t>(t.n_rows);
      const __m512i factor = _mm512_set1_epi32(static_cast<int>(factors));
      const int32_t* row = b.sums + r0 * 32;
      const __m512i v0 =
          _mm512_madd_epi16(_mm512_add_epi32(ones_0, _mm512_loadu_si512(row)), factor);
      const __m512i v1 =
          _mm512_madd_epi16(_mm512_add_epi32(ones_1, _mm512_loadu_si512(row + kSide)), factor);
      sum = _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_abs_epi32(v0), _mm512_abs_epi32(v1)));
      if (t.above != nullptr) {
        const int64_t at = (b.i + r0 - t.i0) * t.planes_stride + (b.j - t.j0) / kWordBits;
        t.above[at] = _mm512_kunpackw(_mm512_cmpgt_epi32_mask(v1, _mm512_setzero_si512()),
                                      _mm512_cmpgt_epi32_mask(v0, _mm512_setzero_si512()));
        t.below[at] = _mm512_kunpackw(_mm512_movepi32_mask(v1), _mm512_movepi32_mask(v0));
      }
    }
    total = _mm512_add_epi64(
        total, _mm512_add_epi64(_mm512_and_si512(sum, low), _mm512_srli_epi64(sum, 32)));
  }
}

// The same for a whole block with V in int64.
int64_t finish_wide(const CovarianceTile& t, const Block& b) {
  int64_t total = 0;
  for (int64_t r = 0; r < 32; ++r) {
    uint32_t above = 0, below = 0;
    for (int64_t c = 0; c < 32; ++c) {
      const int64_t v = t.n_rows * static_cast<int64_t>(b.sums[r * 32 + c]) -
                        static_cast<int64_t>(t.counts[b.i + r]) * t.counts[b.j + c];
      total += v < 0 ? -v : v;
      above |= static_cast<uint32_t>(v > 0) << c;
      below |= static_cast<uint32_t>(v < 0) << c;
    }
    if (t.above != nullptr) {
      const int64_t at = (b.i + r - t.i0) * t.planes_stride + (b.j - t.j0) / kWordBits;
      t.above[at] = above;
      t.below[at] = below;
    }
  }
  return total;
}

// Blocks of k are outermost, and the left rows vary slowest inside one: 32 of them stay in the
// inner cache while the right panel streams. Sums rest in memory, [32, 32] by block.
int64_t covariance_tile_amx(const CovarianceTile& t) {
  const Tiles configured;
  uint8_t* const left = t.scratch;
  uint8_t* const right = left + kLeftRows / kSide * kPanelStep;
  int32_t* const resting = reinterpret_cast<int32_t*>(right + 2 * kPanelStep);
  alignas(64) int32_t local[2][32 * 32];
  const bool one_block = t.words <= kBlockWords, narrow = t.n_rows < 1 << 15;
  int64_t total = 0, twice = 0;
  __m512i lanes = _mm512_setzero_si512(), diagonal = _mm512_setzero_si512();
  Block pending;  // counted, not finished: that is done between the products of the next block
  int turn = 0;
  for (int64_t w0 = 0; w0 < t.words; w0 += kBlockWords) {
    const int64_t words = t.words - w0 < kBlockWords ? t.words - w0 : kBlockWords;
    const int64_t tiles = (words + 1) / 2;
    const bool last = w0 + words == t.words;
    const int64_t share = (32 + tiles - 1) / tiles;
    for (int64_t i = t.i0; i < t.i1 && !(one_block && t.same_rows); i += kSide) {
      __m512i a[16];
      for (int64_t r = 0; r < 16; ++r) {
        a[r] =
            r < words ? Vector::load(t.columns + (w0 + r) * t.stride + i) : _mm512_setzero_si512();
      }
      transpose_16(a);
      for (int64_t r = 0; r < 16; ++r) {
        uint8_t* to = left + (i - t.i0) / kSide * kPanelStep + r * 64;
        fetch_to_write(to + kPanelStep, kTileBytes);
        expand_left(a[r], to);
      }
    }
    for (int64_t j = t.j0; j < t.j1; j += 32) {
      for (int64_t w = 0; w < tiles * 2; ++w) {
        for (int64_t half = 0; half < 2; ++half) {
          const __m512i columns =
              w < words ? Vector::load(t.columns + (w0 + w) * t.stride + j + half * kSide)
                        : _mm512_setzero_si512();
          expand_right(columns, right + half * kPanelStep + w * (kTileBytes / 2));
        }
      }
      const int64_t diagonal_end = j / kStrip * kStrip + kStrip;
      for (int64_t i = t.i0; i < (t.upper ? diagonal_end : t.i1); i += 32) {
        const Block block{
            one_block ? local[turn] : resting + ((i - t.i0) * (kLeftRows / 32) + (j - t.j0)) * 32,
            i, j};
        multiply(left + (i - t.i0) / kSide * kPanelStep, right, tiles, w0 > 0,
                 const_cast<int32_t*>(block.sums), 32, [&](int64_t k) {
                   if (pending.sums == nullptr) return;
                   const int64_t r0 = k * share < 32 ? k * share : 32;
                   const int64_t r1 = r0 + share < 32 ? r0 + share : 32;
                   finish_rows(t, pending, r0, r1, lanes);
                 });
        pending.sums = nullptr;
        if (!last) continue;
        const bool once = t.upper && i + kStrip >= diagonal_end;
        if (!narrow) {
          (once ? twice : total) += finish_wide(t, block);
        } else if (once) {
          finish_rows(t, block, 0, 32, diagonal);
        } else {
          pending = block;
          turn ^= 1;
        }
      }
    }
  }
  if (pending.sums != nullptr) finish_rows(t, pending, 0, 32, lanes);
  total += _mm512_reduce_add_epi64(lanes);
  if (!t.upper) return total;
  // blocks on the diagonal hold each pair twice, and V_ii = n_i (N - n_i)
  twice += _mm512_reduce_add_epi64(diagonal);
  for (int64_t i = t.i0; i < t.i1; ++i) twice -= t.counts[i] * (t.n_rows - t.counts[i]);
  return total + twice / 2;
}

// ---- backward of the encoder --------------------------------------------------------------------

// a left panel of 32 rows, a right panel, sums
int64_t backward_scratch_amx(int64_t) {
  return 2 * kPanelStep + kPanelBytes + kSumRows * kSumStride * 4;
}

template <typename T>
void backward_strip_amx(const BackwardStrip<T>& s) {
  alignas(64) double counts_signs[kWidth] = {};  // n^T S, an integer
  alignas(64) int32_t narrow_counts_signs[kWidth];
  ColumnSums<T> sums;
  uint8_t* const left = s.scratch;
  uint8_t* const right = left + 2 * kPanelStep;
  int32_t* const products = reinterpret_cast<int32_t*>(right + kPanelBytes);
  const bool covariance = s.above != nullptr, narrow = counts_signs_fit(s);
  const int64_t digits = covariance ? s.n_digits : 0, rows = digits + s.n;
  const int64_t columns = round_up(s.columns, 32);
  for (int64_t n0 = 0; n0 < rows; n0 += kSumRows) {
    const int64_t n1 = rows - n0 < kSumRows ? rows : n0 + kSumRows;
    for (int64_t w0 = 0; covariance && w0 < s.sign_words; w0 += kBlockWords) {
      const Tiles configured;
      const int64_t words = s.sign_words - w0 < kBlockWords ? s.sign_words - w0 : kBlockWords;
      const int64_t tiles = (words + 1) / 2;
      const __mmask16 used = first_words(words);
      for (int64_t j = 0; j < columns; j += kSide) {
        __m512i above[16], below[16];
        for (int64_t c = 0; c < 16; ++c) {
          const int64_t at = (j + c) * s.planes_stride + w0;
          const __mmask16 mask = j + c < s.columns ? used : 0;
          above[c] = _mm512_maskz_loadu_epi32(mask, s.above + (mask != 0 ? at : 0));
          below[c] = _mm512_maskz_loadu_epi32(mask, s.below + (mask != 0 ? at : 0));
        }
        transpose_16(above);
        transpose_16(below);
        uint8_t* to = right + j / kSide * kPanelStep;
        for (int64_t r = 0; r < tiles * 2; ++r) {
          fetch_to_write(to + kPanelStep + r * (kTileBytes / 2), 64);
          expand_signs(above[r], below[r], to + r * (kTileBytes / 2));
        }
      }
      for (int64_t n = n0; n < n1; n += 32) {
        for (int64_t r = 0; r < 32; ++r) {
          const int64_t row = n + r < n1 ? n + r : n1 - 1;
          const uint32_t* bits = row < digits ? s.digits + row * s.sign_words
                                              : s.rows + (row - digits) * s.rows_stride;
          expand_left(_mm512_maskz_loadu_epi32(used, bits + w0),
                      left + r / kSide * kPanelStep + r % kSide * 64);
        }
        for (int64_t j = 0; j < columns; j += 32) {
          multiply(left, right + j / kSide * kPanelStep, tiles, w0 > 0,
                   products + (n - n0) * kSumStride + j, kSumStride, [](int64_t) {});
        }
      }
    }
    for (int64_t n = n0; n < n1; ++n) {
      const int32_t* product = products + (n - n0) * kSumStride;
      if (n < digits) {
        const double weight = static_cast<double>(int64_t{1} << n);
        for (int64_t j = 0; j < columns; ++j) {
          counts_signs[j] += weight * product[j];
          narrow_counts_signs[j] = narrow ? static_cast<int32_t>(counts_signs[j]) : 0;
        }
      } else {
        for (int64_t j = 0; j < s.columns; j += 64 / static_cast<int64_t>(sizeof(T))) {
          // rows lie on pages of their own, where nothing is fetched ahead
          __builtin_prefetch(s.g + (n - digits + 2) * s.g_stride + j, 1);
        }
        if (narrow) {
          backward_row(s, n - digits, product, narrow_counts_signs);
        } else {
          backward_row(s, n - digits, product, counts_signs);
        }
        sums.add(s.g + (n - digits) * s.g_stride, s.columns);
      }
    }
  }
  sums.store(s.column_sum, s.columns);
}

void backward_strip_amx_f32(const BackwardStrip<float>& s) { backward_strip_amx(s); }
void backward_strip_amx_f64(const BackwardStrip<double>& s) { backward_strip_amx(s); }

constexpr Kernels make_amx_kernels() {
  Kernels k = with_sparse(make_kernels("amx", kFixedColumns));
  k.transpose = transpose_fast;
  k.strip = kWidth;
  k.covariance_scratch = kCovarianceScratch;
  k.backward_scratch = backward_scratch_amx;
  k.product_scratch = kFixedScratch;
  k.bits_product = fixed_product;
  k.units = &kUnits;
  k.covariance_tile = covariance_tile_amx;
  k.backward_strip_f32 = backward_strip_amx_f32;
  k.backward_strip_f64 = backward_strip_amx_f64;
  return k;
}

}  // namespace

const Kernels kAmxKernels = make_amx_kernels();

}  // namespace bae_fast
#endif
