// AVX2: popcounts of nibbles by vpshufb, summed in bytes; bytes are widened every 31 words, before
// 8 ones a byte and word could pass 255. Compiled with -mavx2.
#include "kernels.h"
#include "layout.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace bae_fast {
namespace {

struct Vector {
  static constexpr int kLanes = 8, kRowsBlock = 4, kRegisters = 2;
  static constexpr int64_t kFlush = 31;
  using Words = __m256i;
  using Counts = __m256i;
  using Partial = __m256i;

  static Words zero() { return _mm256_setzero_si256(); }
  static Counts no_counts() { return _mm256_setzero_si256(); }
  static Words load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Words broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
  static Partial add_count(Partial sum, Words a, Words b) {
    const __m256i ones = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1,
                                          2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i both = _mm256_and_si256(a, b);
    const __m256i first = _mm256_shuffle_epi8(ones, _mm256_and_si256(both, low));
    const __m256i second =
        _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi32(both, 4), low));
    return _mm256_add_epi8(sum, _mm256_add_epi8(first, second));
  }
  static Counts widen(Partial sum) {
    const __m256i pairs = _mm256_maddubs_epi16(sum, _mm256_set1_epi8(1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static Counts add(Counts a, Counts b) { return _mm256_add_epi32(a, b); }
  static Counts subtract(Counts a, Counts b) { return _mm256_sub_epi32(a, b); }
  static Counts shifted_counts(const int32_t* counts) {
    return _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts)), 16);
  }
  static Counts dot_pairs(Counts pairs, int32_t n_rows, int32_t n_i) {
    const uint32_t factors = static_cast<uint32_t>(-n_i) << 16 | static_cast<uint32_t>(n_rows);
    return _mm256_madd_epi16(pairs, _mm256_set1_epi32(static_cast<int>(factors)));
  }
  static Counts add_absolute(Counts sum, Counts v) {
    return _mm256_add_epi32(sum, _mm256_abs_epi32(v));
  }
  static uint32_t above_zero(Counts v) {
    return static_cast<uint32_t>(_mm256_movemask_ps(
        _mm256_castsi256_ps(_mm256_cmpgt_epi32(v, _mm256_setzero_si256()))));
  }
  static uint32_t below_zero(Counts v) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v)));
  }
  static int64_t sum_unsigned(Counts sum) {
    const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
    const __m256i halves =
        _mm256_add_epi64(_mm256_and_si256(sum, low), _mm256_srli_epi64(sum, 32));
    alignas(32) int64_t lane[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), halves);
    return lane[0] + lane[1] + lane[2] + lane[3];
  }
  static uint32_t positive(const float* pre) {
    uint32_t mask = 0;
    for (int t = 0; t < 4; ++t) {
      const __m256 above =
          _mm256_cmp_ps(_mm256_loadu_ps(pre + 8 * t), _mm256_setzero_ps(), _CMP_GT_OQ);
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(above)) << 8 * t;
    }
    return mask;
  }
  static uint32_t within(const float* pre, float width) {
    const __m256 sign = _mm256_set1_ps(-0.0f), limit = _mm256_set1_ps(width);
    uint32_t mask = 0;
    for (int t = 0; t < 4; ++t) {
      const __m256 size = _mm256_andnot_ps(sign, _mm256_loadu_ps(pre + 8 * t));
      const __m256 inside = _mm256_cmp_ps(size, limit, _CMP_LT_OQ);
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(inside)) << 8 * t;
    }
    return mask;
  }
};

}  // namespace
}  // namespace bae_fast

#include "kernels_impl.h"
#include "kernels_sparse.h"

namespace bae_fast {
const Kernels kAvx2Kernels = with_sparse(make_kernels("avx2"));
}  // namespace bae_fast
#endif
