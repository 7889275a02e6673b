// The kernels of csrc/cuda behind the functions of CUDA's driver that kernels/cuda/driver.py calls,
// for a CPU. Built and loaded by tests/test_cuda.py in place of libcuda.
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

struct Function {
  const char* name;
  std::function<void()> (*bind)(void**);
  int shared_bytes;
};

#define BAE_FAST_KERNEL(kernel) {#kernel, [](void** args) { return bound(kernel, args); }, 0}
Function functions[] = {
    BAE_FAST_KERNEL(covariance),   BAE_FAST_KERNEL(covariance_wide),
    BAE_FAST_KERNEL(sign_slab),    BAE_FAST_KERNEL(sign_slab_wide),
    BAE_FAST_KERNEL(sign_product), BAE_FAST_KERNEL(digit_product),
};

constexpr int kInvalid = 1, kNotFound = 500, kFailed = 719;
const char* what_failed = "";
int primary = 0, other = 0;  // contexts, and which is the thread's
void* current = nullptr;
uint64_t launches = 0;

int fail(int number, const char* why) {
  what_failed = why;
  return number;
}

}  // namespace

extern "C" {

int cuInit(unsigned flags) { return flags == 0 ? 0 : fail(kInvalid, "flags"); }

int cuGetErrorString(int, const char** text) {
  *text = what_failed;
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = 40 + ordinal;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &primary;
  return device == 40 ? 0 : fail(kInvalid, "no such device");
}

int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  current = context == &primary || context == &other ? context : nullptr;
  return current ? 0 : fail(kInvalid, "no such context");
}

// A context that a caller has made for itself.
void* another_context() { return &other; }

// An image is the name of its source.
int cuModuleLoadData(void** module, const void* image) {
  *module = strdup(static_cast<const char*>(image));
  return strstr(static_cast<char*>(*module), ".cu") ? 0 : fail(kInvalid, "not an image");
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  const bool product = strcmp(static_cast<char*>(module), "sign_product.cu") == 0;
  for (Function& f : functions) {
    const bool here = product == (strstr(f.name, "_product") != nullptr);
    if (strcmp(f.name, name) == 0 && here) {
      *function = &f;
      return 0;
    }
  }
  return fail(kNotFound, "no such kernel in this module");
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return fail(kInvalid, "not the attribute of dynamic shared memory");
  static_cast<Function*>(function)->shared_bytes = value;
  return 0;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void* stream, void** args, void** extra) {
  const Function& f = *static_cast<Function*>(function);
  if (!current) return fail(kInvalid, "no context is current");
  if (grid_x == 0 || grid_y * grid_z * block_y * block_z != 1) return fail(kInvalid, "sizes");
  if (static_cast<int>(shared_bytes) > f.shared_bytes) return fail(kInvalid, "shared memory");
  if (stream != nullptr || extra != nullptr) return fail(kInvalid, "stream or extra");
  // another order of threads every time; copies that arrive at once, then late
  ++launches;
  const char* const error =
      bae_fast::emulated::run(grid_x, block_x, shared_bytes, launches, launches % 2, f.bind(args));
  return error == nullptr ? 0 : fail(kFailed, error);
}

}  // extern "C"
