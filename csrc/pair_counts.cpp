// Rows in which two columns are on together, for all pairs of chosen columns; and ones that rows of
// bits have in common.
//
// Pairs are counted in two ways to the same integers. Where ones are few, the rows that a column is
// on in are visited, and each entry of their lists adds one to a counter: sum_r l_r^2 in all for
// l_r ones in row r, whatever the number of columns is. Else every pair is counted by bits.
#include "operators.h"

namespace bae_fast {
namespace {

constexpr int64_t kColumnsAtOnce = 32;  // whose counters, or bits, a thread has at hand
constexpr int64_t kWordsAtOnce = 2048;  // of a column: those at hand fill half of an outer cache
constexpr int64_t kAhead = 4;           // rows whose entries are asked for before they are needed

// Ones of rows by their places, and rows of each place.
struct PlacedOnes {
  std::vector<int64_t> begin, place_begin;  // of a row in `place`, of a place in `row`
  std::vector<int32_t> place, row;

  PlacedOnes(const FoundBits& bits, int64_t k) : begin(1, 0), place_begin(k + 1, 0) {
    begin.reserve(bits.length.size() + 1);
    place.reserve(bits.total);
    row.resize(bits.total);
    for (const int32_t length : bits.length) begin.push_back(begin.back() + length);
    for (const auto& block : bits.blocks) {
      for (const int32_t at : block) {
        place.push_back(at);
        ++place_begin[at + 1];
      }
    }
    for (int64_t i = 0; i < k; ++i) place_begin[i + 1] += place_begin[i];
    // not a copy: that needs a symbol of libstdc++ that is too new for manylinux_2_28
    std::vector<int64_t> next(place_begin.begin(), place_begin.end());
    for (size_t r = 0; r < bits.length.size(); ++r) {
      for (int64_t e = begin[r]; e < begin[r + 1]; ++e) {
        row[next[place[e]]++] = static_cast<int32_t>(r);
      }
    }
  }
};

// take(first, last, counts) of groups of columns, with counts of a thread's own.
template <typename Take>
void by_groups(int64_t k, const Take& take) {
  by_turns((k + kColumnsAtOnce - 1) / kColumnsAtOnce, [] { return std::vector<int32_t>(); },
           [&](std::vector<int32_t>& counts, int64_t g) {
             const int64_t first = g * kColumnsAtOnce;
             take(first, std::min(k, first + kColumnsAtOnce), counts);
           });
}

void by_lists(const PlacedOnes& ones, int64_t k, float* out) {
  by_groups(k, [&](int64_t first, int64_t last, std::vector<int32_t>& counts) {
    for (int64_t i = first; i < last; ++i) {
      counts.assign(k, 0);
      int32_t* const to = counts.data();
      const int32_t* const place = ones.place.data();
      const int64_t end = ones.place_begin[i + 1];
      for (int64_t e = ones.place_begin[i]; e < end; ++e) {
        if (e + kAhead < end) __builtin_prefetch(place + ones.begin[ones.row[e + kAhead]]);
        const int32_t r = ones.row[e];
        for (int64_t p = ones.begin[r]; p < ones.begin[r + 1]; ++p) ++to[place[p]];
      }
      for (int64_t j = 0; j < k; ++j) out[i * k + j] = static_cast<float>(to[j]);
    }
  });
}

// To out[i, j], a row every `stride`, the ones are added that above[i] and rows[index[j]], or
// rows[j] without index, have in common: bits [across, words] and [.., words].
void add_common_ones(const uint32_t* above, int64_t across, const uint32_t* rows,
                     const uint16_t* index, int64_t count, int64_t words, int32_t* out,
                     int64_t stride) {
  static const uint32_t kNothing[kWordsAtOnce] = {};
  for (int64_t w = 0; w < words; w += kWordsAtOnce) {
    SignCounts s{};
    s.rows = rows + w;
    s.rows_stride = words;
    s.index = index;
    s.count = count;
    s.below = kNothing;
    s.words = std::min(words - w, kWordsAtOnce);
    for (int64_t i = 0; i < across; ++i) {
      s.above = above + i * words + w;
      s.out = out + i * stride;
      kernels().sign_counts(s);
    }
  }
}

// Of columns as rows of bits, [k, words].
void by_bits(const uint32_t* bits, int64_t k, int64_t words, float* out) {
  by_groups(k, [&](int64_t first, int64_t last, std::vector<int32_t>& counts) {
    const uint32_t* const own = bits + first * words;
    counts.assign((k - first) * kColumnsAtOnce, 0);
    add_common_ones(own, k - first, own, nullptr, last - first, words, counts.data(),
                    kColumnsAtOnce);
    for (int64_t i = first; i < k; ++i) {
      for (int64_t j = first; j < last; ++j) {
        const int32_t both = counts[(i - first) * kColumnsAtOnce + j - first];
        out[i * k + j] = out[j * k + i] = static_cast<float>(both);
      }
    }
  });
}

}  // namespace

// [k, k] in fp32, of columns j with a place[j] from 0 to k - 1: each is the place of one column.
// `list_cost` products of bits take the time of one visited entry.
Tensor pair_counts(Tensor words, Tensor place, int64_t k, double list_cost) {
  const int64_t n = words.size(0), columns = place.numel();
  const int32_t* const of = data<int32_t>(place);
  Tensor out = new_empty(ScalarType::Float, k, k);
  prefer_large_pages(out);
  float* const to = mutable_data<float>(out);
  // the least that lists visit is that of equal rows
  const double bits =
      0.5 * static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(k);
  const double most = bits / list_cost;
  const double most_ones = __builtin_sqrt(most * static_cast<double>(n));
  const FoundBits found =
      find_bits(words, n_words(columns), nullptr, static_cast<int64_t>(std::min(most_ones, 2e9)),
                [&](int64_t j) { return j < columns ? of[j] : -1; });
  double visited = 0;
  for (const int32_t length : found.length) visited += static_cast<double>(length) * length;
  if (static_cast<double>(found.total) <= most_ones && visited <= most) {
    by_lists(PlacedOnes(found, k), k, to);
    return out;
  }
  Tensor features = rows_to_features(words, columns);
  const int64_t m = features.size(1);
  const uint32_t* in = data<uint32_t>(features);
  Tensor chosen = new_empty(ScalarType::Int, k, m);
  uint32_t* const rows = mutable_data<uint32_t>(chosen);
  for (int64_t j = 0; j < columns; ++j) {
    if (of[j] >= 0) std::copy_n(in + j * m, m, rows + of[j] * m);
  }
  by_bits(rows, k, m, to);
  return out;
}

// fp32 [G, a, c]: ones that left[g, i] and rows[index[g, j]] have in common, of bits [G, a, m] and
// [k, m] in one piece, k at most 2^16.
Tensor common_ones(Tensor left, Tensor rows, Tensor index) {
  const int64_t groups = left.size(0), across = left.size(1), m = left.size(2);
  const int64_t chosen = index.size(1);
  Tensor out = new_empty(ScalarType::Float, groups, across, chosen);
  const uint32_t* const from = data<uint32_t>(left);
  const int32_t* const of = data<int32_t>(index);
  float* const to = mutable_data<float>(out);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> names(chosen);
    std::vector<int32_t> counts(across * chosen);
    for (int64_t g = begin; g < end; ++g) {
      std::copy_n(of + g * chosen, chosen, names.begin());
      std::fill(counts.begin(), counts.end(), 0);
      add_common_ones(from + g * across * m, across, data<uint32_t>(rows), names.data(), chosen, m,
                      counts.data(), chosen);
      for (int64_t i = 0; i < across * chosen; ++i) {
        to[g * across * chosen + i] = static_cast<float>(counts[i]);
      }
    }
  });
  return out;
}

}  // namespace bae_fast
