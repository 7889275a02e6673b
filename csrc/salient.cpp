// The most salient features of packed rows: the first k entries of a sorted table that hold.
#include <cstring>

#include "operators.h"

namespace bae_fast {
namespace {

inline bool bit(const uint32_t* row, int32_t column) {
  return row[column / kWordBits] >> (column % kWordBits) & 1;
}

// Entries looked at from the head of the table until k hold.
int64_t scan(const uint32_t* row, const int32_t* order, int64_t m, int64_t k, int32_t* out) {
  int64_t found = 0, i = 0;
  for (; i < m && found < k; ++i) {
    if (bit(row, order[i] >> 1) == (order[i] & 1)) out[found++] = static_cast<int32_t>(i);
  }
  std::fill(out + found, out + k, static_cast<int32_t>(m));
  return i;
}

// The table by column: where the entry of a bit that is on stands, and those of bits that are off.
struct Table {
  std::vector<int32_t> place_on, off_place, off_column;
  int32_t none;

  Table(const int32_t* order, int64_t m, int64_t columns)
      : place_on(columns, static_cast<int32_t>(m)), none(static_cast<int32_t>(m)) {
    for (int64_t i = 0; i < m; ++i) {
      if (order[i] & 1) {
        place_on[order[i] >> 1] = static_cast<int32_t>(i);
      } else {
        off_place.push_back(static_cast<int32_t>(i));
        off_column.push_back(order[i] >> 1);
      }
    }
  }
};

inline void insert(int32_t* places, int64_t k, int32_t place) {
  if (place >= places[k - 1]) return;
  int64_t i = k - 1;
  for (; i > 0 && places[i - 1] > place; --i) places[i] = places[i - 1];
  places[i] = place;
}

// The k lowest places of set bits, those of `mask` alone where there is one.
template <bool masked>
void look_up(const uint32_t* row, const uint32_t* mask, int64_t w, const Table& table, int64_t k,
             int32_t* out) {
  std::fill(out, out + k, table.none);
  for (int64_t j = 0; j < w; j += 2) {
    uint64_t pair = row[j], kept = masked ? mask[j] : 0;
    if (j + 1 < w) {
      std::memcpy(&pair, row + j, sizeof pair);
      if (masked) std::memcpy(&kept, mask + j, sizeof kept);
    }
    if (masked) pair &= kept;
    const int32_t* places = table.place_on.data() + j * kWordBits;
    for (; pair; pair &= pair - 1) insert(out, k, places[__builtin_ctzll(pair)]);
  }
}

}  // namespace

// Places in `order`, int32 [m] of entries 2 column + bit, of the first k that hold in each row:
// int32 [N, k], rising, m where there are fewer.
//
// Two ways to the same places. Of codes that are half on, a few entries from the head of the table
// are enough. Of sparse ones the head holds rare bits, so the set bits of a row are looked up:
// those of columns that stand high enough in the table to be among the k first of some row of a
// sample, and all where these are fewer than k. Entries of bits that are off follow in their order,
// up to the worst place found. The sample also tells which way is shorter.
Tensor salient(Tensor words, Tensor order, int64_t n_columns, int64_t k) {
  const int64_t n = words.size(0), w = words.size(1), stride = row_stride(words);
  const int64_t m = order.numel();
  Tensor out = new_empty(ScalarType::Int, n, k);
  const uint32_t* in = data<uint32_t>(words);
  const int32_t* entries = data<int32_t>(order);
  int32_t* to = mutable_data<int32_t>(out);
  const Table table(entries, m, w * kWordBits);
  const int64_t n_off = table.off_place.size();

  constexpr int64_t kSample = 64;
  const int64_t sampled = std::min(n, kSample);
  int64_t scanned = 0, ones = 0;
  int32_t reach = 0;
  std::vector<int32_t> found(k);
  for (int64_t i = 0; i < sampled; ++i) {
    const uint32_t* row = in + i * (n / sampled) * stride;
    scanned += scan(row, entries, m, k, found.data());
    for (int64_t j = 0; j < w; ++j) ones += __builtin_popcount(row[j]);
    look_up<false>(row, nullptr, w, table, k, found.data());
    reach = std::max(reach, found[k - 1]);
  }
  const bool by_head = scanned <= sampled * w / 8 + ones / 16;
  std::vector<uint32_t> mask(w, 0);
  for (int64_t column = 0; column < n_columns; ++column) {
    if (table.place_on[column] <= reach) mask[column / kWordBits] |= 1u << (column % kWordBits);
  }

  parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t* row = in + i * stride;
      int32_t* places = to + i * k;
      if (by_head) {
        scan(row, entries, m, k, places);
        continue;
      }
      look_up<true>(row, mask.data(), w, table, k, places);
      if (places[k - 1] == table.none) look_up<false>(row, nullptr, w, table, k, places);
      for (int64_t j = 0; j < n_off && table.off_place[j] < places[k - 1]; ++j) {
        if (!bit(row, table.off_column[j])) insert(places, k, table.off_place[j]);
      }
    }
  });
  return out;
}

// Numbers below n_groups brought together: offsets int64 [n_groups + 1] and the indices of each
// group, rising, int64. Other numbers are left out.
std::tuple<Tensor, Tensor> grouped(Tensor numbers, int64_t n_groups) {
  const int64_t n = numbers.numel();
  Tensor offsets = new_zeros(ScalarType::Long, n_groups + 1);
  const int32_t* in = data<int32_t>(numbers);
  int64_t* first = mutable_data<int64_t>(offsets);
  const auto counted = [&](int32_t number) { return 0 <= number && number < n_groups; };
  for (int64_t i = 0; i < n; ++i) {
    if (counted(in[i])) ++first[in[i] + 1];
  }
  for (int64_t g = 0; g < n_groups; ++g) first[g + 1] += first[g];
  Tensor indices = new_empty(ScalarType::Long, first[n_groups]);
  int64_t* out = mutable_data<int64_t>(indices);
  // a range of groups a thread: each reads all numbers, and none writes where another does
  parallel_for(0, n_groups,
               (n_groups + get_num_threads() - 1) / std::max<int64_t>(get_num_threads(), 1),
               [&](int64_t begin, int64_t end) {
                 std::vector<int64_t> next(first + begin, first + end);
                 for (int64_t i = 0; i < n; ++i) {
                   if (begin <= in[i] && in[i] < end) out[next[in[i] - begin]++] = i;
                 }
               });
  return {offsets, indices};
}

}  // namespace bae_fast
