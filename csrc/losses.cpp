// The small terms of the loss: the entropy of counts and its slopes, the squared error and its
// gradient. One pass each costs what reading the numbers does, where a dozen operators of torch
// would each wake a thread.
//
// Sums are of blocks of one size in one order, so the number of threads changes no bit.
#include <numeric>

#include "operators.h"

namespace bae_fast {
namespace {

constexpr double kEps = 1e-10;  // as in bae_fast/statistics.py
constexpr double kLn2 = 0.693147180559945309417;
constexpr int64_t kColumns = 1024;             // of a block
constexpr int64_t kColumnsOfThread = 1 << 14;  // at least
constexpr int64_t kNumbersOfThread = 1 << 15;  // of a matrix, at least
constexpr int64_t kNumbersOfSum = 256;         // added up in fp32, by lanes

// The logarithm to base 2 of a normal number above 0, to about two units in the last place; NaN
// where it is not above 0. (libm's asks for a newer glibc than manylinux_2_28 has.)
//
// v = m 2^e with m from sqrt(1/2) to sqrt(2), and ln m = 2 artanh s = 2 (s + s^3 / 3 + ...) with
// s = (m - 1) / (m + 1), at most 0.172 in size: the first term left out is below 1e-18 of the sum.
inline double log2_of(double v) {
  uint64_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;  // the bits of sqrt(1/2)
  const int64_t e = static_cast<int64_t>(bits - kRootHalf) >> 52;
  const uint64_t m_bits = bits - (static_cast<uint64_t>(e) << 52);
  double m;
  __builtin_memcpy(&m, &m_bits, sizeof(m));
  const double s = (m - 1) / (m + 1), z = s * s;
  double sum = 1.0 / 23;
  for (int k = 21; k > 0; k -= 2) sum = sum * z + 1.0 / k;
  const double log = static_cast<double>(e) + s * sum * (2 / kLn2);
  return v > 0 ? log : __builtin_nan("");
}

// body(first, last) over the blocks of columns, on threads where there are many.
template <typename F>
void each_block(int64_t columns, const F& body) {
  parallel_for(0, (columns + kColumns - 1) / kColumns, kColumnsOfThread / kColumns,
               [&](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   body(block * kColumns, std::min(columns, (block + 1) * kColumns));
                 }
               });
}

// The sum of n numbers by halves: processes that share the columns evenly add up to the same bits.
double sum_by_halves(const double* numbers, int64_t n) {
  if (n < 2) return n == 1 ? *numbers : 0.0;
  return sum_by_halves(numbers, n / 2) + sum_by_halves(numbers + n / 2, n - n / 2);
}

Tensor number_of(double value) {
  Tensor out = new_empty(ScalarType::Double);
  *mutable_data<double>(out) = value;
  return out;
}

// Rows of two matrices, the units of their columns, and which rows count.
template <typename R, typename T>
struct Difference {
  const R* recon;
  const T* target;
  int64_t recon_stride, target_stride, columns;
  const float* unit;
  const bool* keep;  // or null

  // (recon - target) unit
  float at(int64_t row, int64_t column) const {
    return (number(recon[row * recon_stride + column]) -
            number(target[row * target_stride + column])) *
           unit[column];
  }

  double squares(int64_t row) const {
    constexpr int kLanes = 16;
    double total = 0;
    for (int64_t first = 0; first < columns; first += kNumbersOfSum) {
      const int64_t last = std::min(columns, first + kNumbersOfSum);
      float sums[kLanes] = {};
      int64_t c = first;
      for (; c + kLanes <= last; c += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const float d = at(row, c + lane);
          sums[lane] += d * d;
        }
      }
      for (; c < last; ++c) {
        const float d = at(row, c);
        sums[0] += d * d;
      }
      for (const float sum : sums) total += sum;
    }
    return total;
  }

  // 2 scale unit (recon - target) unit
  void gradient(int64_t row, float scale, R* out) const {
    for (int64_t c = 0; c < columns; ++c) store(2 * scale * unit[c] * at(row, c), out + c);
  }
};

// body(difference) for the types of the numbers.
template <typename F>
void with_types(const Tensor& recon, const Tensor& target, const Tensor& unit,
                const std::optional<Tensor>& keep, const F& body) {
  const auto with = [&](auto recon_type, auto target_type) {
    using R = decltype(recon_type);
    using T = decltype(target_type);
    body(Difference<R, T>{data<R>(recon), data<T>(target), row_stride(recon), row_stride(target),
                          recon.size(1), data<float>(unit), data_or_null<bool>(keep)});
  };
  const bool recon_half = recon.scalar_type() == ScalarType::BFloat16,
             target_half = target.scalar_type() == ScalarType::BFloat16;
  if (recon_half && target_half) with(uint16_t{}, uint16_t{});
  if (recon_half && !target_half) with(uint16_t{}, float{});
  if (!recon_half && target_half) with(float{}, uint16_t{});
  if (!recon_half && !target_half) with(float{}, float{});
}

int64_t rows_of_thread(int64_t columns) {
  return 1 + kNumbersOfThread / std::max<int64_t>(columns, 1);
}

}  // namespace

// H in bits of n rows with so many ones in each column: see entropy_bits in bae_fast/statistics.py.
Tensor entropy(Tensor counts, int64_t n_rows) {
  const int64_t columns = counts.size(0);
  const int64_t* const ones = data<int64_t>(counts);
  std::vector<double> bits(columns);
  each_block(columns, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      const double p = static_cast<double>(ones[j]) / static_cast<double>(n_rows), q = 1 - p;
      bits[j] = p * log2_of(p + kEps) + q * log2_of(q + kEps);
    }
  });
  return number_of(-sum_by_halves(bits.data(), columns));
}

// Its derivative at the bits of each column, times a number: see entropy_gradient in the same file.
void entropy_slopes(Tensor counts, int64_t n_rows, double scale, Tensor out) {
  const int64_t* const ones = data<int64_t>(counts);
  const bool wide = out.scalar_type() == ScalarType::Double;
  void* const memory = out.data_ptr();
  each_block(counts.size(0), [&](int64_t first, int64_t last) {
    double slopes[kColumns];
    const double rows = static_cast<double>(n_rows);
    for (int64_t j = first; j < last; ++j) {
      const double p = static_cast<double>(ones[j]) / rows, q = 1 - p;
      slopes[j - first] =
          (log2_of((q + kEps) / (p + kEps)) + (q / (q + kEps) - p / (p + kEps)) / kLn2) / rows *
          scale;
    }
    if (wide) {
      std::copy_n(slopes, last - first, static_cast<double*>(memory) + first);
    } else {
      std::copy_n(slopes, last - first, static_cast<float*>(memory) + first);
    }
  });
}

// The sum of ((recon - target) unit)^2 over the rows that count.
Tensor squared_error(Tensor recon, Tensor target, Tensor unit, std::optional<Tensor> keep) {
  const int64_t n = recon.size(0);
  std::vector<double> sums(n);
  with_types(recon, target, unit, keep, [&](const auto& difference) {
    parallel_for(0, n, rows_of_thread(recon.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const bool counts = difference.keep == nullptr || difference.keep[row];
        sums[row] = counts ? difference.squares(row) : 0;
      }
    });
  });
  return number_of(std::accumulate(sums.begin(), sums.end(), 0.0));
}

// Its gradient at recon, times a number, contiguous; zero in rows that do not count.
void squared_error_gradient(Tensor recon, Tensor target, Tensor unit, std::optional<Tensor> keep,
                            double scale, Tensor out) {
  const int64_t columns = recon.size(1);
  with_types(recon, target, unit, keep, [&](const auto& difference) {
    using R = std::remove_const_t<std::remove_pointer_t<decltype(difference.recon)>>;
    R* const to = mutable_data<R>(out);
    parallel_for(0, recon.size(0), rows_of_thread(columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (difference.keep == nullptr || difference.keep[row]) {
          difference.gradient(row, static_cast<float>(scale), to + row * columns);
        } else {
          std::fill_n(to + row * columns, columns, R{});
        }
      }
    });
  });
}

}  // namespace bae_fast
