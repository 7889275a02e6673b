// AVX2: pairs counted by look-ups of nibbles (vpshufb), and dense products of its own
// (fma_products.h). Compiled with -mavx2 and -mfma.
//
// The table of a nibble of signs, 16 bytes, is one of 81, three signs to the power of four: none is
// ever built. Its number has the signs as digits to the base of three, 0, 1, 2 for 0, 1, -1.
//
// Covariance. n_ij is the product with a sign of 1 where the bit of feature i is one: the same
// tables and the same look-ups, lanes being features j and the summed index the rows.
#include "kernels.h"
#include "layout.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace bae_fast {
namespace {

struct Vector {
  static constexpr int kLines = 4, kFloats = 8;

  // popcounts of single rows, for kernels_sparse.h: of nibbles, summed in bytes; bytes are widened
  // before 8 ones a byte and word could pass 255
  static constexpr int kLanes = 8;
  static constexpr int64_t kFlush = 31;
  using Words = __m256i;
  using Counts = __m256i;
  using Partial = __m256i;

  static Words zero() { return _mm256_setzero_si256(); }
  static Counts no_counts() { return _mm256_setzero_si256(); }
  static Words load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
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

struct SignTables {
  alignas(64) int8_t sum[81][16];
};

constexpr SignTables make_sign_tables() {
  SignTables tables{};
  for (int t = 0; t < 81; ++t) {
    for (int bits = 0; bits < 16; ++bits) {
      for (int b = 0, rest = t; b < 4; ++b, rest /= 3) {
        if ((bits >> b & 1) != 0) tables.sum[t][bits] += rest % 3 == 2 ? -1 : rest % 3;
      }
    }
  }
  return tables;
}

constexpr SignTables kSignTables = make_sign_tables();

struct Lookup {
  static constexpr int kGroup = 4, kRows = 32, kVectors = 4, kColumns = 2;
  static constexpr int64_t kChunkWords = 32, kUnitWords = 1, kUnitSteps = 8, kIndexBytes = 1;
  using Bytes = __m256i;
  using Wide = __m256i;

  static Bytes zero() { return _mm256_setzero_si256(); }
  static Bytes load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  // index: twice the number of the table, so that an address scales it by 8
  static Bytes table(const uint8_t* index, int64_t step) {
    const int8_t* at = kSignTables.sum[0] + 8 * static_cast<uint64_t>(index[step]);
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Bytes look_up(Bytes table, Bytes lanes) { return _mm256_shuffle_epi8(table, lanes); }
  static Bytes add(Bytes a, Bytes b) {
    Bytes sum = _mm256_add_epi8(a, b);
    __asm__("" : "+x"(sum));  // or the compiler regroups the sums of several steps and spills
    return sum;
  }
  static Wide add_wide(Wide a, Wide b) { return _mm256_add_epi16(a, b); }
  template <bool kSigned>
  static Wide even(Bytes sums) {
    const __m256i pick = _mm256_set1_epi16(1);
    return kSigned ? _mm256_maddubs_epi16(pick, sums) : _mm256_maddubs_epi16(sums, pick);
  }
  template <bool kSigned>
  static Wide odd(Bytes sums) {
    const __m256i pick = _mm256_set1_epi16(256);
    return kSigned ? _mm256_maddubs_epi16(pick, sums) : _mm256_maddubs_epi16(sums, pick);
  }

  // 32 words to 8 steps: the low nibbles of their four bytes, then the high ones. Even bytes are
  // words 0 .. 7 and 16 .. 23, odd ones the others: halves of 16-bit sums are in order.
  static void fill_lanes(const uint32_t* words, int64_t, uint8_t* out, int64_t step_bytes) {
    const __m256i group = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0,
                                           4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i pairs = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15, 0,
                                           8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const __m256i low = _mm256_set1_epi8(15);
    __m256i a[4];
    for (int q = 0; q < 4; ++q) {
      a[q] = _mm256_shuffle_epi8(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 * q)), group);
    }
    const __m256i first[2] = {_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1])};
    const __m256i last[2] = {_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3])};
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      const __m256i mixed = b % 2 == 0 ? _mm256_unpacklo_epi64(first[b / 2], last[b / 2])
                                       : _mm256_unpackhi_epi64(first[b / 2], last[b / 2]);
      const __m256i byte = _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(mixed, lanes), pairs);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b * step_bytes),
                          _mm256_and_si256(byte, low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (4 + b) * step_bytes),
                          _mm256_and_si256(_mm256_srli_epi16(byte, 4), low));
    }
  }

  // Signs of one word, 32 features, to the indices of 8 steps in the order of fill_lanes.
  static uint64_t word_index(uint32_t above, uint32_t below) {
    constexpr uint64_t kNibbles = 0x0F0F0F0F0F0F0F0F, kOnes = 0x0101010101010101;
    const uint64_t p = (above | static_cast<uint64_t>(above) << 28) & kNibbles;
    const uint64_t m = (below | static_cast<uint64_t>(below) << 28) & kNibbles;
    uint64_t number = 0;
    for (int b = 3; b >= 0; --b) {  // by Horner's rule; bytes stay below 81
      number = 2 * number + number + (p >> b & kOnes) + 2 * (m >> b & kOnes);
    }
    return 2 * number;
  }
  static void fill_index(const uint32_t* above, const uint32_t* below, int64_t words,
                         uint8_t* out) {
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t index = word_index(above[w], below[w]);
      __builtin_memcpy(out + 8 * w, &index, 8);
    }
  }

  // 32 sums in order, in int32.
  static void add_to(int32_t* out, const Wide (&sums)[2], bool resume) {
    for (int q = 0; q < 4; ++q) {
      const Wide of = sums[q % 2];
      const __m256i sum = _mm256_cvtepi16_epi32(q < 2 ? _mm256_castsi256_si128(of)
                                                      : _mm256_extracti128_si256(of, 1));
      __m256i* const to = reinterpret_cast<__m256i*>(out + 8 * q);
      _mm256_store_si256(to, resume ? _mm256_add_epi32(_mm256_load_si256(to), sum) : sum);
    }
  }
  // Sums as they are.
  static void rest(int32_t* out, const Wide (&sums)[2]) {
    for (int half = 0; half < 2; ++half) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out) + half, sums[half]);
    }
  }
  static void resume(const int32_t* from, Wide (&sums)[2]) {
    for (int half = 0; half < 2; ++half) {
      const __m256i before = _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + half);
      sums[half] = _mm256_add_epi16(sums[half], before);
    }
  }
};

// for fma_products.h
struct Fma {
  static constexpr int64_t kLanes = 8, kRows = 6;
  using Numbers = __m256;

  static Numbers zero() { return _mm256_setzero_ps(); }
  static Numbers load(const float* from) { return _mm256_loadu_ps(from); }
  static Numbers load(const uint16_t* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Numbers broadcast(const float* from) { return _mm256_broadcast_ss(from); }
  static void store(float* to, Numbers v) { _mm256_storeu_ps(to, v); }
  static Numbers add(Numbers a, Numbers b) { return _mm256_add_ps(a, b); }
  static Numbers multiply_add(Numbers a, Numbers b, Numbers sum) {
    return _mm256_fmadd_ps(a, b, sum);
  }
  static void transpose(Numbers (&v)[8]) {
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
      quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

// for screened_encode.h
struct Pairs {
  static constexpr int64_t kLanes = 8, kRows = 6;
  using Numbers = __m256i;

  static Numbers zero() { return _mm256_setzero_si256(); }
  static Numbers load(const int32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static Numbers broadcast(const int32_t* from) { return _mm256_set1_epi32(*from); }
  static void store(int32_t* to, Numbers v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  }
  static Numbers add(Numbers a, Numbers b) { return _mm256_add_epi32(a, b); }
  static Numbers multiply_add(Numbers a, Numbers b, Numbers sum) {
    // gcc moves the sums of the intrinsics back and forth, which halves the rate
    Numbers products;
    __asm__("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
  }
};

}  // namespace
}  // namespace bae_fast

#include "kernels_shared.h"
#include "kernels_sparse.h"
// after what it is written with
#include "kernels_lookup.h"
// after the vectors and what sets thresholds
#include "fma_products.h"
#include "screened_encode.h"

namespace bae_fast {
namespace {

// ---- covariance ---------------------------------------------------------------------------------

constexpr int64_t kTileRows = 512;  // features i of a tile
constexpr int64_t kSpan = 512;      // features j whose counts rest in memory
constexpr int64_t kPanel = Lookup::kVectors * Lookup::kRows;
constexpr int64_t kCovarianceScratch =
    kTileRows * kIndexBytes + kPanel * kChunkSteps + kTileRows * kSpan * 4;

// Counts n_j of 32 columns in the order of their 16-bit sums, modulo 2^16.
inline void fill_counts(const int32_t* counts, __m256i (&out)[2]) {
  const __m256i low = _mm256_set1_epi32(0xFFFF);
  __m256i n[4];
  for (int q = 0; q < 4; ++q) {
    n[q] =
        _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts + 8 * q)), low);
  }
  for (int odd = 0; odd < 2; ++odd) {
    out[odd] = _mm256_permute4x64_epi64(_mm256_packus_epi32(n[odd], n[2 + odd]), 0xD8);
  }
}

// |V| of one i and 32 j, added to eight sums, and its signs; N < 2^15. One multiply-add of 16-bit
// pairs, (n_ij, n_j) . (N, -n_i), is V in int32. Lanes of j up to `before` do not count.
inline __m256i finish_narrow(const CovarianceTile& t, const Lookup::Wide (&n_ij)[2],
                             const __m256i (&n_j)[2], int64_t i, int64_t j, int64_t before,
                             __m256i sum) {
  const uint32_t factors =
      static_cast<uint32_t>(-t.counts[i]) << 16 | static_cast<uint32_t>(t.n_rows);
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(factors));
  const __m256i v[4] = {
      _mm256_madd_epi16(_mm256_unpacklo_epi16(n_ij[0], n_j[0]), factor),  // 0 .. 3, 16 .. 19
      _mm256_madd_epi16(_mm256_unpackhi_epi16(n_ij[0], n_j[0]), factor),  // 4 .. 7, 20 .. 23
      _mm256_madd_epi16(_mm256_unpacklo_epi16(n_ij[1], n_j[1]), factor),
      _mm256_madd_epi16(_mm256_unpackhi_epi16(n_ij[1], n_j[1]), factor),
  };
  if (before < 0) {
    for (int q = 0; q < 4; ++q) sum = _mm256_add_epi32(sum, _mm256_abs_epi32(v[q]));
  } else if (before < 31) {
    for (int q = 0; q < 4; ++q) {
      const __m256i lane =
          _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19), _mm256_set1_epi32(4 * q));
      const __m256i counts = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(static_cast<int>(before)));
      sum = _mm256_add_epi32(sum, _mm256_and_si256(_mm256_abs_epi32(v[q]), counts));
    }
  }
  if (t.above != nullptr) {
    // saturation keeps signs, and brings the 32 into order
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const __m256i above = _mm256_cmpgt_epi8(bytes, _mm256_setzero_si256());
    const int64_t at = (i - t.i0) * t.planes_stride + (j - t.j0) / kWordBits;
    t.above[at] = static_cast<uint32_t>(_mm256_movemask_epi8(above));
    t.below[at] = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }
  return sum;
}

// The same with V in int64.
inline int64_t finish_wide(const CovarianceTile& t, const int32_t* n_ij, int64_t i, int64_t j,
                           int64_t before) {
  int64_t total = 0;
  uint32_t above = 0, below = 0;
  for (int64_t k = 0; k < 32; ++k) {
    const int64_t v = t.n_rows * n_ij[k] - static_cast<int64_t>(t.counts[i]) * t.counts[j + k];
    if (k > before) total += v < 0 ? -v : v;
    above |= static_cast<uint32_t>(v > 0) << k;
    below |= static_cast<uint32_t>(v < 0) << k;
  }
  if (t.above != nullptr) {
    const int64_t at = (i - t.i0) * t.planes_stride + (j - t.j0) / kWordBits;
    t.above[at] = above;
    t.below[at] = below;
  }
  return total;
}

int64_t covariance_tile(const CovarianceTile& t) {
  uint8_t* const index = t.scratch;
  uint8_t* const lanes = index + kTileRows * kIndexBytes;
  int32_t* const resting = reinterpret_cast<int32_t*>(lanes + kPanel * kChunkSteps);
  const bool narrow = t.n_rows < 1 << 15, one_chunk = t.words <= Lookup::kChunkWords;
  int64_t sum = 0;
  __m256i total = _mm256_setzero_si256();
  for (int64_t j0 = t.j0; j0 < t.j1; j0 += kSpan) {
    const int64_t j1 = t.j1 - j0 < kSpan ? t.j1 : j0 + kSpan;
    for (int64_t w0 = 0; w0 < t.words; w0 += Lookup::kChunkWords) {
      const int64_t words = t.words - w0 < Lookup::kChunkWords ? t.words - w0 : Lookup::kChunkWords;
      const bool last = w0 + words == t.words;
      if (!one_chunk || (!t.same_rows && j0 == t.j0)) {
        for (int64_t w = 0; w < words; ++w) {
          const uint32_t* bits = t.columns + (w0 + w) * t.stride;
          for (int64_t i = t.i0; i < t.i1; ++i) {
            const uint64_t of_word = Lookup::word_index(bits[i], 0);
            __builtin_memcpy(index + (i - t.i0) * kIndexBytes + 8 * w, &of_word, 8);
          }
        }
      }
      for (int64_t j = j0; j < j1; j += kPanel) {
        const int64_t vectors = (j1 - j < kPanel ? j1 - j : kPanel) / Lookup::kRows;
        for (int64_t w = 0; w < words; ++w) {
          for (int64_t v = 0; v < Lookup::kVectors; ++v) {
            // the half of a panel that is past the end does not count: any words will do
            Lookup::fill_lanes(
                t.columns + (w0 + w) * t.stride + j + (v < vectors ? v : 0) * Lookup::kRows, 0,
                lanes + 8 * w * kPanel + v * Lookup::kRows, kPanel);
          }
        }
        __m256i n_j[Lookup::kVectors][2];
        for (int64_t v = 0; v < vectors; ++v) {
          fill_counts(t.counts + j + v * Lookup::kRows, n_j[v]);
        }
        const int64_t i1 = t.upper && t.i1 > j + kPanel ? j + kPanel : t.i1;
        for (int64_t i0 = t.i0; i0 < i1; i0 += kAtOnce) {
          const uint8_t* of_i[kAtOnce];
          for (int c = 0; c < kAtOnce; ++c) of_i[c] = index + (i0 + c - t.i0) * kIndexBytes;
          Sums<Lookup::kVectors> sums;
          look_up<Lookup::kVectors, false>(lanes, of_i, 8 * words, sums);
          for (int c = 0; c < kAtOnce; ++c) {
            const int64_t i = i0 + c;
            __m256i sizes = _mm256_setzero_si256();  // of 16 |V| <= N^2 / 4 while N < 2^15
            for (int64_t v = 0; v < vectors; ++v) {
              const int64_t column = j + v * Lookup::kRows;
              const int64_t before = t.upper ? i - column : -1;
              int32_t* const rest = resting + (i - t.i0) * kSpan + column - j0;
              if (narrow) {
                if (w0 > 0) Lookup::resume(rest, sums[c][v]);
                if (last) {
                  sizes = finish_narrow(t, sums[c][v], n_j[v], i, column, before, sizes);
                } else {
                  Lookup::rest(rest, sums[c][v]);
                }
              } else {
                Lookup::add_to(rest, sums[c][v], w0 > 0);
                if (last) sum += finish_wide(t, rest, i, column, before);
              }
            }
            const __m256i low = _mm256_and_si256(sizes, _mm256_set1_epi64x(0xFFFFFFFF));
            total = _mm256_add_epi64(total, _mm256_add_epi64(low, _mm256_srli_epi64(sizes, 32)));
          }
        }
      }
    }
  }
  alignas(32) int64_t lane[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), total);
  return sum + lane[0] + lane[1] + lane[2] + lane[3];
}

constexpr Kernels make_avx2_kernels() {
  Kernels k = with_sparse(make_shared_kernels("avx2", INT64_MAX));
  k.strip = kMaxStrip;
  k.covariance_scratch = kCovarianceScratch;
  k.backward_scratch = lookup_backward_scratch;
  k.covariance_tile = covariance_tile;
  k.backward_strip_f32 = lookup_backward_strip_f32;
  k.backward_strip_f64 = lookup_backward_strip_f64;
  k.units = &kFmaUnits;
  k.screens[1] = &kScreen;
  return k;
}

}  // namespace

const Kernels kAvx2Kernels = make_avx2_kernels();

}  // namespace bae_fast
#endif
