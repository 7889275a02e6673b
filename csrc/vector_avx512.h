// Vectors of 16 columns for kernels_impl.h: and, vpopcntd, add take 16 columns and 32 rows at once.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bae_fast {
namespace {

struct Vector {
  static constexpr int kLanes = 16, kRowsBlock = 4, kRegisters = 4, kLines = 8, kFloats = 16;
  static constexpr int64_t kFlush = INT64_MAX / 2;
  using Words = __m512i;
  using Counts = __m512i;
  using Partial = __m512i;

  static Words zero() { return _mm512_setzero_si512(); }
  static Counts no_counts() { return _mm512_setzero_si512(); }
  static Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Words broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  static Partial add_count(Partial sum, Words a, Words b) {
    return _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_and_si512(a, b)));
  }
  static Counts widen(Partial sum) { return sum; }
  static Counts add(Counts a, Counts b) { return _mm512_add_epi32(a, b); }
  static Counts subtract(Counts a, Counts b) { return _mm512_sub_epi32(a, b); }
  static Counts shifted_counts(const int32_t* counts) {
    return _mm512_slli_epi32(_mm512_loadu_si512(counts), 16);
  }
  static Counts dot_pairs(Counts pairs, int32_t n_rows, int32_t n_i) {
    const uint32_t factors = static_cast<uint32_t>(-n_i) << 16 | static_cast<uint32_t>(n_rows);
    return _mm512_madd_epi16(pairs, _mm512_set1_epi32(static_cast<int>(factors)));
  }
  static Counts add_absolute(Counts sum, Counts v) {
    return _mm512_add_epi32(sum, _mm512_abs_epi32(v));
  }
  static uint32_t above_zero(Counts v) {
    return _mm512_cmpgt_epi32_mask(v, _mm512_setzero_si512());
  }
  static uint32_t below_zero(Counts v) { return _mm512_movepi32_mask(v); }
  static int64_t sum_unsigned(Counts sum) {
    const __m512i low = _mm512_and_si512(sum, _mm512_set1_epi64(0xFFFFFFFF));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, _mm512_srli_epi64(sum, 32)));
  }
  static uint32_t positive(const float* pre) {
    const __mmask16 low = _mm512_cmp_ps_mask(_mm512_loadu_ps(pre), _mm512_setzero_ps(), _CMP_GT_OQ);
    const __mmask16 high =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(pre + 16), _mm512_setzero_ps(), _CMP_GT_OQ);
    return static_cast<uint32_t>(high) << 16 | low;
  }
  static uint32_t within(const float* pre, float width) {
    const __m512 limit = _mm512_set1_ps(width);
    const __mmask16 low =
        _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(pre)), limit, _CMP_LT_OQ);
    const __mmask16 high =
        _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(pre + 16)), limit, _CMP_LT_OQ);
    return static_cast<uint32_t>(high) << 16 | low;
  }
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

// transpose of kernels.h, 32 rows by 512 columns at a time: the bytes of a word position from all
// 32 rows side by side, then one mask a bit of them.
inline void transpose_fast(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns,
                           uint32_t* out, int64_t out_stride) {
  const __m512i bytes = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  const __m512i low = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
  const int64_t words = (columns + 31) / 32;
  for (int64_t w = 0; w < words; w += 16) {
    const __mmask16 used = words - w < 16 ? (1u << (words - w)) - 1 : 0xFFFF;
    __m512i top[16], bottom[16];
    for (int64_t r = 0; r < 16; ++r) {
      const uint32_t* row = in + r * in_stride + w;
      top[r] = r < rows ? _mm512_maskz_loadu_epi32(used, row) : _mm512_setzero_si512();
      bottom[r] = r + 16 < rows ? _mm512_maskz_loadu_epi32(used, row + 16 * in_stride)
                                : _mm512_setzero_si512();
    }
    transpose_16(top);
    transpose_16(bottom);
    for (int64_t lane = 0; lane < 16 && w + lane < words; ++lane) {
      const __m512i a = _mm512_shuffle_epi8(top[lane], bytes);
      const __m512i b = _mm512_shuffle_epi8(bottom[lane], bytes);
      __m512i first = _mm512_permutex2var_epi32(a, low, b);    // bytes 0, then 1, of 32 rows
      __m512i second = _mm512_permutex2var_epi32(a, high, b);  // bytes 2, then 3
      const int64_t column = (w + lane) * 32;
      uint32_t* to = out + column * out_stride;
      if (column + 32 <= columns) {
#pragma GCC unroll 8
        for (int64_t bit = 7; bit >= 0; --bit) {
          const uint64_t one = _mm512_movepi8_mask(first), two = _mm512_movepi8_mask(second);
          to[bit * out_stride] = static_cast<uint32_t>(one);
          to[(bit + 8) * out_stride] = static_cast<uint32_t>(one >> 32);
          to[(bit + 16) * out_stride] = static_cast<uint32_t>(two);
          to[(bit + 24) * out_stride] = static_cast<uint32_t>(two >> 32);
          first = _mm512_add_epi8(first, first);
          second = _mm512_add_epi8(second, second);
        }
        continue;
      }
      for (int64_t bit = 7; bit >= 0; --bit) {
        const uint64_t masks[2] = {_mm512_movepi8_mask(first), _mm512_movepi8_mask(second)};
        for (int64_t byte = 0; byte < 4; ++byte) {
          if (column + 8 * byte + bit < columns) {
            to[(8 * byte + bit) * out_stride] =
                static_cast<uint32_t>(masks[byte / 2] >> 32 * (byte % 2));
          }
        }
        first = _mm512_add_epi8(first, first);
        second = _mm512_add_epi8(second, second);
      }
    }
  }
}

}  // namespace
}  // namespace bae_fast
