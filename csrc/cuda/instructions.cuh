// The instructions that the kernels use and C++ does not have, one function each. Under
// BAE_FAST_EMULATED a test's header gives functions of the same names that run on a CPU.
#pragma once

#include "tiles.cuh"

#ifdef BAE_FAST_EMULATED
#include "cuda_emulation.h"
#else

namespace bae_fast {

__device__ __forceinline__ unsigned* shared_memory() {
  extern __shared__ __align__(128) unsigned memory[];
  return memory;
}

__device__ __forceinline__ unsigned shared_address(const unsigned* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Copies 16 bytes to shared memory later: `bytes` of them from `from`, zeros behind.
__device__ __forceinline__ void copy_chunk(unsigned* to, const int* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// The same for 4 bytes, where rows do not start on 16.
__device__ __forceinline__ void copy_word(unsigned* to, const int* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the latest `Groups` groups of this thread's copies have arrived.
template <int Groups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// Four 8 x 4 matrices of words; lane l names row l % 8 of matrix l / 8 and receives word l % 4 of
// row l / 4 of each.
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const unsigned* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += popc(a & b): 16 rows of 256 bits against 8.
__device__ __forceinline__ void multiply_bits(int (&c)[4], const unsigned (&a)[4], unsigned b0,
                                              unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned shuffle_xor(unsigned value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ int count_ones(unsigned word) { return __popc(word); }

__device__ __forceinline__ void synchronize() { __syncthreads(); }

// What was read from memory before is read again behind it.
__device__ __forceinline__ void forget_memory() { asm volatile("" ::: "memory"); }

// What is made of a value is made behind this.
__device__ __forceinline__ void not_before(int& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int block_index() { return blockIdx.x; }

__device__ __forceinline__ void store4(int* to, int a, int b, int c, int d) {
  *reinterpret_cast<int4*>(to) = make_int4(a, b, c, d);
}
__device__ __forceinline__ void store2(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}

}  // namespace bae_fast
#endif
