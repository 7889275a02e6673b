// How fast this CPU counts bits: the rate of the instructions that any kernel of a level needs, all
// operands in registers, every thread at once. Compiled by bench/ceilings.py when it is asked.
//
// A bit-MAC is one bit times one bit (or sign), added. By level:
//
//     scalar   and, popcnt, add                                         64 a triple
//     avx2     and, then bytes counted by table lookups of nibbles      256 in eight instructions
//     avx512   and, vpopcntd, add                                       512 a triple
//     amx      tdpbssd, bits as bytes                                   16,384 an instruction

#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kTurns = 20000;

// Sums are locals of their own, not an array: an array would lie in memory.
#define EACH_OF_6(DO) DO(s0) DO(s1) DO(s2) DO(s3) DO(s4) DO(s5)
#define EACH_OF_12(DO) EACH_OF_6(DO) DO(s6) DO(s7) DO(s8) DO(s9) DO(s10) DO(s11)

double scalar_turns() {
  uint64_t a = 0x3333333333333333, b = 0x5555555555555555;
  uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0;
#define COUNT(s)                                             \
  {                                                          \
    uint64_t bits = a;                                       \
    asm volatile("and %2, %0\n\tpopcnt %0, %0\n\tadd %0, %1" \
                 : "+&r"(bits), "+r"(s)                      \
                 : "r"(b)                                    \
                 : "cc");                                    \
  }
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    EACH_OF_6(COUNT)
  }
#undef COUNT
  return 64.0 * 6 * kTurns;
}

__attribute__((target("avx2"))) double avx2_turns() {
  const __m256i low = _mm256_set1_epi8(15), table = _mm256_set1_epi8(1);
  const __m256i a = _mm256_set1_epi8(0x35), b = _mm256_set1_epi8(0x53);
  __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
#define COUNT(s)                                 \
  {                                              \
    __m256i bits, high;                          \
    asm volatile(                                \
        "vpand %3, %4, %0\n\t"                   \
        "vpsrlw $4, %0, %1\n\t"                  \
        "vpand %5, %0, %0\n\t"                   \
        "vpand %5, %1, %1\n\t"                   \
        "vpshufb %0, %6, %0\n\t"                 \
        "vpshufb %1, %6, %1\n\t"                 \
        "vpaddb %0, %2, %2\n\t"                  \
        "vpaddb %1, %2, %2"                      \
        : "=&x"(bits), "=&x"(high), "+x"(s)      \
        : "x"(a), "x"(b), "x"(low), "x"(table)); \
  }
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    EACH_OF_6(COUNT)
  }
#undef COUNT
  return 256.0 * 6 * kTurns;
}

__attribute__((target("avx512f,avx512vpopcntdq"))) double avx512_turns() {
  const __m512i a = _mm512_set1_epi32(0x35), b = _mm512_set1_epi32(0x53);
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
  __m512i s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;
#define COUNT(s)                                                             \
  {                                                                          \
    __m512i bits;                                                            \
    asm volatile("vpandd %2, %3, %0\n\tvpopcntd %0, %0\n\tvpaddd %0, %1, %1" \
                 : "=&v"(bits), "+v"(s)                                      \
                 : "v"(a), "v"(b));                                          \
  }
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    EACH_OF_12(COUNT)
  }
#undef COUNT
  return 512.0 * 12 * kTurns;
}

#if defined(__linux__)
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

__attribute__((target("amx-tile,amx-int8"))) double amx_turns() {
  TileConfiguration tiles;
  for (int t = 0; t < 8; ++t) tiles.row_bytes[t] = 64, tiles.rows[t] = 16;
  alignas(64) uint8_t ones[1024];
  std::memset(ones, 1, sizeof(ones));
  // the intrinsics do not tell the compiler that they read memory
  asm volatile("" : : "r"(&tiles), "r"(ones) : "memory");
  _tile_loadconfig(&tiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return 16384.0 * 4 * kTurns;
}
#endif

bool has(const char* level) {
  if (std::strcmp(level, "scalar") == 0) return __builtin_cpu_supports("popcnt");
  if (std::strcmp(level, "avx2") == 0) return __builtin_cpu_supports("avx2");
  if (std::strcmp(level, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vpopcntdq");
  }
#if defined(__linux__)
  if (std::strcmp(level, "amx") == 0) {
    unsigned a = 7, b = 0, c = 0, d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return (d >> 24 & 3) == 3 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }
#endif
  return false;
}

double turns(const char* level) {
  if (std::strcmp(level, "scalar") == 0) return scalar_turns();
  if (std::strcmp(level, "avx2") == 0) return avx2_turns();
#if defined(__linux__)
  if (std::strcmp(level, "amx") == 0) return amx_turns();
#endif
  return avx512_turns();
}

}  // namespace

// Bit-MACs a second of all threads together; 0 where the CPU, or this probe, lacks the level.
extern "C" double bit_macs_per_second(const char* level, int threads, double seconds) {
  if (!has(level)) return 0;
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(threads);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      const auto start = Clock::now();
      double done = 0, passed = 0;
      while (passed < seconds) {
        done += turns(level);
        passed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[t] = done / passed;
    });
  }
  double total = 0;
  for (int t = 0; t < threads; ++t) {
    workers[t].join();
    total += rates[t];
  }
  return total;
}
#else
extern "C" double bit_macs_per_second(const char*, int, double) { return 0; }
#endif
