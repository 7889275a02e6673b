// The signs of V, as backward bodies ask for them: strips of columns, stored or computed again; or
// rows of lists.
#pragma once

#include <memory>
#include <vector>

#include "pair_lists.h"

namespace bae_fast {

// Rows and columns of V that are taken at once.
constexpr int64_t kTile = 512;

inline std::vector<int32_t> padded_counts(const Tensor& counts, int64_t stride) {
  std::vector<int32_t> out(stride, 0);
  std::copy_n(data<int64_t>(counts), counts.numel(), out.begin());
  return out;
}

struct SignSource {
  const uint32_t* planes[2];  // stored, [K, words]; or null
  const uint32_t* columns;    // column-packed statistics, to compute the signs again
  int64_t stride;
  int64_t rows_words;
  const std::vector<int32_t>* counts;
  int64_t n_rows;
  int64_t k;
  const ListedSigns* lists = nullptr;  // in place of planes and columns

  int64_t words() const { return n_words(k); }

  // Row-packed sign planes of columns first .. first + used and the distance of their rows.
  int64_t strip(int64_t first, int64_t used, std::vector<uint32_t>& memory, uint8_t* scratch,
                const uint32_t** out) const {
    if (planes[0] != nullptr) {
      out[0] = planes[0] + first * words();
      out[1] = planes[1] + first * words();
      return words();
    }
    const int64_t stride_out = round_up(k, kStrip) / kWordBits;
    memory.resize(2 * kMaxStrip * stride_out);
    CovarianceTile tile{};
    tile.columns = columns;
    tile.stride = stride;
    tile.words = rows_words;
    tile.counts = counts->data();
    tile.n_rows = n_rows;
    // a strip may start in the middle of 64 columns: its last rows must not pass the padding
    tile.i0 = first, tile.i1 = std::min(first + round_up(used, kStrip), round_up(k, kStrip));
    tile.planes_stride = stride_out;
    tile.scratch = scratch;
    for (tile.j0 = 0; tile.j0 < k; tile.j0 = tile.j1) {
      tile.j1 = std::min(tile.j0 + kTile, round_up(k, kStrip));
      tile.above = memory.data() + tile.j0 / kWordBits;
      tile.below = tile.above + kMaxStrip * stride_out;
      kernels().covariance_tile(tile);
      tile.same_rows = true;
    }
    tile.above = memory.data(), tile.below = tile.above + kMaxStrip * stride_out;
    for (int64_t i = first; i < first + used; ++i) {
      tile.above[(i - first) * stride_out + i / kWordBits] &= ~(1u << i % kWordBits);
    }
    out[0] = tile.above;
    out[1] = tile.below;
    return stride_out;
  }
};

// The statistics of a covariance: stored signs, or what makes them again. `lists`: ranks, lists of
// the rows counted and of the rows at hand.
struct Statistics {
  SignSource source{};
  std::vector<int32_t> ones;
  std::unique_ptr<ListedSigns> listed;

  Statistics(const std::optional<Tensor>& signs, const std::optional<Tensor>& columns,
             const std::optional<Tensor>* lists, const Tensor& counts, int64_t n_rows) {
    source.k = counts.numel();
    source.n_rows = n_rows;
    if (lists[0].has_value()) {
      listed =
          std::make_unique<ListedSigns>(*lists[0], *lists[1], *lists[2], counts.numel(), n_rows);
      source.lists = listed.get();
    } else if (signs.has_value()) {
      check(signs->numel() == 2 * source.k * source.words(), "signs must hold planes [2, ",
            source.k, ", ", source.words(), "]; got ", signs->numel(), " numbers");
      source.planes[0] = data<uint32_t>(*signs);
      source.planes[1] = source.planes[0] + source.k * source.words();
    } else if (columns.has_value()) {
      source.columns = data<uint32_t>(*columns);
      source.stride = row_stride(*columns);
      source.rows_words = columns->size(0);
      ones = padded_counts(counts, source.stride);
      source.counts = &ones;
    }
  }
};

}  // namespace bae_fast
