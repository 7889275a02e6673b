// The least that the covariance of a sparse code takes: a plain program with one idea (Gustavson's
// product of a sparse matrix and its transpose) and two habits of such programs: lists lie one
// after the other, and what is used most is named by the smallest numbers. bench/sparse.py compiles
// it and holds the operator against it.
//
// With M = sum_j n_j, over pairs i < j that are on together in n_ij > 0 rows,
//
//     sum_{i != j} |N n_ij - n_i n_j| = M^2 - sum_j n_j^2 + 2 sum (|N n_ij - n_i n_j| - n_i n_j)

#include <algorithm>
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

// Features are named by their ranks: by falling counts.
struct Lists {
  int64_t n, total;
  std::vector<int32_t> ones;        // by rank
  std::vector<int64_t> begin;       // of a rank in of_feature
  std::vector<int32_t> of_feature;  // rows
  std::vector<int64_t> row_begin;   // of a row in of_row
  std::vector<int32_t> of_row;      // ranks, rising
};

// Of row-packed bits [n][stride words].
Lists make_lists(const uint32_t* words, int64_t n, int64_t stride, int64_t f, int threads) {
  // columns of the ones, row by row; eight words at a time are looked at first
  const int64_t width = (f + 31) / 32;
  Lists out;
  out.n = n;
  out.row_begin.assign(n + 1, 0);
  std::vector<std::vector<int32_t>> part(threads);
  on_threads(threads, [&](int t) {
    for (int64_t r = n * t / threads; r < n * (t + 1) / threads; ++r) {
      const uint32_t* const row = words + r * stride;
      const size_t before = part[t].size();
      for (int64_t w0 = 0; w0 < width; w0 += 8) {
        const int64_t w1 = std::min(width, w0 + 8);
        uint32_t any = 0;
        for (int64_t w = w0; w < w1; ++w) any |= row[w];
        if (any == 0) continue;
        for (int64_t w = w0; w < w1; ++w) {
          for (uint32_t rest = row[w]; rest != 0; rest &= rest - 1) {
            part[t].push_back(static_cast<int32_t>(w * 32 + __builtin_ctz(rest)));
          }
        }
      }
      out.row_begin[r + 1] = static_cast<int64_t>(part[t].size() - before);
    }
  });
  for (int64_t r = 0; r < n; ++r) out.row_begin[r + 1] += out.row_begin[r];
  out.total = out.row_begin[n];

  std::vector<int32_t> count(f, 0), rank(f);
  for (const auto& columns : part) {
    for (int32_t j : columns) ++count[j];
  }
  std::vector<int64_t> place(n + 2, 0);
  for (int32_t ones : count) ++place[n - ones + 1];
  for (int64_t c = 0; c <= n; ++c) place[c + 1] += place[c];
  for (int64_t j = 0; j < f; ++j) rank[j] = static_cast<int32_t>(place[n - count[j]]++);
  out.ones.resize(f);
  for (int64_t j = 0; j < f; ++j) out.ones[rank[j]] = count[j];

  out.begin.assign(f + 1, 0);
  for (int64_t i = 0; i < f; ++i) out.begin[i + 1] = out.begin[i] + out.ones[i];
  out.of_feature.resize(out.total);
  out.of_row.resize(out.total);
  std::vector<int64_t> next(out.begin.begin(), out.begin.end() - 1);
  int64_t r = 0, at = 0;
  for (const auto& columns : part) {
    for (int32_t j : columns) {
      while (at >= out.row_begin[r + 1]) ++r;
      out.of_feature[next[rank[j]]++] = static_cast<int32_t>(r);
      ++at;
    }
  }
  std::vector<int64_t> end(out.row_begin.begin(), out.row_begin.end() - 1);
  for (int64_t i = 0; i < f; ++i) {
    for (int64_t e = out.begin[i]; e < out.begin[i + 1]; ++e) {
      out.of_row[end[out.of_feature[e]]++] = static_cast<int32_t>(i);
    }
  }
  return out;
}

// Calls each(thread, i, the features j < i that are on together with i, how many, n_ij by j).
template <typename Each>
void for_each_feature(const Lists& lists, int threads, Each each) {
  constexpr int64_t kAtOnce = 64;
  const int64_t f = static_cast<int64_t>(lists.ones.size());
  std::atomic<int64_t> block{0};
  on_threads(threads, [&](int t) {
    std::vector<int32_t> joint(f, 0), touched(f + 1);
    for (int64_t first = kAtOnce * block++; first < f; first = kAtOnce * block++) {
      for (int64_t i = first; i < f && i < first + kAtOnce; ++i) {
        int64_t used = 0;
        for (int64_t e = lists.begin[i]; e < lists.begin[i + 1]; ++e) {
          const int32_t* j = lists.of_row.data() + lists.row_begin[lists.of_feature[e]];
          for (; *j < i; ++j) {  // i itself ends the part before it
            touched[used] = *j;
            used += joint[*j]++ == 0;
          }
        }
        each(t, i, touched.data(), used, joint.data());
      }
    }
  });
}

int64_t numerator(const Lists& lists, int64_t summed) {
  int64_t squares = 0;
  for (int32_t ones : lists.ones) squares += static_cast<int64_t>(ones) * ones;
  return lists.total * lists.total - squares + 2 * summed;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// The numerator for row-packed bits [n][stride words]; `seconds`: of the counting alone.
extern "C" int64_t floor_numerator(const uint32_t* words, int64_t n, int64_t stride, int64_t f,
                                   int threads, double* seconds) {
  const Lists lists = make_lists(words, n, stride, f, threads);
  const auto start = std::chrono::steady_clock::now();
  std::vector<int64_t> sums(threads * 8, 0);
  for_each_feature(
      lists, threads, [&](int t, int64_t i, const int32_t* touched, int64_t used, int32_t* joint) {
        int64_t sum = 0;
        for (int64_t e = 0; e < used; ++e) {
          const int64_t expected = static_cast<int64_t>(lists.ones[i]) * lists.ones[touched[e]];
          sum += std::llabs(n * joint[touched[e]] - expected) - expected;
          joint[touched[e]] = 0;
        }
        sums[t * 8] += sum;
      });
  *seconds = seconds_since(start);
  int64_t summed = 0;
  for (int64_t sum : sums) summed += sum;
  return numerator(lists, summed);
}

// The numerator from pairs that are there already, as counts that follow a bank would have them:
// n_i changes with every batch, so every pair is looked at. `seconds`: of that pass alone;
// `pairs`: how many there are.
extern "C" int64_t kept_pairs_numerator(const uint32_t* words, int64_t n, int64_t stride, int64_t f,
                                        int threads, double* seconds, int64_t* pairs) {
  struct Pair {
    int32_t i, j, joint;
  };
  const Lists lists = make_lists(words, n, stride, f, threads);
  std::vector<std::vector<Pair>> kept(threads);
  for_each_feature(lists, threads,
                   [&](int t, int64_t i, const int32_t* touched, int64_t used, int32_t* joint) {
                     for (int64_t e = 0; e < used; ++e) {
                       kept[t].push_back({static_cast<int32_t>(i), touched[e], joint[touched[e]]});
                       joint[touched[e]] = 0;
                     }
                   });
  const auto start = std::chrono::steady_clock::now();
  std::atomic<int64_t> summed{0};
  on_threads(threads, [&](int t) {
    int64_t sum = 0;
    for (const Pair& pair : kept[t]) {
      const int64_t expected = static_cast<int64_t>(lists.ones[pair.i]) * lists.ones[pair.j];
      sum += std::llabs(n * pair.joint - expected) - expected;
    }
    summed += sum;
  });
  *seconds = seconds_since(start);
  *pairs = 0;
  for (const auto& part : kept) *pairs += static_cast<int64_t>(part.size());
  return numerator(lists, summed);
}
