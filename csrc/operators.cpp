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

void register_operators() {
  Library any("bae_fast", "CompositeExplicitAutograd");
  any.impl<&simd>("cpp_simd");
  any.impl<&unit_kind>("cpp_unit_kind");
  any.impl<&new_gradient>("cpp_new_gradient");
  Library cpu("bae_fast", "CPU");
  cpu.impl<&rows_to_columns>("cpp_rows_to_columns");
  cpu.impl<&column_counts>("cpp_column_counts");
  cpu.impl<&count_ones>("cpp_count_ones");
  cpu.impl<&salient>("cpp_salient");
  cpu.impl<&grouped>("cpp_grouped");
  cpu.impl<&search>("cpp_search");
  cpu.impl<&threshold>("cpp_threshold");
  cpu.impl<&covariance>("cpp_covariance");
  cpu.impl<&pair_lists>("cpp_pair_lists");
  cpu.impl<&list_rows>("cpp_list_rows");
  cpu.impl<&listed_covariance>("cpp_listed_covariance");
  cpu.impl<&pair_counts>("cpp_pair_counts");
  cpu.impl<&common_ones>("cpp_common_ones");
  cpu.impl<&backward>("cpp_backward");
  cpu.impl<&list_window>("cpp_list_window");
  cpu.impl<&sparse_backward>("cpp_sparse_backward");
  cpu.impl<&rows_to_features>("cpp_rows_to_features");
  cpu.impl<&bits_product>("cpp_bits_product");
  cpu.impl<&gather_rows>("cpp_gather_rows");
  cpu.impl<&entropy>("cpp_entropy");
  cpu.impl<&entropy_slopes>("cpp_entropy_slopes");
  cpu.impl<&squared_error>("cpp_squared_error");
  cpu.impl<&squared_error_gradient>("cpp_squared_error_gradient");
  cpu.impl<&unit_encode>("cpp_unit_encode");
  cpu.impl<&unit_product>("cpp_unit_product");
  cpu.impl<&unit_backward>("cpp_unit_backward");
}

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace bae_fast

// Importing the module registers the operators; it holds nothing else.
PyMODINIT_FUNC PyInit__C() {
  try {
    bae_fast::register_operators();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  return PyModule_Create(&bae_fast::module);
}
