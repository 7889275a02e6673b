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

namespace bae_fast {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSide = 16;          // rows of a tile, columns of a tile of sums
constexpr int64_t kGroupWords = 16;    // words transposed at once: 512 of k
constexpr int64_t kBlockWords = 64;    // words of a block of k: 2048 of k, covariance
constexpr int64_t kSignWords = 16;     // words of a block of k: 512 of k, backward (measured)
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

constexpr int64_t kPanelStep = kBlockTiles * kTileBytes;  // bytes between 16 rows or columns
constexpr int64_t kRightBytes = kWidth / kSide * kPanelStep;
constexpr int64_t kSignStep = kSignWords / 2 * kTileBytes;
constexpr int64_t kSignBytes = kWidth / kSide * kSignStep;

// ---- products -----------------------------------------------------------------------------------

// sums [32, 32] of two rows and two columns of tiles; starts from what is there when `resume`.
// `between(step)` runs between the products of one k and the next: vector work that hides there.
template <int64_t kStep, typename Between>
inline __attribute__((always_inline)) void multiply(const uint8_t* left, const uint8_t* right,
                                                    int64_t tiles, bool resume, int32_t* sums,
                                                    int64_t stride, Between between) {
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
    _tile_loadd(7, right + kStep + t * kTileBytes, 64);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, left + kStep + t * kTileBytes, 64);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    between(t);
    // the right side streams from the outer cache
    for (int64_t line = 0; line < kTileBytes; line += 64) {
      const char* next = reinterpret_cast<const char*>(right + (t + 2) * kTileBytes + line);
      _mm_prefetch(next, _MM_HINT_T0);
      _mm_prefetch(next + kStep, _MM_HINT_T0);
    }
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kSide, bytes);
  _tile_stored(2, sums + kSide * stride, bytes);
  _tile_stored(3, sums + kSide * stride + kSide, bytes);
}


// ---- covariance ---------------------------------------------------------------------------------

constexpr int64_t kCovarianceScratch =
    kLeftRows / kSide * kPanelStep + kRightBytes + kLeftRows * kWidth * 4;

// A block of 32 x 32 counts of pairs, to be turned into V: its sum of |V|, and its signs.
struct Block {
  const int32_t* sums = nullptr;
  int64_t stride = 0;
  int64_t i = 0, j = 0;
};

// Rows r0 .. r1 of a block, V in int32 while N < 2^15. Each of 32 lanes of `total` takes two |V| of
// a row, 32 rows in all: 64 bits a pair of lanes hold them.
inline __attribute__((always_inline)) void finish_rows(const CovarianceTile& t, const Block& b,
                                                       int64_t r0, int64_t r1, __m512i& total) {
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF);
  const __m512i ones_0 = Vector::shifted_counts(t.counts + b.j);
  const __m512i ones_1 = Vector::shifted_counts(t.counts + b.j + kSide);
  for (int64_t r = r0; r < r1; ++r) {
    const uint32_t factors = static_cast<uint32_t>(-t.counts[b.i + r]) << 16 |
                             static_cast<uint32_t>(t.n_rows);
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(factors));
    const int32_t* row = b.sums + r * b.stride;
    const __m512i v0 =
        _mm512_madd_epi16(_mm512_add_epi32(ones_0, _mm512_loadu_si512(row)), factor);
    const __m512i v1 =
        _mm512_madd_epi16(_mm512_add_epi32(ones_1, _mm512_loadu_si512(row + kSide)), factor);
    const __m512i sum = _mm512_add_epi32(_mm512_abs_epi32(v0), _mm512_abs_epi32(v1));
    total = _mm512_add_epi64(total, _mm512_add_epi64(_mm512_and_si512(sum, low),
                                                     _mm512_srli_epi64(sum, 32)));
    if (t.above != nullptr) {
      const int64_t at = (b.i + r - t.i0) * t.planes_stride + (b.j - t.j0) / kWordBits;
      t.above[at] = _mm512_kunpackw(_mm512_cmpgt_epi32_mask(v1, _mm512_setzero_si512()),
                                    _mm512_cmpgt_epi32_mask(v0, _mm512_setzero_si512()));
      t.below[at] = _mm512_kunpackw(_mm512_movepi32_mask(v1), _mm512_movepi32_mask(v0));
    }
  }
}

// The same for a whole block with V in int64.
int64_t finish_wide(const CovarianceTile& t, const Block& b) {
  int64_t total = 0;
  for (int64_t r = 0; r < 32; ++r) {
    uint32_t above = 0, below = 0;
    for (int64_t c = 0; c < 32; ++c) {
      const int64_t v = t.n_rows * static_cast<int64_t>(b.sums[r * b.stride + c]) -
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

int64_t covariance_tile_amx(const CovarianceTile& t) {
  const Tiles configured;
  uint8_t* const left = t.scratch;
  uint8_t* const right = left + kLeftRows / kSide * kPanelStep;
  int32_t* const resting = reinterpret_cast<int32_t*>(right + kRightBytes);
  alignas(64) int32_t local[2][32 * 32];
  const bool one_block = t.words <= kBlockWords, narrow = t.n_rows < 1 << 15;
  int64_t total = 0;
  __m512i lanes = _mm512_setzero_si512();
  Block pending;  // counted, not finished: that is done between the products of the next block
  int turn = 0;
  for (int64_t j0 = t.j0; j0 < t.j1; j0 += kWidth) {
    const int64_t j1 = t.j1 - j0 < kWidth ? t.j1 : j0 + kWidth;
    for (int64_t w0 = 0; w0 < t.words; w0 += kBlockWords) {
      const int64_t words = t.words - w0 < kBlockWords ? t.words - w0 : kBlockWords;
      const int64_t tiles = (words + 1) / 2;
      for (int64_t i = t.i0; i < t.i1 && !(one_block && (t.same_rows || j0 > t.j0)); i += kSide) {
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
      const bool last = w0 + words == t.words;
      const int64_t share = (32 + tiles - 1) / tiles;
      for (int64_t j = j0; j < j1; j += 32) {
        for (int64_t i = t.i0; i < t.i1; i += 32) {
          Block block{one_block ? local[turn] : resting + (i - t.i0) * kWidth + (j - j0),
                      one_block ? 32 : kWidth, i, j};
          multiply<kPanelStep>(left + (i - t.i0) / kSide * kPanelStep, right + (j - j0) / kSide * kPanelStep,
                   tiles, w0 > 0, const_cast<int32_t*>(block.sums), block.stride, [&](int64_t k) {
                     if (pending.sums == nullptr) return;
                     const int64_t r0 = k * share < 32 ? k * share : 32;
                     const int64_t r1 = r0 + share < 32 ? r0 + share : 32;
                     finish_rows(t, pending, r0, r1, lanes);
                   });
          pending.sums = nullptr;
          if (last && narrow) {
            pending = block;
            turn ^= 1;
          } else if (last) {
            total += finish_wide(t, block);
          }
        }
      }
      if (pending.sums != nullptr) {
        finish_rows(t, pending, 0, 32, lanes);
        pending.sums = nullptr;
      }
    }
  }
  return total + _mm512_reduce_add_epi64(lanes);
}

// ---- backward of the encoder --------------------------------------------------------------------

// a left panel of 32 rows, a right panel, sums
int64_t backward_scratch_amx(int64_t) { return 2 * kSignStep + kSignBytes + kSumRows * kWidth * 4; }

template <typename T>
void backward_strip_amx(const BackwardStrip<T>& s) {
  alignas(64) double counts_signs[kWidth] = {};  // n^T S, an integer
  ColumnSums<T> sums;
  uint8_t* const left = s.scratch;
  uint8_t* const right = left + 2 * kSignStep;
  int32_t* const products = reinterpret_cast<int32_t*>(right + kSignBytes);
  const bool covariance = s.above != nullptr;
  const int64_t digits = covariance ? s.n_digits : 0, rows = digits + s.n;
  const int64_t columns = round_up(s.columns, 32);
  for (int64_t n0 = 0; n0 < rows; n0 += kSumRows) {
    const int64_t n1 = rows - n0 < kSumRows ? rows : n0 + kSumRows;
    for (int64_t w0 = 0; covariance && w0 < s.sign_words; w0 += kSignWords) {
      const Tiles configured;
      const int64_t words = s.sign_words - w0 < kSignWords ? s.sign_words - w0 : kSignWords;
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
          uint8_t* to = right + j / kSide * kSignStep + w * (kTileBytes / 2);
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
                        left + r / kSide * kSignStep + w / 2 * kTileBytes + r % kSide * 64);
          }
        }
        for (int64_t j = 0; j < columns; j += 32) {
          multiply<kSignStep>(left, right + j / kSide * kSignStep, tiles, w0 > 0,
                   products + (n - n0) * kWidth + j, kWidth, [](int64_t) {});
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

// ---- bits x dense -------------------------------------------------------------------------------

// A float is the sum of three bf16 numbers, the digits of its 24 bits by truncation, exactly: a
// product with bits takes three products of bf16 tiles. The small parts are summed first, blocks of
// k from zero, so that the rounding is that of a blocked sum in fp32.
//
//     left   row m, bf16 k: bits as 0 or 1
//     right  row k / 2, bf16 2 c + k % 2 of column c, one panel a part
constexpr int64_t kDenseTiles = kProductDepth / 32;
constexpr int64_t kDenseStep = kDenseTiles * kTileBytes;
constexpr int64_t kPartBytes = kProductColumns / kSide * kDenseStep;
constexpr int64_t kProductScratch = 2 * kDenseStep + 3 * kPartBytes;

// Two rows of 16 columns to one row of a tile of each part: smallest, middle, largest.
inline void expand_dense(__m512 even, __m512 odd, uint8_t* out) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
#pragma GCC unroll 3
  for (int part = 2; part >= 0; --part) {
    const __m512i e = _mm512_and_si512(_mm512_castps_si512(even), top);
    const __m512i o = _mm512_and_si512(_mm512_castps_si512(odd), top);
    _mm512_store_si512(out + part * kPartBytes, _mm512_or_si512(_mm512_srli_epi32(e, 16), o));
    even = _mm512_sub_ps(even, _mm512_castsi512_ps(e));
    odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(o));
  }
}

void bits_product_amx(const BitsProduct& p) {
  alignas(64) float sums[32][32];
  uint8_t* const left = p.scratch;
  uint8_t* const right = left + 2 * kDenseStep;
  const Tiles configured;
  for (int64_t k0 = 0; k0 < p.depth; k0 += kProductDepth) {
    const int64_t depth = p.depth - k0 < kProductDepth ? p.depth - k0 : kProductDepth;
    const int64_t tiles = (depth + 31) / 32;
    for (int64_t k = 0; k < tiles * 32; k += 2) {
      for (int64_t c = 0; c < round_up(p.columns, 32); c += kSide) {
        const __mmask16 used = first_words(p.columns - c);
        const float* row = p.dense + (k0 + k) * p.dense_stride + c;
        // rows lie on pages of their own, where nothing is fetched ahead
        _mm_prefetch(reinterpret_cast<const char*>(row + 32 * p.dense_stride), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(row + 33 * p.dense_stride), _MM_HINT_T0);
        const __mmask16 first = k < depth ? used : 0, second = k + 1 < depth ? used : 0;
        expand_dense(_mm512_maskz_loadu_ps(first, first != 0 ? row : p.dense),
                     _mm512_maskz_loadu_ps(second, second != 0 ? row + p.dense_stride : p.dense),
                     right + c / kSide * kDenseStep + k / 32 * kTileBytes + k % 32 / 2 * 64);
      }
    }
    for (int64_t m = 0; m < p.rows; m += 32) {
      for (int64_t r = 0; r < 32; ++r) {
        const uint32_t* bits =
            p.bits + (m + r < p.rows ? m + r : p.rows - 1) * p.bits_stride + k0 / kWordBits;
        for (int64_t t = 0; t < tiles; ++t) {
          _mm512_store_si512(left + r / kSide * kDenseStep + t * kTileBytes + r % kSide * 64,
                             _mm512_maskz_set1_epi16(bits[t], 0x3F80));
        }
      }
      for (int64_t c = 0; c < p.columns; c += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int part = 0; part < 3; ++part) {
          const uint8_t* from = right + part * kPartBytes + c / kSide * kDenseStep;
          for (int64_t t = 0; t < tiles; ++t) {
            _tile_loadd(4, left + t * kTileBytes, 64);
            _tile_loadd(6, from + t * kTileBytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, from + kDenseStep + t * kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, left + kDenseStep + t * kTileBytes, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            // the right side streams from the outer cache, the left one stays in the inner
            for (int64_t line = 0; line < kTileBytes; line += 64) {
              const char* next = reinterpret_cast<const char*>(from + (t + 2) * kTileBytes + line);
              _mm_prefetch(next, _MM_HINT_T0);
              _mm_prefetch(next + kDenseStep, _MM_HINT_T0);
            }
          }
        }
        _tile_stored(0, sums[0], 128);
        _tile_stored(1, sums[0] + kSide, 128);
        _tile_stored(2, sums[kSide], 128);
        _tile_stored(3, sums[kSide] + kSide, 128);
        for (int64_t r = 0; r < 32 && m + r < p.rows; ++r) {
          for (int64_t half = 0; half < 32; half += kSide) {
            const __mmask16 used = first_words(p.columns - c - half);
            float* to = p.out + (m + r) * p.out_stride + c + half;
            if (used == 0) continue;
            const __mmask16 there = p.add || k0 > 0 ? used : 0;
            const __m512 sum =
                _mm512_add_ps(_mm512_maskz_loadu_ps(there, to), _mm512_load_ps(sums[r] + half));
            _mm512_mask_storeu_ps(to, used, sum);
          }
        }
      }
    }
  }
}

constexpr Kernels make_amx_kernels() {
  Kernels k = with_sparse(make_kernels("amx"));
  k.transpose = transpose_fast;
  k.strip = kWidth;
  k.covariance_scratch = kCovarianceScratch;
  k.backward_scratch = backward_scratch_amx;
  k.product_scratch = kProductScratch;
  k.bits_product = bits_product_amx;
  k.covariance_tile = covariance_tile_amx;
  k.backward_strip_f32 = backward_strip_amx_f32;
  k.backward_strip_f64 = backward_strip_amx_f64;
  return k;
}

}  // namespace

const Kernels kAmxKernels = make_amx_kernels();

}  // namespace bae_fast
#endif
