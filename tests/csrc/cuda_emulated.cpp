// The kernels of csrc/cuda as a library for a CPU: `emulate` takes what cuLaunchKernel takes.
//
// Built by tests/test_cuda.py, which calls it in place of a device.
#define BAE_FAST_EMULATED
#include <tuple>
#include <utility>

#include "cooccurrence.cu"
#include "sign_product.cu"

namespace {

// A kernel with the arguments that `args` points to, as a function of nothing.
template <typename... Args, size_t... I>
std::function<void()> bound(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  return [=] { kernel(*static_cast<Args*>(args[I])...); };
}
template <typename... Args>
std::function<void()> bound(void (*kernel)(Args...), void** args) {
  return bound(kernel, args, std::index_sequence_for<Args...>());
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* emulate(const char* name, int blocks, int threads, int shared_bytes,
                               void** args, uint64_t seed, int early) {
  std::function<void()> body;
#define BAE_FAST_KERNEL(kernel) \
  if (strcmp(name, #kernel) == 0) body = bound(kernel, args);
  BAE_FAST_KERNEL(covariance)
  BAE_FAST_KERNEL(covariance_wide)
  BAE_FAST_KERNEL(sign_slab)
  BAE_FAST_KERNEL(sign_slab_wide)
  BAE_FAST_KERNEL(sign_product)
  BAE_FAST_KERNEL(digit_product)
#undef BAE_FAST_KERNEL
  if (!body) return "no such kernel";
  return bae_fast::emulated::run(blocks, threads, shared_bytes, seed, early != 0, body);
}
