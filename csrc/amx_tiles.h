// The tile registers of AMX, for kernels_amx.cpp and amx_products.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bae_fast {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSide = 16;  // rows of a tile, columns of a tile of sums

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the tiles of this thread, and puts back what another library had configured. The
// instructions are written out: gcc's intrinsics declare 8 of the 64 bytes they touch.
class Tiles {
 public:
  Tiles() {
    const TileConfig config;
    __asm__ volatile("sttilecfg %0" : "=m"(before_));
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() {
    if (before_.palette != 0) {
      __asm__ volatile("ldtilecfg %0" ::"m"(before_));
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// What was written before must be in memory: gcc does not know that a tile is loaded from there.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

inline __mmask16 first_words(int64_t count) {
  return count >= 16 ? 0xFFFF : static_cast<__mmask16>(count <= 0 ? 0 : (1u << count) - 1);
}

// Lines of a panel that are written next: a store that misses the inner cache costs ten cycles.
inline void fetch_to_write(const uint8_t* out, int64_t step) {
#pragma GCC unroll 8
  for (int line = 0; line < 8; ++line) __builtin_prefetch(out + line * step, 1);
}

// 512 bits of one row to the same row of eight tiles of bytes.
inline void expand_left(__m512i bits, uint8_t* out) {
  alignas(64) uint64_t part[8];
  _mm512_store_si512(part, bits);
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t) {
    _mm512_store_si512(out + t * kTileBytes, _mm512_maskz_set1_epi8(part[t], 1));
  }
}

// Starts four sums, registers 0 to 3, from nothing.
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

}  // namespace
}  // namespace bae_fast
