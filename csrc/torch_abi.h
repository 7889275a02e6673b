// What the extension uses of LibTorch's stable C interface, declared here by hand: tensors, loops
// over threads, and the registration of operators. Nothing of torch is needed to compile it, so a
// build in isolation has the kernels. The functions are those of LibTorch 2.11 and newer; the
// library that defines them is loaded before the extension is.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#pragma GCC visibility push(default)
extern "C" {

struct AtenTensorOpaque;
struct TorchLibraryOpaque;

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_layout_strided();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
size_t aoti_torch_dtype_element_size(int32_t dtype);

int32_t aoti_torch_get_data_ptr(AtenTensorOpaque* tensor, void** data);
int32_t aoti_torch_get_dtype(AtenTensorOpaque* tensor, int32_t* dtype);
int32_t aoti_torch_get_numel(AtenTensorOpaque* tensor, int64_t* numel);
int32_t aoti_torch_get_size(AtenTensorOpaque* tensor, int64_t dim, int64_t* size);
int32_t aoti_torch_get_stride(AtenTensorOpaque* tensor, int64_t dim, int64_t* stride);
int32_t aoti_torch_new_tensor_handle(AtenTensorOpaque* tensor, AtenTensorOpaque** made);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque* tensor);
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                 AtenTensorOpaque** made);
int32_t torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                        int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                        AtenTensorOpaque** made, int32_t layout, const uint8_t* opaque_metadata,
                        int64_t opaque_metadata_size, void (*deleter)(void* data, void* context),
                        void* context);

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                           void (*body)(int64_t begin, int64_t end, void* context), void* context);
int32_t torch_get_num_threads(uint32_t* threads);

int32_t aoti_torch_library_init_impl(const char* name_space, const char* dispatch_key,
                                     const char* file, uint32_t line, TorchLibraryOpaque** made);
int32_t torch_library_impl(TorchLibraryOpaque* library, const char* name,
                           void (*boxed)(uint64_t* stack, uint64_t arguments, uint64_t results),
                           uint64_t version);

}  // extern "C"
#pragma GCC visibility pop

namespace bae_fast {

// The version whose interface is spoken, as LibTorch counts: 2.11.0.
constexpr uint64_t kTorchVersion = 0x020b000000000000;

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Every function of the interface that can fail returns 0 where it did not.
inline void succeeded(int32_t status, const char* what) {
  check(status == 0, "LibTorch could not ", what);
}

enum class ScalarType { Int, Long, Float, Double, BFloat16, Other };

inline int32_t dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      throw std::runtime_error("no tensor is made of that type");
  }
}

// A reference to a tensor of LibTorch, which counts them: copies share the tensor. (A shared_ptr
// would ask for glibc 2.32, and manylinux_2_28 has an older one.)
class Tensor {
 public:
  Tensor() = default;  // of no tensor
  // Takes the reference over.
  explicit Tensor(AtenTensorOpaque* handle) : handle_(handle) {}
  Tensor(const Tensor& other) : handle_(other.another()) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorOpaque* get() const { return handle_; }

  // A further reference, which its receiver owns.
  AtenTensorOpaque* another() const {
    AtenTensorOpaque* made = nullptr;
    if (handle_ != nullptr)
      succeeded(aoti_torch_new_tensor_handle(handle_, &made), "share a tensor");
    return made;
  }

  void* data_ptr() const {
    void* data = nullptr;
    succeeded(aoti_torch_get_data_ptr(get(), &data), "give a tensor's memory");
    return data;
  }
  int64_t numel() const {
    int64_t numel = 0;
    succeeded(aoti_torch_get_numel(get(), &numel), "count a tensor's elements");
    return numel;
  }
  int64_t size(int64_t dim) const {
    int64_t size = 0;
    succeeded(aoti_torch_get_size(get(), dim, &size), "give a tensor's size");
    return size;
  }
  int64_t stride(int64_t dim) const {
    int64_t stride = 0;
    succeeded(aoti_torch_get_stride(get(), dim, &stride), "give a tensor's stride");
    return stride;
  }
  int64_t element_size() const {
    return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype()));
  }
  ScalarType scalar_type() const {
    const int32_t found = dtype();
    for (const ScalarType type : {ScalarType::Int, ScalarType::Long, ScalarType::Float,
                                  ScalarType::Double, ScalarType::BFloat16})
      if (found == dtype_of(type)) return type;
    return ScalarType::Other;
  }
  int32_t dtype() const {
    int32_t dtype = 0;
    succeeded(aoti_torch_get_dtype(get(), &dtype), "give a tensor's dtype");
    return dtype;
  }

 private:
  AtenTensorOpaque* handle_ = nullptr;
};

namespace detail {

// Strides of a tensor that is contiguous.
template <size_t kDims>
std::array<int64_t, kDims> strides_of(const std::array<int64_t, kDims>& sizes) {
  std::array<int64_t, kDims> strides{};
  int64_t stride = 1;
  for (size_t i = kDims; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return strides;
}

template <size_t kDims>
Tensor empty(const std::array<int64_t, kDims>& sizes, int32_t dtype) {
  const auto strides = strides_of(sizes);
  AtenTensorOpaque* made = nullptr;
  succeeded(aoti_torch_empty_strided(kDims, sizes.data(), strides.data(), dtype,
                                     aoti_torch_device_type_cpu(), -1, &made),
            "make a tensor");
  return Tensor(made);
}

}  // namespace detail

// Contiguous tensors on the CPU, whose memory holds anything or zeros.
template <typename... Sizes>
Tensor new_empty(ScalarType type, Sizes... sizes) {
  return detail::empty(std::array<int64_t, sizeof...(Sizes)>{static_cast<int64_t>(sizes)...},
                       dtype_of(type));
}

template <typename... Sizes>
Tensor new_zeros(ScalarType type, Sizes... sizes) {
  Tensor made = new_empty(type, sizes...);
  const int64_t bytes = made.numel() * made.element_size();
  if (bytes > 0) std::memset(made.data_ptr(), 0, bytes);
  return made;
}

// A contiguous matrix over memory that `give_back(memory)` gets when the last reference is gone.
template <typename F>
Tensor over_memory(void* memory, int64_t rows, int64_t columns, ScalarType type, F give_back) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  auto context = std::make_unique<F>(std::move(give_back));
  AtenTensorOpaque* made = nullptr;
  succeeded(torch_from_blob(
                memory, 2, sizes, strides, 0, dtype_of(type), aoti_torch_device_type_cpu(), -1,
                &made, aoti_torch_layout_strided(), nullptr, 0,
                [](void* data, void* with) {
                  const std::unique_ptr<F> owned(static_cast<F*>(with));
                  (*owned)(data);
                },
                context.get()),
            "make a tensor over memory");
  context.release();
  return Tensor(made);
}

// body(begin, end) over parts of a range of at least `grain`, on torch's threads.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  struct Call {
    const F& body;
    std::atomic<bool> failed{false};
    std::string message;  // of the first that failed: LibTorch would keep none
  } call{body};
  succeeded(torch_parallel_for(
                begin, end, grain,
                [](int64_t from, int64_t to, void* with) {
                  Call& of = *static_cast<Call*>(with);
                  try {
                    of.body(from, to);
                  } catch (const std::exception& error) {
                    if (!of.failed.exchange(true)) of.message = error.what();
                  }
                },
                &call),
            "run a loop over its threads");
  check(!call.failed, call.message);
}

inline int64_t get_num_threads() {
  uint32_t threads = 1;
  succeeded(torch_get_num_threads(&threads), "count its threads");
  return threads;
}

// -- operators: values on LibTorch's stack are 64 bits each ---------------------------------------

namespace detail {

template <typename T>
struct Value {  // numbers, in the lowest bytes
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  static T take(uint64_t slot) {
    T value;
    std::memcpy(&value, &slot, sizeof(T));
    return value;
  }
  static uint64_t give(T value) {
    uint64_t slot = 0;
    std::memcpy(&slot, &value, sizeof(T));
    return slot;
  }
};

template <>
struct Value<Tensor> {  // a reference that its receiver owns
  static Tensor take(uint64_t slot) { return Tensor(reinterpret_cast<AtenTensorOpaque*>(slot)); }
  static uint64_t give(const Tensor& tensor) {
    return reinterpret_cast<uint64_t>(tensor.another());
  }
};

template <typename T>
struct Value<std::optional<T>> {  // null, or the address of a slot that its receiver frees
  static std::optional<T> take(uint64_t slot) {
    const std::unique_ptr<uint64_t> inner(reinterpret_cast<uint64_t*>(slot));
    return inner ? std::optional<T>(Value<T>::take(*inner)) : std::nullopt;
  }
};

// Arguments are taken from the stack in order, results are put in their place.
template <auto kFunction, typename Signature>
struct Boxed;

template <auto kFunction, typename R, typename... A>
struct Boxed<kFunction, R (*)(A...)> {
  static void call(uint64_t* stack, uint64_t arguments, uint64_t results) {
    check(arguments == sizeof...(A) && results == count(static_cast<R*>(nullptr)),
          "an operator's schema has ", arguments, " arguments and ", results, " results");
    run(stack, std::index_sequence_for<A...>{});
  }

 private:
  static constexpr uint64_t count(void*) { return std::is_void_v<R> ? 0 : 1; }
  template <typename... T>
  static constexpr uint64_t count(std::tuple<T...>*) {
    return sizeof...(T);
  }
  template <size_t... I>
  static void run(uint64_t* stack, std::index_sequence<I...>) {
    // every argument is owned before the first can fail
    std::tuple<A...> taken{Value<A>::take(stack[I])...};
    if constexpr (std::is_void_v<R>) {
      std::apply(kFunction, std::move(taken));
    } else {
      put(stack, std::apply(kFunction, std::move(taken)));
    }
  }
  template <typename T>
  static void put(uint64_t* stack, const T& result) {
    stack[0] = Value<T>::give(result);
  }
  template <typename... T>
  static void put(uint64_t* stack, const std::tuple<T...>& result) {
    std::apply(
        [&](const T&... each) {
          size_t i = 0;
          ((stack[i++] = Value<T>::give(each)), ...);
        },
        result);
  }
};

}  // namespace detail

// Operators of a namespace for one dispatch key. They stay registered while the process lives.
class Library {
 public:
  Library(const char* name_space, const char* dispatch_key) {
    succeeded(aoti_torch_library_init_impl(name_space, dispatch_key, __FILE__, __LINE__, &library_),
              "open a library of operators");
  }
  template <auto kFunction>
  void impl(const char* name) {
    succeeded(
        torch_library_impl(library_, name, &detail::Boxed<kFunction, decltype(kFunction)>::call,
                           kTorchVersion),
        "register an operator");
  }

 private:
  TorchLibraryOpaque* library_ = nullptr;
};

}  // namespace bae_fast
