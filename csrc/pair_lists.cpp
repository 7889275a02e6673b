// Lists of codes, and the covariance of sparse codes from them (pair_lists.h).
//
// With M = sum_j n_j and C the pairs i != j with n_ij > 0, over features that are not constant,
//
//     sum_{i != j} |V_ij| = M^2 - sum_j n_j^2 + sum over ordered pairs in C of (|V_ij| - n_i n_j)
//     S_ij = -1 where n_ij = 0;  with Q = S + 1 on C and zero elsewhere
//     (B S)_ri = -(l_r - B_ri) + (B Q)_ri,   (n^T S)_i = -(M - n_i) + (n^T Q)_i
//
// where row r has l_r ones. For one feature the rows where it is on are visited, and each entry of
// their lists adds one to a counter: sum_r l_r^2 in all, whatever the number of features is. Lists
// rise by rank, so the part before the feature's own place has each pair once, and the counters
// that are used most lie side by side. Pairs of dense features are counted by bits.
#include "pair_lists.h"

#include "operators.h"

namespace bae_fast {
namespace {

constexpr int64_t kRanksAtOnce = 64;
constexpr int64_t kAhead = 6;    // rows whose entries are asked for before they are needed
constexpr int64_t kLookUps = 8;  // in the time of a product of one row's bits of dense features
constexpr double kGain = 0.5;  // lists keep no signs for backward: they must take half of the time

Tensor new_ints(int64_t size) { return new_empty(ScalarType::Int, size); }

// A feature is dense where counting a pair of its like by lists takes longer than by bits.
bool is_dense(int64_t ones, int64_t n_rows, double list_cost) {
  const double density = static_cast<double>(ones) / static_cast<double>(n_rows);
  return density * density * list_cost > 1;
}

// Ranks of features by falling counts, equal ones by their numbers. Where rows have few dense
// features none is called so.
Tensor rank_features(const Tensor& counts, int64_t n_rows, double list_cost) {
  const int64_t k = counts.numel();
  const int64_t* const n = data<int64_t>(counts);
  std::vector<int64_t> next(n_rows + 1, 0);
  int64_t active = 0, dense = 0, ones_of_dense = 0;
  for (int64_t j = 0; j < k; ++j) {
    if (n[j] <= 0 || n[j] >= n_rows) continue;
    ++next[n[j]];
    ++active;
    if (!is_dense(n[j], n_rows, list_cost)) continue;
    ++dense;
    ones_of_dense += n[j];
  }
  if (ones_of_dense < kLookUps * n_rows) dense = 0;
  for (int64_t count = n_rows - 1, at = 0; count > 0; --count) {
    const int64_t here = next[count];
    next[count] = at;
    at += here;
  }
  Tensor out = new_ints(Ranks::kHead + k + 2 * active);
  int32_t* const head = mutable_data<int32_t>(out);
  head[0] = static_cast<int32_t>(active);
  head[1] = static_cast<int32_t>(dense);
  int32_t* const of = head + Ranks::kHead;
  int32_t *const feature = of + k, *const ones = feature + active;
  for (int64_t j = 0; j < k; ++j) {
    of[j] = -1;
    if (n[j] <= 0 || n[j] >= n_rows) continue;
    const int64_t rank = next[n[j]]++;
    of[j] = static_cast<int32_t>(rank);
    feature[rank] = static_cast<int32_t>(j);
    ones[rank] = static_cast<int32_t>(n[j]);
  }
  return out;
}

double squared(double x) { return x * x; }

// The first rank, not below `from`, whose features are on so seldom that with a feature of n_i
// ones, in any row that both are on in, V > 0: N n_ij >= N > n_i n_j.
int64_t first_above(const Ranks& ranks, int64_t from, int64_t n_i, int64_t n_rows) {
  if (from == ranks.active || n_i * ranks.ones[from] < n_rows) return from;  // of most features
  return std::partition_point(ranks.ones + from, ranks.ones + ranks.active,
                              [&](int64_t n_j) { return n_i * n_j >= n_rows; }) -
         ranks.ones;
}

// A feature j, and the feature i that met it last.
struct Partner {
  int32_t met, ones;
};

// The first entries of a row: as many as rows of sparse codes often have. Rows come in an order
// that the hardware does not see.
void prefetch_row(const int32_t* entries) {
  __builtin_prefetch(entries);
  __builtin_prefetch(entries + 16);
}

// Sum over j < i with n_ij > 0 of |V_ij| - n_i n_j. Where V > 0 that is N n_ij - 2 n_i n_j: what
// rows are in common need not be counted by feature. `pairs` is zero between calls.
uint64_t pairs_before(const Ranks& ranks, const RowLists& lists, int64_t i, int64_t n_rows,
                      int32_t* pairs, int32_t* touched, Partner* partners) {
  const int32_t* const entries = lists.entries;
  const uint64_t n = static_cast<uint64_t>(n_rows), n_i = static_cast<uint64_t>(ranks.ones[i]);
  const int32_t stamp = static_cast<int32_t>(i);
  const int64_t above = first_above(ranks, 0, ranks.ones[i], n_rows);
  int64_t used = 0;
  uint64_t joint_above = 0, ones_above = 0;
  for (int32_t e = lists.feature_begin[i]; e < lists.feature_begin[i + 1]; ++e) {
    int32_t p = lists.begin[lists.row[e]];
    const int32_t end = lists.place[e];
    for (; p < end && entries[p] < above; ++p) {
      const int32_t j = entries[p];
      touched[used] = j;
      used += pairs[j]++ == 0;
    }
    joint_above += static_cast<uint64_t>(end - p);
    for (; p < end; ++p) {
      Partner& partner = partners[entries[p]];
      ones_above += static_cast<uint32_t>(partner.ones & -(partner.met != stamp));
      partner.met = stamp;
    }
  }
  uint64_t sum = n * joint_above - 2 * n_i * ones_above;
  for (int64_t t = 0; t < used; ++t) {
    const int32_t j = touched[t];
    // |V| - n_i n_j: V >= 0 gives N n_ij - 2 n_i n_j, V < 0 gives -N n_ij
    const uint64_t joint = n * static_cast<uint64_t>(pairs[j]);
    const uint64_t expected = n_i * static_cast<uint64_t>(ranks.ones[j]);
    sum += joint >= expected ? joint - 2 * expected : uint64_t{0} - joint;
    pairs[j] = 0;
  }
  return sum;
}

// Whether lists may be the faster form, from counts: the least that they visit is that of equal
// rows. Costs are in bit products; `list_cost` of them take the time of one visited entry.
bool may_be_listed(const Ranks& ranks, int64_t n_rows, double list_cost) {
  double rare = 0, all = 0;
  for (int64_t i = 0; i < ranks.active; ++i) {
    all += ranks.ones[i];
    if (i >= ranks.dense) rare += ranks.ones[i];
  }
  if (all >= INT32_MAX) return false;
  const double n = static_cast<double>(n_rows);
  return list_cost * squared(rare) / n + n * squared(ranks.dense) < kGain * n * squared(ranks.k);
}

// The same from the rows: entries visited for the pairs, and for the product with all rows.
bool is_listed(const RowLists& lists, const Ranks& ranks, int64_t n_rows, double list_cost,
               bool all_rows) {
  double visited = 0;
  for (int64_t r = 0; r < lists.rows; ++r) {
    visited +=
        squared(lists.begin[r + 1] - lists.begin[r]) - squared(lists.dense_end[r] - lists.begin[r]);
  }
  const double n = static_cast<double>(n_rows);
  double bits = n * squared(ranks.k), entries = visited;
  if (all_rows) {
    bits += n * squared(ranks.k);  // signs that were not kept, and their product
    for (int64_t i = ranks.dense; i < ranks.active; ++i) {
      double partners = 0;
      for (int64_t e = lists.feature_begin[i]; e < lists.feature_begin[i + 1]; ++e) {
        partners += lists.begin[lists.row[e] + 1] - lists.begin[lists.row[e]];
      }
      entries += ranks.ones[i] * std::min(partners, static_cast<double>(ranks.active));
    }
    entries += n * static_cast<double>(ranks.active);
  }
  return list_cost * entries + n * squared(ranks.dense) < kGain * bits;
}

}  // namespace

// The lists of rows of bits, with features named by `ranks`.
Tensor list_rows(Tensor words, Tensor ranks_tensor, int64_t n_features) {
  const Ranks ranks(ranks_tensor, n_features);
  const int64_t n = words.size(0);
  FoundBits bits = find_bits(words, n_words(n_features), nullptr, INT32_MAX,
                             [&](int64_t j) { return ranks.of[j]; });
  std::vector<int32_t>& length = bits.length;
  const int64_t total = bits.total;
  check(total < INT32_MAX, "lists of ", total, " entries: at most 2^31 - 2");
  Tensor out = new_ints(RowLists::kHead + 2 * n + 1 + ranks.active + 1 + 3 * total);
  int32_t* const head = mutable_data<int32_t>(out);
  head[0] = static_cast<int32_t>(n);
  head[1] = static_cast<int32_t>(total);
  int32_t* const begin = head + RowLists::kHead;
  int32_t *const dense_end = begin + n + 1, *const entries = dense_end + n;
  int32_t* const feature_begin = entries + total;
  int32_t *const row = feature_begin + ranks.active + 1, *const place = row + total;
  begin[0] = 0;
  for (int64_t r = 0; r < n; ++r) begin[r + 1] = begin[r] + length[r];

  // by feature, then by row again: both in order, so each row rises
  std::vector<int32_t> next(ranks.active + 1, 0);
  for (const auto& block : bits.blocks) {
    for (int32_t rank : block) ++next[rank];
  }
  for (int64_t i = 0, at = 0; i <= ranks.active; ++i) {
    feature_begin[i] = static_cast<int32_t>(at);
    at += next[i];
    next[i] = feature_begin[i];
  }
  int64_t r = 0;
  for (const auto& block : bits.blocks) {
    const int32_t* rank = block.data();
    for (const int64_t end = std::min(n, r + FoundBits::kRows); r < end; ++r) {
      for (int32_t e = 0; e < length[r]; ++e) row[next[*rank++]++] = static_cast<int32_t>(r);
    }
  }
  std::copy_n(begin, n, dense_end);
  std::vector<int32_t>& end = length;
  std::copy_n(begin, n, end.begin());
  for (int64_t i = 0; i < ranks.active; ++i) {
    for (int32_t e = feature_begin[i]; e < feature_begin[i + 1]; ++e) {
      const int32_t at = end[row[e]]++;
      entries[at] = static_cast<int32_t>(i);
      place[e] = at;
    }
    if (i + 1 == ranks.dense) std::copy_n(end.begin(), n, dense_end);
  }
  return out;
}

// Ranks and lists of counted rows where they are the faster form, else two empty tensors.
std::tuple<Tensor, Tensor> pair_lists(Tensor words, Tensor counts, int64_t n_rows, double list_cost,
                                      bool all_rows) {
  const auto none = [&] {
    return std::make_tuple(new_empty(ScalarType::Int, 0), new_empty(ScalarType::Int, 0));
  };
  Tensor ranks_tensor = rank_features(counts, n_rows, list_cost);
  const Ranks ranks(ranks_tensor, counts.numel());
  if (!may_be_listed(ranks, n_rows, list_cost)) return none();
  Tensor lists = list_rows(words, ranks_tensor, counts.numel());
  const RowLists view(lists, ranks.active);
  if (!is_listed(view, ranks, n_rows, list_cost, all_rows)) return none();
  return {ranks_tensor, lists};
}

Tensor dense_words(const RowLists& lists, const Ranks& ranks) {
  const int64_t w = n_words(ranks.dense);
  Tensor out = new_zeros(ScalarType::Int, lists.rows, w);
  uint32_t* const words = mutable_data<uint32_t>(out);
  for (int64_t r = 0; r < lists.rows; ++r) {
    for (int32_t e = lists.begin[r]; e < lists.dense_end[r]; ++e) {
      words[r * w + lists.entries[e] / kWordBits] |= 1u << lists.entries[e] % kWordBits;
    }
  }
  return out;
}

Tensor dense_counts(const Ranks& ranks) {
  Tensor out = new_empty(ScalarType::Long, ranks.dense);
  std::copy_n(ranks.ones, ranks.dense, mutable_data<int64_t>(out));
  return out;
}

// Sum of |V| from lists. Sums wrap at 2^64: only the result must fit.
Tensor listed_covariance(Tensor ranks_tensor, Tensor lists_tensor, int64_t n_features,
                         int64_t n_rows) {
  const Ranks ranks(ranks_tensor, n_features);
  const RowLists lists(lists_tensor, ranks.active);
  const auto without_pairs = [&](int64_t features) {  // (sum n)^2 - sum n^2
    uint64_t ones = 0, squares = 0;
    for (int64_t i = 0; i < features; ++i) {
      const uint64_t n = static_cast<uint64_t>(ranks.ones[i]);
      ones += n;
      squares += n * n;
    }
    return ones * ones - squares;
  };
  uint64_t total = without_pairs(ranks.active) - without_pairs(ranks.dense);
  if (ranks.dense > 0) {
    const Tensor words = dense_words(lists, ranks);
    const auto [part, none] = covariance(words, dense_counts(ranks), n_rows, false);
    total += static_cast<uint64_t>(*data<int64_t>(part));
  }
  struct Memory {
    std::vector<int32_t> pairs, touched;
    std::vector<Partner> partners;
  };
  const auto make = [&] {
    Memory own{std::vector<int32_t>(ranks.active, 0), std::vector<int32_t>(ranks.active + 1),
               std::vector<Partner>(ranks.active)};
    for (int64_t j = 0; j < ranks.active; ++j) own.partners[j] = {-1, ranks.ones[j]};
    return own;
  };
  const int64_t groups = (ranks.active - ranks.dense + kRanksAtOnce - 1) / kRanksAtOnce;
  std::atomic<uint64_t> counted{0};
  by_turns(groups, make, [&](Memory& own, int64_t g) {
    const int64_t first = ranks.dense + g * kRanksAtOnce;
    uint64_t sum = 0;
    for (int64_t i = first; i < std::min(ranks.active, first + kRanksAtOnce); ++i) {
      sum += pairs_before(ranks, lists, i, n_rows, own.pairs.data(), own.touched.data(),
                          own.partners.data());
    }
    counted += sum;
  });
  Tensor numerator = new_empty(ScalarType::Long);
  *mutable_data<int64_t>(numerator) = static_cast<int64_t>(total + 2 * counted);
  return numerator;
}

// ---- signs --------------------------------------------------------------------------------------

ListedSigns::ListedSigns(const Tensor& ranks_tensor, const Tensor& counted_tensor,
                         const Tensor& at_hand_tensor, int64_t n_features, int64_t total_rows)
    : ranks(ranks_tensor, n_features),
      counted(counted_tensor, ranks.active),
      at_hand(at_hand_tensor, ranks.active),
      n_rows(total_rows),
      ones_of_rare(0) {
  for (int64_t i = ranks.dense; i < ranks.active; ++i) ones_of_rare += ranks.ones[i];
  ones_of_row.resize(counted.rows);
  parallel_for(0, counted.rows, 1 << 10, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      int64_t sum = 0;
      for (int32_t p = counted.dense_end[r]; p < counted.begin[r + 1]; ++p) {
        sum += ranks.ones[counted.entries[p]];
      }
      ones_of_row[r] = sum;
    }
  });
  if (ranks.dense == 0) return;
  bits = dense_words(at_hand, ranks);
  const Tensor words = dense_words(counted, ranks);
  planes = std::get<1>(covariance(words, dense_counts(ranks), n_rows, true));
}

SignRow::SignRow(const ListedSigns& source)
    : source_(source),
      pairs_(source.ranks.active, 0),
      counted_(source.ranks.active + 1),
      again_(2 * source.ranks.active + 1),
      above_(source.ranks.active, 0),
      zeros_of_row_(source.at_hand.rows, 0),
      signs_(2 * n_words(source.ranks.dense)) {}

void SignRow::count_zeros(int32_t change) {
  const RowLists& rows = source_.at_hand;
  for (const int32_t j : zeros_) {
    for (int32_t e = rows.feature_begin[j]; e < rows.feature_begin[j + 1]; ++e) {
      zeros_of_row_[rows.row[e]] += change;
    }
  }
}

void SignRow::make(int64_t feature) {
  const Ranks& ranks = source_.ranks;
  const RowLists& lists = source_.counted;
  const int64_t dense = ranks.dense, w = n_words(dense);
  // pointers of their own: a store of a byte may change any member
  int32_t *const pairs = pairs_.data(), *const counted = counted_.data();
  int32_t* const again = again_.data();
  uint8_t* const above = above_.data();
  count_zeros(-1);
  zeros_.clear();
  counts_signs_ = 0;
  rank_ = ranks.of[feature];
  if (rank_ < 0) return;
  // two stamps a feature: all() has the second
  constexpr int kStamps = 2, kLast = UINT8_MAX - kStamps + 1;
  if (stamp_ == kLast) {
    std::fill(above_.begin(), above_.end(), 0);
    stamp_ = 0;
  }
  stamp_ += kStamps;
  const uint8_t stamp = static_cast<uint8_t>(stamp_);

  const bool rare = rank_ >= dense;
  // from this rank on, S = 1 where n_ij > 0: nothing is counted
  const int64_t positive = first_above(ranks, dense, ranks.ones[rank_], source_.n_rows);
  const int32_t *const entries = lists.entries, *const ones = ranks.ones;
  const int32_t *const begin = lists.begin, *const row = lists.row;
  const int32_t* const first_entry = rare ? begin : lists.dense_end;
  // the ones of all that is visited are known by row: those of what was met before come off again,
  // so that the counts of most features are not looked up
  int64_t used = 0, met_again = 0, visited_ones = 0;
  const auto take_off = [&] {
    for (int64_t t = 0; t < met_again; ++t) visited_ones -= ones[again[t]];
    met_again = 0;
  };
  const int32_t to = lists.feature_begin[rank_ + 1];
  for (int32_t e = lists.feature_begin[rank_]; e < to; ++e) {
    if (e + kAhead < to) prefetch_row(entries + first_entry[row[e + kAhead]]);
    const int32_t r = row[e], end = begin[r + 1];
    visited_ones += source_.ones_of_row[r];
    int32_t p = first_entry[r];
    for (; p < end && entries[p] < positive; ++p) {
      const int32_t j = entries[p];
      counted[used] = j;
      used += pairs[j]++ == 0;
    }
#pragma GCC unroll 4
    for (; p < end; ++p) {
      const int32_t j = entries[p];
      again[met_again] = j;
      met_again += above[j] >= stamp;
      above[j] = stamp;
    }
    if (met_again > ranks.active) take_off();
  }
  take_off();
  const int64_t n = source_.n_rows, n_i = ranks.ones[rank_];
  const auto sign = [&](int64_t j) {
    const int64_t v = n * pairs_[j] - n_i * ranks.ones[j];
    return (v > 0) - (v < 0);
  };
  int64_t sum = -source_.ones_of_rare;
  if (dense > 0 && rare) {
    planes_[0] = signs_.data();
    planes_[1] = signs_.data() + w;
    std::fill(signs_.begin(), signs_.end(), 0);
    for (int64_t j = 0; j < dense; ++j) {
      const int s = sign(j);
      sum += s * ranks.ones[j];
      if (s != 0) signs_[(s > 0 ? 0 : w) + j / kWordBits] |= 1u << j % kWordBits;
    }
  } else if (dense > 0) {
    planes_[0] = data<uint32_t>(*source_.planes) + rank_ * w;
    planes_[1] = planes_[0] + dense * w;
    for (int64_t j = 0; j < dense; ++j) {
      const int64_t at = j / kWordBits, bit = j % kWordBits;
      sum += ranks.ones[j] * (static_cast<int64_t>(planes_[0][at] >> bit & 1) -
                              static_cast<int64_t>(planes_[1][at] >> bit & 1));
    }
  }
  for (int64_t t = 0; t < used; ++t) {
    const int32_t j = counted[t];
    if (j >= dense) {
      visited_ones -= pairs[j] * static_cast<int64_t>(ones[j]);
      const int s = sign(j);
      sum += (s + 1) * static_cast<int64_t>(ones[j]);
      if (s > 0) above[j] = stamp;
      if (s == 0) zeros_.push_back(j);
    }
    pairs[j] = 0;
  }
  sum += 2 * visited_ones;
  // V_ii > 0, but S_ii = 0
  if (rare) {
    sum -= n_i;
    above[rank_] = 0;
    zeros_.push_back(rank_);
  }
  count_zeros(1);
  counts_signs_ = static_cast<double>(sum);
}

void SignRow::add_dense(int64_t first, const uint16_t* index, int64_t count, int32_t* out) const {
  if (rank_ < 0 || source_.ranks.dense == 0 || count == 0) return;
  SignCounts s{};
  s.words = n_words(source_.ranks.dense);
  s.rows_stride = s.words;
  s.rows = data<uint32_t>(*source_.bits) + first * s.words;
  s.index = index;
  s.count = count;
  s.above = planes_[0];
  s.below = planes_[1];
  s.out = out;
  kernels().sign_counts(s);
}

void SignRow::listed(const int32_t* row, int64_t count, int32_t* out) const {
  if (rank_ < 0) {
    std::fill_n(out, count, 0);
    return;
  }
  const RowLists& rows = source_.at_hand;
  const int32_t *const begin = rows.begin, *const dense_end = rows.dense_end;
  const int32_t* const entries = rows.entries;
  const uint8_t* const above = above_.data();
  const uint8_t stamp = static_cast<uint8_t>(stamp_);
  for (int64_t e = 0; e < count; ++e) {
    if (e + kAhead < count) prefetch_row(entries + dense_end[row[e + kAhead]]);
    const int32_t *p = entries + dense_end[row[e]], *const to = entries + begin[row[e] + 1];
    const int32_t length = static_cast<int32_t>(to - p);
    int32_t below = 0, other = 0;
#pragma GCC unroll 4
    for (; to - p > 1; p += 2) {
      below += above[p[0]] < stamp;
      other += above[p[1]] < stamp;
    }
    if (p < to) below += above[*p] < stamp;
    out[e] = length - 2 * (below + other) + zeros_of_row_[row[e]];
  }
}

// Row by row, or feature by feature that is on together with this one: whichever visits less.
void SignRow::all(int32_t* out) {
  const RowLists &rows = source_.at_hand, &counted = source_.counted;
  if (rank_ < 0) {
    std::fill_n(out, rows.rows, 0);
    return;
  }
  // each feature with S = 1 once: the second stamp is for those that were met
  const uint8_t stamp = static_cast<uint8_t>(stamp_);
  int32_t* const above = counted_.data();
  int64_t n_above = 0, of_partners = 0;
  for (int32_t e = counted.feature_begin[rank_]; e < counted.feature_begin[rank_ + 1]; ++e) {
    const int32_t r = counted.row[e];
    for (int32_t p = counted.dense_end[r]; p < counted.begin[r + 1]; ++p) {
      const int32_t j = counted.entries[p];
      if (above_[j] != stamp) continue;
      above_[j] = stamp + 1;
      above[n_above++] = j;
      of_partners += rows.feature_begin[j + 1] - rows.feature_begin[j];
    }
  }
  const bool by_row = of_partners >= rows.total - rows.feature_begin[source_.ranks.dense];
  for (int64_t r = 0; r < rows.rows; ++r) {
    int32_t sum = rows.dense_end[r] - rows.begin[r + 1] + zeros_of_row_[r];
    for (int32_t p = rows.dense_end[r]; by_row && p < rows.begin[r + 1]; ++p) {
      sum += above_[rows.entries[p]] >= stamp ? 2 : 0;
    }
    out[r] = sum;
  }
  for (int64_t t = 0; !by_row && t < n_above; ++t) {
    for (int32_t e = rows.feature_begin[above[t]]; e < rows.feature_begin[above[t] + 1]; ++e) {
      out[rows.row[e]] += 2;
    }
  }
  add_dense(0, nullptr, rows.rows, out);
}

}  // namespace bae_fast
