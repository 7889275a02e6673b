// Bit layouts, as in bae_fast/packing.py (a test compares the constants of both files).
//
//   row-packed      uint32 [N, ceil(K/32)], bit f % 32 of word f / 32 in row n is B[n, f]
//   column-packed   uint32 [ceil(N/32), K], bit n % 32 of word n / 32 in column f is B[n, f]
//
// Bits past the end are zero. Tensors hold the words as int32; kernels read them as uint32.
#pragma once

#include <cstdint>

namespace bae_fast {

constexpr int64_t kWordBits = 32;
constexpr int64_t kFeatureAlignWords = 8;

// Columns that kernels take at once: scratch is padded to it with zero columns, which change no
// sum and no sign.
constexpr int64_t kStrip = 64;
constexpr int64_t kMaxStrip = 256;

// A panel of listed rows: as many rows as one list may name, and bytes of each. 256 KiB: it stays
// in the outer cache of a core beside what streams through.
constexpr int64_t kPanelRows = 512;
constexpr int64_t kPanelBytes = 512;

constexpr int64_t n_words(int64_t n_bits) { return (n_bits + kWordBits - 1) / kWordBits; }
constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Of fp32, or of the bits of a bf16 number.
inline float number(float value) { return value; }
inline float number(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}

// The same the other way: a bf16 number is the nearest, of two the even one.
inline void store(float value, float* to) { *to = value; }
inline void store(float value, uint16_t* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *to = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

}  // namespace bae_fast
