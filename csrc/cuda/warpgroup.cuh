// Asynchronous instructions of compute capability 9.0 (sm_90a), one function each: products of a
// warpgroup, copies of whole tiles, barriers in shared memory that count bytes.
#pragma once

#include "instructions.cuh"

namespace bae_fast {

// ---- barriers in shared memory, by their addresses
// ------------------------------------------------

__device__ __forceinline__ void start_barrier(unsigned at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}

// Copies see the barriers that this thread has started.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(unsigned at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// Arrives, and says how many bytes of copies the phase waits for as well.
__device__ __forceinline__ void arrive_expecting(unsigned at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}

// Waits until the latest phase of this parity has ended; before the first phase 1 has.
__device__ __forceinline__ void wait_for_phase(unsigned at, int parity) {
  unsigned ended;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(at), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// A stage, and the parity of its phase.
struct Place {
  int stage, parity;
  __device__ __forceinline__ void step(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Barrier of the 128 threads of one warpgroup; 0 is that of the block.
__device__ __forceinline__ void synchronize_warpgroup(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// ---- copies
// ---------------------------------------------------------------------------------------

// Copies `bytes` from global to shared memory later; they arrive on the barrier.
__device__ __forceinline__ void copy_bytes(unsigned to, const int* from, int bytes,
                                           unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- registers of a warpgroup
// ---------------------------------------------------------------------

template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- products of a warpgroup
// ----------------------------------------------------------------------

// Registers that were written are those that products read, from here on.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until all but the latest `Groups` groups of products have ended.
template <int Groups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

// Operand in shared memory: 128 bytes a row, swizzled, groups of 8 rows 1024 bytes apart.
__device__ __forceinline__ unsigned long long operand_at(unsigned at) {
  return static_cast<unsigned long long>(at >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define BAE_FAST_C8(c, i)                                                                     \
  "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3]), "+r"(c[i + 4]), "+r"(c[i + 5]), \
      "+r"(c[i + 6]), "+r"(c[i + 7])
#define BAE_FAST_C64(c)                                                         \
  BAE_FAST_C8(c, 0), BAE_FAST_C8(c, 8), BAE_FAST_C8(c, 16), BAE_FAST_C8(c, 24), \
      BAE_FAST_C8(c, 32), BAE_FAST_C8(c, 40), BAE_FAST_C8(c, 48), BAE_FAST_C8(c, 56)

// c += popc(a & b): 64 rows of 256 bits against 128, later. Register 4 f + r of lane l of warp w is
// row 16 w + result_row(l, r), column 8 f + result_column(l, r).
__device__ __forceinline__ void multiply_later(int (&c)[64], unsigned long long a,
                                               unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, 1;"
      : BAE_FAST_C64(c)
      : "l"(a), "l"(b));
}

#undef BAE_FAST_C64
#undef BAE_FAST_C8

}  // namespace bae_fast
