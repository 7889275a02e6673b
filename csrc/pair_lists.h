// Codes as lists: what the covariance of sparse codes is counted from. Pairs of features that are
// never on together are known without counting: n_ij = 0 gives V_ij = -n_i n_j.
//
// Features are ranked by falling counts and named by their ranks. Constant ones, whose V is zero,
// have none. The first `dense` of them are on so often that bits count their pairs faster, where a
// row has enough of them; else `dense` is zero.
#pragma once

#include <vector>

#include "tensors.h"

namespace bae_fast {

// The ranks of features, in one int32 tensor: its head, then the arrays.
struct Ranks {
  int64_t k, active, dense;
  const int32_t* of;       // [k]: rank, or -1
  const int32_t* feature;  // [active]
  const int32_t* ones;     // [active], counts by rank

  static constexpr int64_t kHead = 2;

  explicit Ranks(const Tensor& tensor, int64_t n_features)
      : k(n_features),
        active(data<int32_t>(tensor)[0]),
        dense(data<int32_t>(tensor)[1]),
        of(data<int32_t>(tensor) + kHead),
        feature(of + k),
        ones(feature + active) {}
};

// Rows as rising lists of ranks, and features as lists of rows, in one int32 tensor: its head, then
// the arrays.
struct RowLists {
  int64_t rows, total;
  const int32_t* begin;          // [rows + 1], of a row in `entries`
  const int32_t* dense_end;      // [rows]: ranks of dense features end there
  const int32_t* entries;        // [total]: ranks
  const int32_t* feature_begin;  // [active + 1], of a rank in `row` and `place`
  const int32_t* row;            // [total]
  const int32_t* place;          // [total]: where the rank stands in `entries`

  static constexpr int64_t kHead = 2;

  RowLists(const Tensor& tensor, int64_t active)
      : rows(data<int32_t>(tensor)[0]),
        total(data<int32_t>(tensor)[1]),
        begin(data<int32_t>(tensor) + kHead),
        dense_end(begin + rows + 1),
        entries(dense_end + rows),
        feature_begin(entries + total),
        row(feature_begin + active + 1),
        place(row + total) {}
};

// pair_lists.cpp

// Bits of the dense features, row-packed by rank.
Tensor dense_words(const RowLists& lists, const Ranks& ranks);

// Counts of the dense features, int64.
Tensor dense_counts(const Ranks& ranks);

// The covariance's rows of signs from lists, for backward bodies; shared by threads.
class ListedSigns {
 public:
  ListedSigns(const Tensor& ranks, const Tensor& counted, const Tensor& at_hand, int64_t n_features,
              int64_t n_rows);

  const Ranks ranks;
  const RowLists counted;            // rows that the signs are of
  const RowLists at_hand;            // rows that the products are of
  const int64_t n_rows;              // N of the statistics
  int64_t ones_of_rare;              // summed over features that are not dense
  std::vector<int64_t> ones_of_row;  // the same over those that are on in a row that is counted
  // row-packed bits of dense features in the rows at hand, and the signs of their pairs
  std::optional<Tensor> bits, planes;
};

// One thread's row of S: made for a feature, then multiplied with rows of bits.
class SignRow {
 public:
  explicit SignRow(const ListedSigns& source);

  void make(int64_t feature);

  // n^T S of the feature.
  double counts_signs() const { return counts_signs_; }

  // out[e] = (B S) of row[e] over features that are not dense.
  void listed(const int32_t* row, int64_t count, int32_t* out) const;

  // Adds that over dense features, of row first + index[e], or first + e without index.
  void add_dense(int64_t first, const uint16_t* index, int64_t count, int32_t* out) const;

  // out[row] = (B S) of every row at hand.
  void all(int32_t* out);

 private:
  // What zeros_ holds is added to zeros_of_row_, or taken off.
  void count_zeros(int32_t change);

  const ListedSigns& source_;
  std::vector<int32_t> pairs_;    // n_ij by rank of j; zero between calls
  std::vector<int32_t> counted_;  // ranks j with n_ij > 0 that were counted
  std::vector<int32_t> again_;    // ranks j that were met before
  // By rank of j that is not dense: S_ij = 1 where it is stamp_ or more, else -1, or zero where
  // zeros_ has j. What features before left here is less.
  std::vector<uint8_t> above_;
  int stamp_ = 0;
  std::vector<int32_t> zeros_;
  std::vector<int32_t> zeros_of_row_;  // by row at hand
  std::vector<uint32_t> signs_;        // planes of dense j
  const uint32_t* planes_[2] = {nullptr, nullptr};
  int64_t rank_ = -1;
  double counts_signs_ = 0;
};

}  // namespace bae_fast
