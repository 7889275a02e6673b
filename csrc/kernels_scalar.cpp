// Plain C++ for any machine: eight lanes as an array, popcounts by arithmetic.
#include "kernels.h"
#include "layout.h"

namespace bae_fast {
namespace {

struct Vector {
  static constexpr int kLanes = 8, kRowsBlock = 2, kRegisters = 1, kLines = 2, kFloats = 4;
  static constexpr int64_t kFlush = INT64_MAX / 2;
  struct Words {
    uint32_t lane[kLanes];
  };
  using Counts = Words;
  using Partial = Words;

  static Words zero() { return {}; }
  static Counts no_counts() { return {}; }
  static Words load(const uint32_t* p) {
    Words out;
    __builtin_memcpy(&out, p, sizeof(out));
    return out;
  }
  static Words broadcast(uint32_t word) {
    Words out;
    for (uint32_t& lane : out.lane) lane = word;
    return out;
  }
  static Partial add_count(Partial sum, const Words& a, const Words& b) {
    for (int k = 0; k < kLanes; ++k) {
      uint32_t v = a.lane[k] & b.lane[k];
      v -= (v >> 1) & 0x55555555;
      v = (v & 0x33333333) + ((v >> 2) & 0x33333333);
      sum.lane[k] += (((v + (v >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24;
    }
    return sum;
  }
  static Counts widen(const Partial& sum) { return sum; }
  static Counts add(Counts a, const Counts& b) {
    for (int k = 0; k < kLanes; ++k) a.lane[k] += b.lane[k];
    return a;
  }
  static Counts subtract(Counts a, const Counts& b) {
    for (int k = 0; k < kLanes; ++k) a.lane[k] -= b.lane[k];
    return a;
  }
  static Counts shifted_counts(const int32_t* counts) {
    Counts out;
    for (int k = 0; k < kLanes; ++k) out.lane[k] = static_cast<uint32_t>(counts[k]) << 16;
    return out;
  }
  static Counts dot_pairs(Counts pairs, int32_t n_rows, int32_t n_i) {
    for (uint32_t& lane : pairs.lane) {
      const int32_t n_ij = static_cast<int32_t>(lane & 0xFFFF);
      const int32_t n_j = static_cast<int32_t>(lane >> 16);
      lane = static_cast<uint32_t>(n_rows * n_ij - n_i * n_j);
    }
    return pairs;
  }
  static Counts add_absolute(Counts sum, const Counts& v) {
    for (int k = 0; k < kLanes; ++k) {
      const int32_t value = static_cast<int32_t>(v.lane[k]);
      sum.lane[k] += static_cast<uint32_t>(value < 0 ? -value : value);
    }
    return sum;
  }
  static uint32_t above_zero(const Counts& v) {
    uint32_t mask = 0;
    for (int k = 0; k < kLanes; ++k) {
      mask |= static_cast<uint32_t>(static_cast<int32_t>(v.lane[k]) > 0) << k;
    }
    return mask;
  }
  static uint32_t below_zero(const Counts& v) {
    uint32_t mask = 0;
    for (int k = 0; k < kLanes; ++k) mask |= v.lane[k] >> 31 << k;
    return mask;
  }
  static int64_t sum_unsigned(const Counts& sum) {
    int64_t total = 0;
    for (uint32_t lane : sum.lane) total += lane;
    return total;
  }
  static uint32_t positive(const float* pre) {
    uint32_t mask = 0;
    for (int t = 0; t < 32; ++t) mask |= static_cast<uint32_t>(pre[t] > 0) << t;
    return mask;
  }
  static uint32_t within(const float* pre, float width) {
    uint32_t mask = 0;
    for (int t = 0; t < 32; ++t) {
      mask |= static_cast<uint32_t>(pre[t] < width && pre[t] > -width) << t;
    }
    return mask;
  }
};

}  // namespace
}  // namespace bae_fast

#include "kernels_impl.h"
#include "kernels_sparse.h"

namespace bae_fast {
const Kernels kScalarKernels = with_sparse(make_kernels("scalar", INT64_MAX));
}  // namespace bae_fast
