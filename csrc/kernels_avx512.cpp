// AVX-512 with VPOPCNTDQ; compiled with -mavx512{f,bw,dq,vl,vpopcntdq}.
#include "kernels.h"
#include "layout.h"

#if defined(__x86_64__)
#include "vector_avx512.h"
// after the vectors it is written with
#include "kernels_impl.h"
#include "kernels_sparse.h"

namespace bae_fast {
namespace {

constexpr Kernels make_avx512_kernels() {
  Kernels k = with_sparse(make_kernels("avx512"));
  k.transpose = transpose_fast;
  return k;
}

}  // namespace

const Kernels kAvx512Kernels = make_avx512_kernels();

}  // namespace bae_fast
#endif
