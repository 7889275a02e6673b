// AVX-512 with VPOPCNTDQ; compiled with -mavx512{f,bw,dq,vl,vpopcntdq}.
#include "kernels.h"
#include "layout.h"

#if defined(__x86_64__)
#include "vector_avx512.h"
// after the vectors it is written with
#include "kernels_impl.h"

namespace bae_fast {
const Kernels kAvx512Kernels = make_kernels("avx512");
}  // namespace bae_fast
#endif
