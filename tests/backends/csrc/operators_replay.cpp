// Runs the operators of the extension without torch: reads calls that were recorded elsewhere,
// makes each of them again, and compares what comes out. It is linked with every object of the
// extension, csrc/operators.cpp among them, so that the operators are called as LibTorch calls
// them: by their registered names, with values of 64 bits on a stack.
//
//     operators_replay FILE     prints the number of calls of each operator; ends with 1 at the
//                               first result that differs, which is named
//
// What csrc/torch_abi.h declares is defined here, as small as it goes: tensors on the heap, one
// thread, a table of operators. Integers must be equal; floats may differ by rounding, as sums have
// another order at another instruction set.
//
// A file is a sequence of little-endian numbers: the number of calls, then for each its name, its
// arguments, the arguments' tensors after the call, and its results. A value is a letter (i, f, b
// for numbers, n for none, t for a tensor, o for an optional tensor that is there) and its content;
// of a tensor that is its dtype, its dimensions, sizes, strides and elements.
#include <Python.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "operators.h"

// ---- LibTorch's part ----------------------------------------------------------------------------

struct AtenTensorOpaque {
  int32_t dtype = 0;
  std::vector<int64_t> sizes, strides;
  void* data = nullptr;
  int64_t references = 1;
  void (*deleter)(void* data, void* context) = nullptr;
  void* context = nullptr;
};

namespace {

using Boxed = void (*)(uint64_t* stack, uint64_t arguments, uint64_t results);

std::map<std::string, Boxed>& operators() {
  static std::map<std::string, Boxed> all;
  return all;
}

// numbers of dtypes here and in the file
constexpr int32_t kInt = 0, kLong = 1, kFloat = 2, kDouble = 3, kBfloat16 = 4, kBool = 5;
constexpr int64_t kBytes[] = {4, 8, 4, 8, 2, 1};

int64_t count_of(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

// Elements of the memory that a view of these sizes and strides reaches.
int64_t span_of(const AtenTensorOpaque& t) {
  if (count_of(t.sizes) == 0) return 0;
  int64_t span = 1;
  for (size_t i = 0; i < t.sizes.size(); ++i) span += (t.sizes[i] - 1) * t.strides[i];
  return span;
}

AtenTensorOpaque* new_tensor(int32_t dtype, std::vector<int64_t> sizes,
                             std::vector<int64_t> strides) {
  auto* made = new AtenTensorOpaque;
  made->dtype = dtype;
  made->sizes = std::move(sizes);
  made->strides = std::move(strides);
  const int64_t bytes = span_of(*made) * kBytes[dtype];
  made->data = std::malloc(bytes > 0 ? bytes : 1);
  // whoever reads what was not written gets numbers that show
  std::memset(made->data, 0xA5, bytes > 0 ? bytes : 1);
  made->deleter = [](void* data, void*) { std::free(data); };
  return made;
}

}  // namespace

extern "C" {

int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_layout_strided() { return 0; }
int32_t aoti_torch_dtype_int32() { return kInt; }
int32_t aoti_torch_dtype_int64() { return kLong; }
int32_t aoti_torch_dtype_float32() { return kFloat; }
int32_t aoti_torch_dtype_float64() { return kDouble; }
int32_t aoti_torch_dtype_bfloat16() { return kBfloat16; }
size_t aoti_torch_dtype_element_size(int32_t dtype) { return kBytes[dtype]; }

int32_t aoti_torch_get_data_ptr(AtenTensorOpaque* tensor, void** data) {
  *data = tensor->data;
  return 0;
}
int32_t aoti_torch_get_dtype(AtenTensorOpaque* tensor, int32_t* dtype) {
  *dtype = tensor->dtype;
  return 0;
}
int32_t aoti_torch_get_numel(AtenTensorOpaque* tensor, int64_t* numel) {
  *numel = count_of(tensor->sizes);
  return 0;
}
int32_t aoti_torch_get_size(AtenTensorOpaque* tensor, int64_t dim, int64_t* size) {
  *size = tensor->sizes.at(dim);
  return 0;
}
int32_t aoti_torch_get_stride(AtenTensorOpaque* tensor, int64_t dim, int64_t* stride) {
  *stride = tensor->strides.at(dim);
  return 0;
}
int32_t aoti_torch_new_tensor_handle(AtenTensorOpaque* tensor, AtenTensorOpaque** made) {
  ++tensor->references;
  *made = tensor;
  return 0;
}
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque* tensor) {
  if (--tensor->references > 0) return 0;
  tensor->deleter(tensor->data, tensor->context);
  delete tensor;
  return 0;
}
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                 int32_t dtype, int32_t, int32_t, AtenTensorOpaque** made) {
  *made = new_tensor(dtype, {sizes, sizes + dims}, {strides, strides + dims});
  return 0;
}
int32_t torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                        int64_t, int32_t dtype, int32_t, int32_t, AtenTensorOpaque** made, int32_t,
                        const uint8_t*, int64_t, void (*deleter)(void* data, void* context),
                        void* context) {
  *made = new AtenTensorOpaque{
      dtype, {sizes, sizes + dims}, {strides, strides + dims}, data, 1, deleter, context};
  return 0;
}

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                           void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  if (begin < end) body(begin, end, context);
  return 0;
}
int32_t torch_get_num_threads(uint32_t* threads) {
  *threads = 1;
  return 0;
}

int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                     TorchLibraryOpaque** made) {
  *made = nullptr;
  return 0;
}
int32_t torch_library_impl(TorchLibraryOpaque*, const char* name, Boxed boxed, uint64_t) {
  operators()[name] = boxed;
  return 0;
}

// Python's part: the extension is a module that holds nothing
PyObject* PyModule_Create2(PyModuleDef*, int) { return nullptr; }
PyObject* PyExc_ImportError = nullptr;
void PyErr_SetString(PyObject*, const char* text) { std::fprintf(stderr, "%s\n", text); }
PyObject* PyInit__C();

}  // extern "C"

// ---- the file -----------------------------------------------------------------------------------

namespace {

std::FILE* file = nullptr;
std::string current;
bool narrow = false;  // whether the call has operands of less than 64 bits: sums in float64 have
                      // rounded terms then

[[noreturn]] void wrong(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", current.c_str(), what.c_str());
  std::exit(1);
}

template <typename T>
T take() {
  T value;
  if (std::fread(&value, sizeof(T), 1, file) != 1) wrong("the file ends early");
  return value;
}

std::vector<int64_t> take_sizes(int64_t dims) {
  std::vector<int64_t> sizes(dims);
  for (int64_t& size : sizes) size = take<int64_t>();
  return sizes;
}

AtenTensorOpaque* take_tensor() {
  const auto dtype = static_cast<int32_t>(take<int64_t>());
  const auto dims = take<int64_t>();
  std::vector<int64_t> sizes = take_sizes(dims);
  AtenTensorOpaque* made = new_tensor(dtype, sizes, take_sizes(dims));
  const size_t bytes = span_of(*made) * kBytes[dtype];
  if (bytes > 0 && std::fread(made->data, 1, bytes, file) != bytes) wrong("the file ends early");
  return made;
}

struct Value {
  char kind = 'n';
  uint64_t slot = 0;
  AtenTensorOpaque* tensor = nullptr;
};

Value take_value() {
  Value value{static_cast<char>(take<int64_t>())};
  if (value.kind == 't' || value.kind == 'o') {
    value.tensor = take_tensor();
  } else if (value.kind != 'n') {
    value.slot = take<uint64_t>();
  }
  return value;
}

// ---- comparing ----------------------------------------------------------------------------------

double element(const AtenTensorOpaque& t, int64_t at) {
  const char* const data = static_cast<const char*>(t.data) + at * kBytes[t.dtype];
  switch (t.dtype) {
    case kInt: {
      int32_t v;
      std::memcpy(&v, data, 4);
      return v;
    }
    case kFloat: {
      float v;
      std::memcpy(&v, data, 4);
      return v;
    }
    case kDouble: {
      double v;
      std::memcpy(&v, data, 8);
      return v;
    }
    case kBfloat16: {
      uint16_t high;
      std::memcpy(&high, data, 2);
      const uint32_t bits = static_cast<uint32_t>(high) << 16;
      float v;
      std::memcpy(&v, &bits, 4);
      return v;
    }
    default:
      return *data;
  }
}

void compare(const std::string& what, const AtenTensorOpaque& got, const AtenTensorOpaque& want) {
  if (got.dtype != want.dtype || got.sizes != want.sizes) wrong(what + " has another shape");
  const int64_t count = count_of(want.sizes);
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t left = i, at = 0, there = 0;
    for (size_t dim = want.sizes.size(); dim-- > 0; left /= want.sizes[dim]) {
      at += left % want.sizes[dim] * got.strides[dim];
      there += left % want.sizes[dim] * want.strides[dim];
    }
    if (want.dtype == kLong) {  // 2^63 is no double
      if (static_cast<int64_t*>(got.data)[at] != static_cast<int64_t*>(want.data)[there])
        wrong(what + " differs at element " + std::to_string(i));
      continue;
    }
    const double a = element(got, at), b = element(want, there);
    if (std::isnan(a) != std::isnan(b)) wrong(what + " is no number where it should be one");
    if (std::isnan(a)) continue;
    largest = std::max(largest, std::fabs(b));
    difference = std::max(difference, std::fabs(a - b));
  }
  const double allowed = want.dtype == kFloat      ? 1e-5
                         : want.dtype == kDouble   ? (narrow ? 1e-5 : 1e-12)
                         : want.dtype == kBfloat16 ? 1e-2
                                                   : 0;
  if (difference > allowed * largest) {
    char text[100];
    std::snprintf(text, sizeof(text), " differs by %g where the largest entry is %g", difference,
                  largest);
    wrong(what + text);
  }
}

// One call: made again with the recorded arguments, and compared.
void replay() {
  const auto length = take<int64_t>();
  std::string name(length, ' ');
  if (std::fread(name.data(), 1, length, file) != static_cast<size_t>(length)) wrong("early end");
  current = name;
  std::vector<Value> arguments(take<int64_t>());
  narrow = false;
  for (Value& value : arguments) {
    value = take_value();
    if (value.tensor != nullptr)
      narrow |= value.tensor->dtype == kFloat || value.tensor->dtype == kBfloat16;
  }
  std::vector<Value> after(arguments.size());
  for (Value& value : after) value = take_value();
  std::vector<Value> results(take<int64_t>());
  for (Value& value : results) value = take_value();

  std::vector<uint64_t> stack(std::max(arguments.size(), results.size()) + 1);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Value& value = arguments[i];
    if (value.tensor != nullptr) ++value.tensor->references;  // the operator owns one
    const auto handle = reinterpret_cast<uint64_t>(value.tensor);
    stack[i] = value.kind == 't'   ? handle
               : value.kind == 'o' ? reinterpret_cast<uint64_t>(new uint64_t(handle))
                                   : value.slot;
  }
  const auto found = operators().find(name);
  if (found == operators().end()) wrong("no such operator");
  found->second(stack.data(), arguments.size(), results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    const std::string what = "result " + std::to_string(i);
    if (results[i].kind == 't') {
      auto* const got = reinterpret_cast<AtenTensorOpaque*>(stack[i]);
      compare(what, *got, *results[i].tensor);
      aoti_torch_delete_tensor_object(got);
      aoti_torch_delete_tensor_object(results[i].tensor);
    } else if (results[i].kind == 'b' ? (stack[i] & 1) != results[i].slot
                                      : stack[i] != results[i].slot) {
      wrong(what + " differs");
    }
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].tensor == nullptr) continue;
    compare("argument " + std::to_string(i), *arguments[i].tensor, *after[i].tensor);
    if (arguments[i].tensor->references != 1) wrong("a reference is kept");
    aoti_torch_delete_tensor_object(arguments[i].tensor);
    aoti_torch_delete_tensor_object(after[i].tensor);
  }
}

}  // namespace

int main(int, char** arguments) {
  PyInit__C();
  file = std::fopen(arguments[1], "rb");
  if (file == nullptr) return 2;
  uint64_t level[] = {static_cast<uint64_t>(int64_t{-1})};
  operators().at("cpp_simd")(level, 1, 1);
  std::printf("level %d\n", static_cast<int>(level[0]));
  std::map<std::string, int> calls;
  for (auto left = take<int64_t>(); left > 0; --left) {
    replay();
    ++calls[current];
  }
  for (const auto& [name, number] : calls) std::printf("%s: %d calls\n", name.c_str(), number);
  return 0;
}
