// NEON: popcounts of bytes by CNT, summed in bytes; bytes are widened by pairwise adds every 31
// words, before 8 ones a byte and word could pass 255. Part of every aarch64 CPU.
#include "kernels.h"
#include "layout.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace bae_fast {
namespace {

// Eight columns as two registers.
struct Vector {
  static constexpr int kLanes = 8, kRowsBlock = 4, kRegisters = 2, kLines = 4, kFloats = 4;
  static constexpr int64_t kFlush = 31;
  struct Words {
    uint32x4_t low, high;
  };
  struct Partial {
    uint8x16_t low, high;
  };
  using Counts = Words;

  static Partial zero() { return {vdupq_n_u8(0), vdupq_n_u8(0)}; }
  static Counts no_counts() { return {vdupq_n_u32(0), vdupq_n_u32(0)}; }
  static Words load(const uint32_t* p) { return {vld1q_u32(p), vld1q_u32(p + 4)}; }
  static Words broadcast(uint32_t word) { return {vdupq_n_u32(word), vdupq_n_u32(word)}; }
  static uint8x16_t ones(uint32x4_t a, uint32x4_t b) {
    return vcntq_u8(vreinterpretq_u8_u32(vandq_u32(a, b)));
  }
  static Partial add_count(Partial sum, Words a, Words b) {
    return {vaddq_u8(sum.low, ones(a.low, b.low)), vaddq_u8(sum.high, ones(a.high, b.high))};
  }
  static Counts widen(Partial sum) {
    return {vpaddlq_u16(vpaddlq_u8(sum.low)), vpaddlq_u16(vpaddlq_u8(sum.high))};
  }
  static Counts add(Counts a, Counts b) {
    return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)};
  }
  static Counts subtract(Counts a, Counts b) {
    return {vsubq_u32(a.low, b.low), vsubq_u32(a.high, b.high)};
  }
  static Counts shifted_counts(const int32_t* counts) {
    const uint32x4_t low = vreinterpretq_u32_s32(vld1q_s32(counts));
    const uint32x4_t high = vreinterpretq_u32_s32(vld1q_s32(counts + 4));
    return {vshlq_n_u32(low, 16), vshlq_n_u32(high, 16)};
  }
  static uint32x4_t dot_pair(uint32x4_t pairs, int32_t n_rows, int32_t n_i) {
    const int32x4_t n_ij = vreinterpretq_s32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF)));
    const int32x4_t n_j = vreinterpretq_s32_u32(vshrq_n_u32(pairs, 16));
    return vreinterpretq_u32_s32(vmlsq_n_s32(vmulq_n_s32(n_ij, n_rows), n_j, n_i));
  }
  static Counts dot_pairs(Counts pairs, int32_t n_rows, int32_t n_i) {
    return {dot_pair(pairs.low, n_rows, n_i), dot_pair(pairs.high, n_rows, n_i)};
  }
  static uint32x4_t absolute(uint32x4_t v) {
    return vreinterpretq_u32_s32(vabsq_s32(vreinterpretq_s32_u32(v)));
  }
  static Counts add_absolute(Counts sum, Counts v) {
    return {vaddq_u32(sum.low, absolute(v.low)), vaddq_u32(sum.high, absolute(v.high))};
  }
  // One bit a lane of masks that are all ones or all zeros.
  static uint32_t mask(uint32x4_t low, uint32x4_t high) {
    const uint32x4_t first = {1, 2, 4, 8}, second = {16, 32, 64, 128};
    return vaddvq_u32(vandq_u32(low, first)) + vaddvq_u32(vandq_u32(high, second));
  }
  static uint32_t above_zero(Counts v) {
    return mask(vcgtzq_s32(vreinterpretq_s32_u32(v.low)),
                vcgtzq_s32(vreinterpretq_s32_u32(v.high)));
  }
  static uint32_t below_zero(Counts v) {
    return mask(vcltzq_s32(vreinterpretq_s32_u32(v.low)),
                vcltzq_s32(vreinterpretq_s32_u32(v.high)));
  }
  static int64_t sum_unsigned(Counts sum) {
    return static_cast<int64_t>(vaddlvq_u32(sum.low) + vaddlvq_u32(sum.high));
  }
  static uint32_t positive(const float* pre) {
    uint32_t out = 0;
    for (int t = 0; t < 4; ++t) {
      out |= mask(vcgtzq_f32(vld1q_f32(pre + 8 * t)), vcgtzq_f32(vld1q_f32(pre + 8 * t + 4)))
             << 8 * t;
    }
    return out;
  }
  static uint32_t within(const float* pre, float width) {
    const float32x4_t limit = vdupq_n_f32(width);
    uint32_t out = 0;
    for (int t = 0; t < 4; ++t) {
      out |= mask(vcaltq_f32(vld1q_f32(pre + 8 * t), limit),
                  vcaltq_f32(vld1q_f32(pre + 8 * t + 4), limit))
             << 8 * t;
    }
    return out;
  }
};

}  // namespace
}  // namespace bae_fast

#include "kernels_impl.h"
#include "kernels_sparse.h"

namespace bae_fast {
const Kernels kNeonKernels = with_sparse(make_kernels("neon", INT64_MAX));
}  // namespace bae_fast
#endif
