// Matrices as the units of kernels.h read them, and the left side of products.
#pragma once

#include "tensors.h"

namespace bae_fast {

// [rows, columns] of floats or bf16 numbers, or of bits.
inline Matrix as_matrix(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  Matrix m{t.data_ptr(), t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), Matrix::kBits};
  if (dtype != ScalarType::Int) {
    m.element = dtype == ScalarType::Float ? Matrix::kFloat : Matrix::kBfloat16;
    if (t.size(0) == 1 && m.column != 1) m.row = 1;
    check(m.row == 1 || m.column == 1, "a matrix must be contiguous one way");
  }
  return m;
}

inline Matrix transposed(Matrix m) {
  std::swap(m.row, m.column);
  return m;
}

// The same matrix from element (row, column) on.
inline Matrix from(Matrix m, int64_t row, int64_t column) {
  const char* at = static_cast<const char*>(m.data);
  if (m.element == Matrix::kBits) {
    m.data = at + (row * m.row + column / kWordBits) * 4;
  } else {
    m.data = at + (row * m.row + column * m.column) * (m.element == Matrix::kFloat ? 4 : 2);
  }
  return m;
}

// The left side of products, packed by all threads: pack(first row) of every group.
class LeftPanel {
 public:
  template <typename Pack>
  LeftPanel(int64_t bytes, int64_t rows, int64_t group, const Pack& pack) : memory_(bytes) {
    parallel_for(0, (rows + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        if (!pack(begin * group, memory_.get())) exact_ = false;
      }
    });
  }
  LeftPanel(const Matrix& m, int64_t rows, int64_t depth, int64_t digits)
      : LeftPanel(kernels().units->panel_bytes(rows, depth, digits), rows, kernels().units->rows,
                  [&](int64_t first, uint8_t* panel) {
                    return kernels().units->pack(m, first, rows, depth, digits, panel);
                  }) {}
  const uint8_t* get() const { return memory_.get(); }
  bool exact() const { return exact_; }

 private:
  Scratch memory_;
  std::atomic<bool> exact_{true};
};

}  // namespace bae_fast
