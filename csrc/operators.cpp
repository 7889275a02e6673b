// The extension: registers the operators on LibTorch's stable ABI. Schemas are defined in Python
// (bae_fast/backends/cpp/extension.py).
#define PY_SSIZE_T_CLEAN
#include "operators.h"

#include <Python.h>

namespace bae_fast {
namespace {

// Makes a level the one in use and returns it: -1 asks for the best, -3 for the one in use. Returns
// -2 where the CPU lacks it.
int64_t simd(int64_t level) {
  if (level == -3) level = static_cast<int64_t>(current_simd());
  if (level == -1) level = static_cast<int64_t>(best_simd());
  if (level < 0 || level > 4 || !has_simd(static_cast<Simd>(level))) return -2;
  set_simd(static_cast<Simd>(level));
  return level;
}

STABLE_TORCH_LIBRARY_IMPL(bae_fast, CompositeExplicitAutograd, m) {
  m.impl("cpp_simd", TORCH_BOX(&simd));
  m.impl("cpp_has_units", TORCH_BOX(&has_units));
  m.impl("cpp_new_gradient", TORCH_BOX(&new_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(bae_fast, CPU, m) {
  m.impl("cpp_rows_to_columns", TORCH_BOX(&rows_to_columns));
  m.impl("cpp_column_counts", TORCH_BOX(&column_counts));
  m.impl("cpp_count_ones", TORCH_BOX(&count_ones));
  m.impl("cpp_salient", TORCH_BOX(&salient));
  m.impl("cpp_grouped", TORCH_BOX(&grouped));
  m.impl("cpp_threshold", TORCH_BOX(&threshold));
  m.impl("cpp_covariance", TORCH_BOX(&covariance));
  m.impl("cpp_pair_lists", TORCH_BOX(&pair_lists));
  m.impl("cpp_list_rows", TORCH_BOX(&list_rows));
  m.impl("cpp_listed_covariance", TORCH_BOX(&listed_covariance));
  m.impl("cpp_backward", TORCH_BOX(&backward));
  m.impl("cpp_sparse_backward", TORCH_BOX(&sparse_backward));
  m.impl("cpp_rows_to_features", TORCH_BOX(&rows_to_features));
  m.impl("cpp_bits_product", TORCH_BOX(&bits_product));
  m.impl("cpp_unit_encode", TORCH_BOX(&unit_encode));
  m.impl("cpp_unit_product", TORCH_BOX(&unit_product));
  m.impl("cpp_unit_backward", TORCH_BOX(&unit_backward));
}

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace bae_fast

// Importing the module registers the operators; it holds nothing else.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&bae_fast::module); }
