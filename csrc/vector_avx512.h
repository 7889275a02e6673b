// Vectors of 16 columns for kernels_impl.h: and, vpopcntd, add take 16 columns and 32 rows at once.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bae_fast {
namespace {

struct Vector {
  static constexpr int kLanes = 16, kRowsBlock = 4, kRegisters = 4;
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
    const __mmask16 low =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(pre), _mm512_setzero_ps(), _CMP_GT_OQ);
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

}  // namespace
}  // namespace bae_fast
