// Sum of |V| and its signs, V_ij = N n_ij - n_i n_j.
//
// The upper triangle is taken by square tiles of kTile features, by turns. Sums of |V| are
// integers: their order does not matter. The signs of a tile are written twice, as they are and
// transposed.
#include <utility>

#include "operators.h"
#include "signs.h"

namespace bae_fast {
namespace {

constexpr int64_t kTileWords = kTile / kWordBits;

// Copies rows of a tile's signs, almost always whole cache lines, to a plane whose rows are far
// apart: without the prefetch every line is waited for.
void copy_signs(const uint32_t* from, int64_t rows, int64_t words, uint32_t* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += kTileWords, to += stride) {
    __builtin_prefetch(to + 16 * stride, 1);
    if (words == kTileWords) {
      __builtin_memcpy(to, from, kTileWords * sizeof(uint32_t));
    } else {
      std::copy_n(from, words, to);
    }
  }
}

// Completes one plane of a tile on the diagonal, of which j > i is there: a symmetric matrix with
// nothing on its diagonal.
void mirror_tile(uint32_t* plane, int64_t rows) {
  for (int64_t i = 0; i < rows; i += kWordBits) {
    const int64_t here = std::min(rows - i, kWordBits), after = i + kWordBits;
    uint32_t* const block = plane + i * kTileWords + i / kWordBits;
    uint32_t turned[kWordBits];
    for (int64_t r = 0; r < here; ++r) block[r * kTileWords] &= ~0u << r << 1;
    kernels().transpose(block, kTileWords, here, here, turned, 1);
    for (int64_t r = 0; r < here; ++r) block[r * kTileWords] |= turned[r];
    if (after < rows) {
      kernels().transpose(block + 1, kTileWords, kWordBits, rows - after,
                          plane + after * kTileWords + i / kWordBits, kTileWords);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> covariance(Tensor words, Tensor counts, int64_t n_rows,
                                      bool keep_signs) {
  const int64_t k = counts.numel(), w = n_words(k);
  Tensor columns = rows_to_columns(words, k);
  Tensor numerator = new_zeros(ScalarType::Long);
  Tensor signs = keep_signs ? new_empty(ScalarType::Int, 2, k, w) : new_empty(ScalarType::Int, 0);
  if (keep_signs) prefer_large_pages(signs);
  const int64_t stride = row_stride(columns);
  const std::vector<int32_t> ones = padded_counts(counts, stride);
  uint32_t* const planes[2] = {
      keep_signs ? mutable_data<uint32_t>(signs) : nullptr,
      keep_signs ? mutable_data<uint32_t>(signs) + k * w : nullptr,
  };

  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t i = 0; i < k; i += kTile) {
    for (int64_t j = i; j < k; j += kTile) tiles.emplace_back(i, j);
  }
  struct Memory {
    std::vector<uint32_t> signs;
    Scratch scratch;
    int64_t i_before;
  };
  const auto make = [&] {
    return Memory{std::vector<uint32_t>(keep_signs ? 3 * kTile * kTileWords : 0),
                  Scratch(kernels().covariance_scratch), -1};
  };
  std::atomic<int64_t> total{0};
  by_turns(static_cast<int64_t>(tiles.size()), make, [&](Memory& own, int64_t t) {
    uint32_t* const parts[2] = {own.signs.data(), own.signs.data() + kTile * kTileWords};
    uint32_t* const mirror = own.signs.data() + 2 * kTile * kTileWords;
    const auto [i0, j0] = tiles[t];
    const int64_t i1 = std::min(i0 + kTile, round_up(k, kStrip));
    const int64_t j1 = std::min(j0 + kTile, round_up(k, kStrip));
    CovarianceTile tile{};
    tile.columns = data<uint32_t>(columns);
    tile.stride = stride;
    tile.words = columns.size(0);
    tile.counts = ones.data();
    tile.n_rows = n_rows;
    tile.i0 = i0, tile.i1 = i1, tile.j0 = j0, tile.j1 = j1;
    tile.above = keep_signs ? parts[0] : nullptr;
    tile.below = keep_signs ? parts[1] : nullptr;
    tile.planes_stride = kTileWords;
    tile.scratch = own.scratch.get();
    tile.same_rows = i0 == own.i_before;
    tile.upper = i0 == j0;
    own.i_before = i0;
    const int64_t sum = kernels().covariance_tile(tile);
    total += 2 * sum;
    if (!keep_signs) return;
    const int64_t rows = std::min(i1, k) - i0, across = std::min(j1, k) - j0;
    for (int p = 0; p < 2; ++p) {
      if (i0 == j0) mirror_tile(parts[p], rows);
      copy_signs(parts[p], rows, n_words(across), planes[p] + i0 * w + j0 / kWordBits, w);
      if (i0 == j0) continue;
      for (int64_t r = 0; r < rows; r += kWordBits) {
        kernels().transpose(parts[p] + r * kTileWords, kTileWords, std::min(rows - r, kWordBits),
                            across, mirror + r / kWordBits, kTileWords);
      }
      copy_signs(mirror, across, n_words(rows), planes[p] + j0 * w + i0 / kWordBits, w);
    }
  });
  *mutable_data<int64_t>(numerator) = total;
  return {numerator, signs};
}

}  // namespace bae_fast
