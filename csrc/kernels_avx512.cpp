// AVX-512 with VPOPCNTDQ and VBMI: pairs are counted by popcounts, B S by look-ups of six bits
// (vpermb), and dense products of its own (fma_products.h, screened_bytes.h). Compiled with
// -mavx512{f,bw,dq,vl,vbmi,vnni,vpopcntdq}.
#include "kernels.h"
#include "layout.h"

#if defined(__x86_64__)
#include "vector_avx512.h"
// after the vectors it is written with
#include "kernels_impl.h"
#include "kernels_sparse.h"

namespace bae_fast {
namespace {

// The 64 bytes of the table of six signs are the sum of two out of 27 constant ones, one for the
// signs of the three low bits of the index, one for those of the high bits. The number of a table
// has the signs as digits to the base of three: 0, 1, 2 for 0, 1, -1.
struct SignTables {
  alignas(64) int8_t low[27][64];
  alignas(64) int8_t high[27][64];
};

constexpr SignTables make_sign_tables() {
  SignTables tables{};
  for (int t = 0; t < 27; ++t) {
    for (int bits = 0; bits < 64; ++bits) {
      for (int b = 0, rest = t; b < 3; ++b, rest /= 3) {
        const int sign = rest % 3 == 2 ? -1 : rest % 3;
        if ((bits >> b & 1) != 0) tables.low[t][bits] += sign;
        if ((bits >> (3 + b) & 1) != 0) tables.high[t][bits] += sign;
      }
    }
  }
  return tables;
}

constexpr SignTables kSignTables = make_sign_tables();

// A unit is three words a, b, c of features, 16 steps: step 4 k + i takes bits 2 k and 2 k + 1 of
// byte i of each, a's lowest in the index.
struct Lookup {
  static constexpr int kGroup = 6, kRows = 64, kVectors = 4, kColumns = 4;
  static constexpr int64_t kChunkWords = 48, kUnitWords = 3, kUnitSteps = 16, kIndexBytes = 2;
  static constexpr int64_t kHigh = kChunkWords / kUnitWords * kUnitSteps;  // after the low ones
  using Bytes = __m512i;
  using Wide = __m512i;

  static Bytes zero() { return _mm512_setzero_si512(); }
  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  // index: eight times the numbers of the tables, so that an address scales them by 8
  static Bytes table(const uint8_t* index, int64_t step) {
    const int8_t* low = kSignTables.low[0] + 8 * static_cast<uint64_t>(index[step]);
    const int8_t* high = kSignTables.high[0] + 8 * static_cast<uint64_t>(index[kHigh + step]);
    return _mm512_add_epi8(_mm512_load_si512(low), _mm512_load_si512(high));
  }
  static Bytes look_up(Bytes table, Bytes lanes) { return _mm512_permutexvar_epi8(lanes, table); }
  static Bytes add(Bytes a, Bytes b) {
    Bytes sum = _mm512_add_epi8(a, b);
    __asm__("" : "+v"(sum));  // or the compiler regroups the sums of several steps and spills
    return sum;
  }
  static Wide add_wide(Wide a, Wide b) { return _mm512_add_epi16(a, b); }
  template <bool kSigned>
  static Wide even(Bytes sums) {
    static_assert(kSigned);
    return _mm512_maddubs_epi16(_mm512_set1_epi16(1), sums);
  }
  template <bool kSigned>
  static Wide odd(Bytes sums) {
    static_assert(kSigned);
    return _mm512_maddubs_epi16(_mm512_set1_epi16(256), sums);
  }

  // The bytes of 64 words. Even bytes are words 0 .. 15 and 32 .. 47, odd ones the others: halves
  // of 16-bit sums are in order.
  static void split(const uint32_t* words, __m512i (&byte)[4]) {
    alignas(64) uint8_t order[64];
    for (int p = 0; p < 64; ++p) {
      order[p] = static_cast<uint8_t>(4 * (p % 32 / 2 + 16 * (p % 2)) + p / 32);
    }
    const __m512i first = _mm512_load_si512(order);  // bytes 0, then 1, of 32 words
    for (int pair = 0; pair < 2; ++pair) {
      const __m512i pick = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(2 * pair)));
      const __m512i x =
          _mm512_permutex2var_epi8(_mm512_loadu_si512(words), pick, _mm512_loadu_si512(words + 16));
      const __m512i y = _mm512_permutex2var_epi8(_mm512_loadu_si512(words + 32), pick,
                                                 _mm512_loadu_si512(words + 48));
      byte[2 * pair] = _mm512_shuffle_i64x2(x, y, 0x44);
      byte[2 * pair + 1] = _mm512_shuffle_i64x2(x, y, 0xEE);
    }
  }
  static void fill_lanes(const uint32_t* words, int64_t stride, uint8_t* out, int64_t step_bytes) {
    const __m512i two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(15);
    __m512i a[4], b[4], c[4];
    split(words, a);
    split(words + stride, b);
    split(words + 2 * stride, c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      // the upper two bits of an index are ignored
      __m512i of_b = _mm512_slli_epi16(b[i], 2), of_c = _mm512_slli_epi16(c[i], 4);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512i low =
            _mm512_ternarylogic_epi32(two, _mm512_srli_epi16(a[i], 2 * k), of_b, 0xCA);
        _mm512_storeu_si512(out + (4 * k + i) * step_bytes,
                            _mm512_ternarylogic_epi32(four, low, of_c, 0xCA));
        of_b = k == 0 ? b[i] : _mm512_srli_epi16(b[i], 2 * k);
        of_c = k == 0 ? _mm512_slli_epi16(c[i], 2) : k == 1 ? c[i] : _mm512_srli_epi16(c[i], 2);
      }
    }
  }

  // Words 3 u + which of 48, u = 4 (p % 4) + p / 4 at place p.
  static __m512i every_third(const __m512i (&words)[3], int which) {
    const __m512i at = _mm512_add_epi32(
        _mm512_setr_epi32(0, 12, 24, 36, 3, 15, 27, 39, 6, 18, 30, 42, 9, 21, 33, 45),
        _mm512_set1_epi32(which));
    const __mmask16 last = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32));
    return _mm512_mask_permutexvar_epi32(_mm512_permutex2var_epi32(words[0], at, words[1]), last,
                                         at, words[2]);
  }
  static void fill_index(const uint32_t* above, const uint32_t* below, int64_t words,
                         uint8_t* out) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i p[3], m[3], of_above[3], of_below[3];
    for (int z = 0; z < 3; ++z) {
      const int64_t rest = words - 16 * z;
      const __mmask16 used = rest >= 16 ? 0xFFFF : rest <= 0 ? 0 : (1u << rest) - 1;
      p[z] = _mm512_maskz_loadu_epi32(used, above + 16 * z);
      m[z] = _mm512_maskz_loadu_epi32(used, below + 16 * z);
    }
    for (int which = 0; which < 3; ++which) {
      of_above[which] = every_third(p, which);
      of_below[which] = every_third(m, which);
    }
    const auto digit = [&](int word, int bit) {
      const __m512i one = _mm512_and_si512(_mm512_srli_epi32(of_above[word], bit), ones);
      const __m512i two = _mm512_and_si512(_mm512_srli_epi32(of_below[word], bit), ones);
      return _mm512_add_epi8(one, _mm512_add_epi8(two, two));
    };
    const auto number = [](__m512i d0, __m512i d1, __m512i d2) {  // 8 (d0 + 3 d1 + 9 d2)
      const __m512i three = _mm512_add_epi8(_mm512_add_epi8(d2, d2), d2);
      const __m512i sum = _mm512_add_epi8(d1, three);
      return _mm512_slli_epi32(_mm512_add_epi8(d0, _mm512_add_epi8(_mm512_add_epi8(sum, sum), sum)),
                               3);
    };
    __m512i low[4], high[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      low[k] = number(digit(0, 2 * k), digit(0, 2 * k + 1), digit(1, 2 * k));
      high[k] = number(digit(1, 2 * k + 1), digit(2, 2 * k), digit(2, 2 * k + 1));
    }
    interleave(low, out);
    interleave(high, out + kHigh);
  }
  // Four words a unit, one from each, in the order of every_third.
  static void interleave(const __m512i (&k)[4], uint8_t* out) {
    const __m512i t0 = _mm512_unpacklo_epi32(k[0], k[1]), t1 = _mm512_unpackhi_epi32(k[0], k[1]);
    const __m512i t2 = _mm512_unpacklo_epi32(k[2], k[3]), t3 = _mm512_unpackhi_epi32(k[2], k[3]);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(t0, t2));
    _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi64(t0, t2));
    _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi64(t1, t3));
    _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi64(t1, t3));
  }

  // 64 sums in order, in int32.
  static void add_to(int32_t* out, const Wide (&sums)[2], bool resume) {
    for (int q = 0; q < 4; ++q) {
      const Wide of = sums[q % 2];
      const __m512i sum = _mm512_cvtepi16_epi32(q < 2 ? _mm512_castsi512_si256(of)
                                                      : _mm512_extracti64x4_epi64(of, 1));
      int32_t* const to = out + 16 * q;
      _mm512_store_si512(to, resume ? _mm512_add_epi32(_mm512_load_si512(to), sum) : sum);
    }
  }
};

// for fma_products.h
struct Fma {
  static constexpr int64_t kLanes = 16, kRows = 12;
  using Numbers = __m512;

  static Numbers zero() { return _mm512_setzero_ps(); }
  static Numbers load(const float* from) { return _mm512_loadu_ps(from); }
  static Numbers load(const uint16_t* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Numbers broadcast(const float* from) { return _mm512_set1_ps(*from); }
  static void store(float* to, Numbers v) { _mm512_storeu_ps(to, v); }
  static Numbers add(Numbers a, Numbers b) { return _mm512_add_ps(a, b); }
  static Numbers multiply_add(Numbers a, Numbers b, Numbers sum) {
    return _mm512_fmadd_ps(a, b, sum);
  }
  static void transpose(Numbers (&v)[16]) {
    __m512i words[16];
    for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(v[i]);
    transpose_16(words);
    for (int i = 0; i < 16; ++i) v[i] = _mm512_castsi512_ps(words[i]);
  }
};

// for screened_encode.h
struct Pairs {
  static constexpr int64_t kLanes = 16, kRows = 12;
  using Numbers = __m512i;

  static Numbers zero() { return _mm512_setzero_si512(); }
  static Numbers load(const int32_t* from) { return _mm512_loadu_si512(from); }
  static Numbers broadcast(const int32_t* from) { return _mm512_set1_epi32(*from); }
  static void store(int32_t* to, Numbers v) { _mm512_storeu_si512(to, v); }
  static Numbers add(Numbers a, Numbers b) { return _mm512_add_epi32(a, b); }
  static Numbers multiply_add(Numbers a, Numbers b, Numbers sum) {
    // gcc copies the sums of the intrinsic back and forth, which halves the rate
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

// for screened_bytes.h
struct Quads : Pairs {
  static Numbers multiply_add(Numbers a, Numbers b, Numbers sum) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

}  // namespace
}  // namespace bae_fast

// after the look-ups it is written with
#include "kernels_lookup.h"
// after the vectors and what sets thresholds
#include "fma_products.h"
#include "screened_bytes.h"

namespace bae_fast {
namespace {

constexpr Kernels make_avx512_kernels() {
  Kernels k = with_sparse(make_kernels("avx512", INT64_MAX));
  k.strip = kMaxStrip;
  k.transpose = transpose_fast;
  k.backward_scratch = lookup_backward_scratch;
  k.backward_strip_f32 = lookup_backward_strip_f32;
  k.backward_strip_f64 = lookup_backward_strip_f64;
  k.units = &kFmaUnits;
  k.screens[0] = &kByteScreen;
  k.screens[1] = &kScreen;
  return k;
}

}  // namespace

const Kernels kAvx512Kernels = make_avx512_kernels();

}  // namespace bae_fast
#endif
