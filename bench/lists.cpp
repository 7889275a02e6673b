// The least that the covariance of a sparse code takes: a plain program with one idea (Gustavson's
// product of a sparse matrix and its transpose), nothing tuned. bench/sparse.py compiles it and
// holds the operator against it.
//
// With M = sum_j n_j, over pairs i < j that are on together in n_ij > 0 rows,
//
//     sum_{i != j} |N n_ij - n_i n_j| = M^2 - sum_j n_j^2 + 2 sum (|N n_ij - n_i n_j| - n_i n_j)

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

void on_threads(int threads, const std::function<void(int)>& work) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

// The numerator for row-packed bits [n][stride words]; `seconds`: of the counting alone.
extern "C" int64_t floor_numerator(const uint32_t* words, int64_t n, int64_t stride, int64_t f,
                                   int threads, double* seconds) {
  std::vector<std::vector<int32_t>> rows(n);
  on_threads(threads, [&](int t) {
    for (int64_t r = n * t / threads; r < n * (t + 1) / threads; ++r) {
      for (int64_t w = 0; w < (f + 31) / 32; ++w) {
        for (uint32_t rest = words[r * stride + w]; rest != 0; rest &= rest - 1) {
          rows[r].push_back(static_cast<int32_t>(w * 32 + __builtin_ctz(rest)));
        }
      }
    }
  });
  std::vector<int64_t> begin(f + 1, 0);
  for (const auto& row : rows) {
    for (int32_t j : row) ++begin[j + 1];
  }
  for (int64_t j = 0; j < f; ++j) begin[j + 1] += begin[j];
  std::vector<int32_t> of_feature(begin[f]);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t r = 0; r < n; ++r) {
    for (int32_t j : rows[r]) of_feature[next[j]++] = static_cast<int32_t>(r);
  }

  const auto start = std::chrono::steady_clock::now();
  constexpr int64_t kAtOnce = 64;
  std::atomic<int64_t> block{0};
  std::atomic<int64_t> total{0};
  on_threads(threads, [&](int) {
    std::vector<int32_t> joint(f, 0), touched;
    int64_t sum = 0;
    for (int64_t first = kAtOnce * block++; first < f; first = kAtOnce * block++) {
      for (int64_t i = first; i < f && i < first + kAtOnce; ++i) {
        touched.clear();
        for (int64_t e = begin[i]; e < begin[i + 1]; ++e) {
          for (int32_t j : rows[of_feature[e]]) {
            if (j >= i) break;
            if (joint[j]++ == 0) touched.push_back(j);
          }
        }
        const int64_t n_i = begin[i + 1] - begin[i];
        for (int32_t j : touched) {
          const int64_t expected = n_i * (begin[j + 1] - begin[j]);
          sum += std::llabs(n * joint[j] - expected) - expected;
          joint[j] = 0;
        }
      }
    }
    total += sum;
  });
  *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  int64_t squares = 0;
  for (int64_t j = 0; j < f; ++j) {
    const int64_t ones = begin[j + 1] - begin[j];
    squares += ones * ones;
  }
  return begin[f] * begin[f] - squares + 2 * total;
}
