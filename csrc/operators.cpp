// The operators: tensors to pointers, work to threads, on LibTorch's stable ABI.
//
// Schemas are defined in Python (bae_fast/backends/cpp/__init__.py). Every operator here is
// private and trusts its caller for shapes and dtypes: contiguous rows, words of 32 bits.
//
// Covariance. The upper triangle of V is taken by square tiles of kTile features; each thread
// takes the next tile that nobody has. Sums of |V| are integers: their order does not matter. The
// signs of a tile are written twice, as they are and transposed.
//
// Backward. A strip is 64 to 256 columns and all rows. Where no sign planes were stored, those of
// the strip are computed again. Scratch is per thread and at most a few strips of K bits.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "layout.h"

namespace bae_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 512;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

int64_t row_stride(const Tensor& tensor) { return tensor.stride(0); }

// Memory on a cache line, not set to anything.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(bytes > 0 ? static_cast<uint8_t*>(std::aligned_alloc(64, round_up(bytes, 64)))
                          : nullptr) {
    STD_TORCH_CHECK(bytes <= 0 || memory_ != nullptr, "no memory for ", bytes, " bytes of scratch");
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }
  uint8_t* get() const { return memory_; }

 private:
  uint8_t* memory_;
};

// A hint, for new memory about to be written whole: a page fault every 4 KiB of 64 MiB takes as long
// as a product.
void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLargePage = int64_t{1} << 21;
  const int64_t begin = round_up(reinterpret_cast<intptr_t>(memory), kLargePage);
  const int64_t end = (reinterpret_cast<intptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void prefer_large_pages(const Tensor& fresh) {
  prefer_large_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size());
}

// Memory of gradients of weights, kept for the next step where it was given back. Above 32 MiB the
// C library returns memory to the system at once, and the first touch of 64 MiB of new pages takes
// as long as a product. At most kKept blocks are kept: what the next step needs anyway.
class GradientPool {
 public:
  static GradientPool& instance() {
    static auto* const pool = new GradientPool;  // outlives every tensor
    return *pool;
  }

  float* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->second != bytes) continue;
      float* const found = it->first;
      kept_.erase(it);
      return found;
    }
    void* const made = std::aligned_alloc(64, round_up(bytes, 64));
    STD_TORCH_CHECK(made != nullptr, "no memory for a gradient of ", bytes, " bytes");
    prefer_large_pages(made, bytes);
    return static_cast<float*>(made);
  }

  void give_back(float* memory, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.emplace_back(memory, bytes);
    if (kept_.size() <= kKept) return;
    std::free(kept_.front().first);  // the oldest
    kept_.erase(kept_.begin());
  }

 private:
  static constexpr size_t kKept = 2;  // W_enc and W_dec of one layer
  std::mutex mutex_;
  std::vector<std::pair<float*, int64_t>> kept_;
};

// An fp32 [rows, columns] of whatever the memory held.
Tensor new_gradient(int64_t rows, int64_t columns) {
  const int64_t bytes = rows * columns * 4;
  float* const memory = GradientPool::instance().take(bytes);
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return torch::stable::from_blob(
      memory, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Float, [bytes](void* back) {
        GradientPool::instance().give_back(static_cast<float*>(back), bytes);
      });
}

// The width of strips, a multiple of kStrip up to `widest`, that leaves threads the least idle.
int64_t strip_width(int64_t columns, int64_t widest) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t best = kStrip, least = INT64_MAX;
  for (int64_t width = widest; width >= kStrip; width -= kStrip) {
    const int64_t strips = (columns + width - 1) / width;
    const int64_t time = (strips + threads - 1) / threads * std::min(width, columns);
    if (time < least) best = width, least = time;
  }
  return best;
}

// Column-packed words with a stride for kernels: whole strips of columns, and an odd number (5
// modulo 8) of cache lines, so that the words of one column do not share a set of the cache.
int64_t padded_stride(int64_t columns) {
  int64_t stride = round_up(columns, kStrip);
  while (stride / 16 % 8 != 5) stride += 16;
  return stride;
}

void transpose_rows(const uint32_t* words, int64_t stride, int64_t n, int64_t columns,
                    uint32_t* out, int64_t out_stride) {
  torch::stable::parallel_for(0, n_words(n), 8, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t first = m * kWordBits;
      uint32_t* to = out + m * out_stride;
      kernels().transpose(words + first * stride, stride, std::min(n - first, kWordBits), columns,
                          to, 1);
      std::fill(to + columns, to + out_stride, 0);
    }
  });
}

// ---- levels -------------------------------------------------------------------------------------

// Makes a level the one in use and returns it: -1 asks for the best, -3 for the one in use. Returns
// -2 where the CPU lacks it.
int64_t simd(int64_t level) {
  if (level == -3) level = static_cast<int64_t>(current_simd());
  if (level == -1) level = static_cast<int64_t>(best_simd());
  if (level < 0 || level > 4 || !has_simd(static_cast<Simd>(level))) return -2;
  set_simd(static_cast<Simd>(level));
  return level;
}

// ---- layouts ------------------------------------------------------------------------------------

// Row-packed [N, W] to column-packed [ceil(N/32), stride >= K], zero past column K.
Tensor rows_to_columns(Tensor words, int64_t n_columns) {
  const int64_t n = words.size(0), stride = padded_stride(n_columns);
  Tensor out = torch::stable::new_empty(words, {n_words(n), stride});
  transpose_rows(data<uint32_t>(words), row_stride(words), n, n_columns,
                 mutable_data<uint32_t>(out), stride);
  return out;
}

// Row-packed [N, W] to feature-packed without alignment, [K, ceil(N/32)].
Tensor rows_to_features(Tensor words, int64_t n_columns) {
  const int64_t n = words.size(0), m = n_words(n), stride = row_stride(words);
  Tensor out = torch::stable::new_empty(words, {n_columns, m});
  const uint32_t* in = data<uint32_t>(words);
  uint32_t* to = mutable_data<uint32_t>(out);
  constexpr int64_t kSpan = 512;
  torch::stable::parallel_for(0, (n_columns + kSpan - 1) / kSpan, 1,
                              [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kSpan; first < std::min(end * kSpan, n_columns); first += kSpan) {
      for (int64_t w = 0; w < m; ++w) {
        kernels().transpose(in + w * kWordBits * stride + first / kWordBits, stride,
                            std::min(n - w * kWordBits, kWordBits),
                            std::min(n_columns - first, kSpan), to + first * m + w, m);
      }
    }
  });
  return out;
}

// Ones in each column of row-packed words.
Tensor column_counts(Tensor words, int64_t n_columns) {
  const int64_t n = words.size(0), stride = row_stride(words);
  Tensor counts =
      torch::stable::new_zeros(words, {n_columns}, std::make_optional(ScalarType::Long));
  const uint32_t* in = data<uint32_t>(words);
  int64_t* out = mutable_data<int64_t>(counts);
  constexpr int64_t kSpan = 512;
  const int64_t spans = (n_columns + kSpan - 1) / kSpan;
  torch::stable::parallel_for(0, spans, 1, [&](int64_t begin, int64_t end) {
    uint32_t columns[kSpan];
    for (int64_t span = begin; span < end; ++span) {
      const int64_t first = span * kSpan, used = std::min(n_columns - first, kSpan);
      for (int64_t row = 0; row < n; row += kWordBits) {
        kernels().transpose(in + row * stride + first / kWordBits, stride,
                            std::min(n - row, kWordBits), used, columns, 1);
        kernels().column_counts(columns, kSpan, 1, used, out + first);
      }
    }
  });
  return counts;
}

// ---- encode -------------------------------------------------------------------------------------

// [pre > 0] and, unless window is empty, [|pre| < width] of columns start .. of the packed code.
void threshold(Tensor pre, std::optional<Tensor> keep, double width, int64_t start, Tensor words,
               Tensor window) {
  const int64_t n = pre.size(0), columns = pre.size(1), stride = row_stride(pre);
  const ScalarType dtype = pre.scalar_type();
  const bool* kept = data_or_null<bool>(keep);
  const bool windowed = window.numel() > 0;
  uint32_t* const bits = mutable_data<uint32_t>(words) + start / kWordBits;
  uint32_t* const inside =
      windowed ? mutable_data<uint32_t>(window) + start / kWordBits : nullptr;
  const int64_t bits_stride = row_stride(words);
  const int64_t inside_stride = windowed ? row_stride(window) : 0;
  const float narrow = static_cast<float>(width);
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, n, 1 + (1 << 15) / columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint32_t* to = bits + row * bits_stride;
      uint32_t* in = windowed ? inside + row * inside_stride : nullptr;
      if (kept != nullptr && !kept[row]) {
        std::fill(to, to + n_words(columns), 0);
        if (windowed) std::fill(in, in + n_words(columns), 0);
      } else if (dtype == ScalarType::Float) {
        k.threshold_f32(data<float>(pre) + row * stride, columns, narrow, to, in);
      } else if (dtype == ScalarType::Double) {
        k.threshold_f64(data<double>(pre) + row * stride, columns, width, to, in);
      } else {
        k.threshold_bf16(data<uint16_t>(pre) + row * stride, columns, narrow, to, in);
      }
    }
  });
}

// ---- covariance ---------------------------------------------------------------------------------

std::vector<int32_t> padded_counts(const Tensor& counts, int64_t stride) {
  std::vector<int32_t> out(stride, 0);
  std::copy_n(data<int64_t>(counts), counts.numel(), out.begin());
  return out;
}

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

std::tuple<Tensor, Tensor> covariance(Tensor words, Tensor counts, int64_t n_rows,
                                      bool keep_signs) {
  const int64_t k = counts.numel(), w = n_words(k);
  Tensor columns = rows_to_columns(words, k);
  Tensor numerator = torch::stable::new_zeros(counts, {});
  Tensor signs = keep_signs ? torch::stable::new_empty(words, {2, k, w})
                            : torch::stable::new_empty(words, {0});
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
  std::atomic<int64_t> total{0}, next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> signs_of_tile(keep_signs ? 3 * kTile * kTileWords : 0);
    uint32_t* const parts[2] = {signs_of_tile.data(), signs_of_tile.data() + kTile * kTileWords};
    uint32_t* const mirror = signs_of_tile.data() + 2 * kTile * kTileWords;
    Scratch scratch(kernels().covariance_scratch);
    int64_t i_before = -1;
    for (; begin < end; ++begin) {
      for (int64_t t = next++; t < static_cast<int64_t>(tiles.size()); t = next++) {
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
        tile.scratch = scratch.get();
        tile.same_rows = i0 == i_before;
        tile.upper = i0 == j0;
        i_before = i0;
        int64_t sum = kernels().covariance_tile(tile);
        if (i0 == j0) {  // V_ii = n_i (N - n_i) does not count
          for (int64_t i = i0; i < i1; ++i) {
            sum -= int64_t{ones[i]} * (n_rows - ones[i]);
            const int64_t at = (i - i0) * kTileWords + (i - i0) / kWordBits;
            if (keep_signs) parts[0][at] &= ~(1u << (i - i0) % kWordBits);
          }
        }
        total += i0 == j0 ? sum : 2 * sum;
        if (!keep_signs) continue;
        const int64_t rows = std::min(i1, k) - i0, across = std::min(j1, k) - j0;
        for (int p = 0; p < 2; ++p) {
          for (int64_t r = 0; i0 == j0 && r + kStrip < rows; r += kStrip) {
            const int64_t after = r + kStrip;  // the blocks right of the diagonal one, mirrored
            for (int64_t half = r; half < after; half += kWordBits) {
              kernels().transpose(parts[p] + half * kTileWords + after / kWordBits, kTileWords,
                                  kWordBits, across - after,
                                  parts[p] + after * kTileWords + half / kWordBits, kTileWords);
            }
          }
          copy_signs(parts[p], rows, n_words(across), planes[p] + i0 * w + j0 / kWordBits, w);
          if (i0 == j0) continue;
          for (int64_t r = 0; r < rows; r += kWordBits) {
            kernels().transpose(parts[p] + r * kTileWords, kTileWords,
                                std::min(rows - r, kWordBits), across, mirror + r / kWordBits,
                                kTileWords);
          }
          copy_signs(mirror, across, n_words(rows), planes[p] + j0 * w + i0 / kWordBits, w);
        }
      }
    }
  });
  *mutable_data<int64_t>(numerator) = total;
  return {numerator, signs};
}

// ---- backward of the encoder --------------------------------------------------------------------

struct SignSource {
  const uint32_t* planes[2];  // stored, [K, words]; or null
  const uint32_t* columns;    // column-packed statistics, to compute the signs again
  int64_t stride;
  int64_t rows_words;
  const std::vector<int32_t>* counts;
  int64_t n_rows;
  int64_t k;

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

// Everything of a backward but the gradient at the bits itself; tensors by column begin with the
// first column at hand, `start` of the code.
struct Backward {
  const Tensor& words;
  int64_t start;
  const std::optional<Tensor>& shift;
  const std::optional<Tensor>& curvature;
  const SignSource* signs;  // or null
  const std::optional<Tensor>& digits;
  double scale;
  const std::optional<Tensor>& window;
  const std::optional<Tensor>& factor;
  const std::optional<Tensor>& keep;
  bool official;
  const Tensor& column_sum;
};

// Runs the kernel on strips of `columns` columns. body(strip, at, run) of every thread's own body
// sets strip.g for columns at .. and calls run().
template <typename T, typename MakeBody>
void for_each_strip(const Backward& b, int64_t n, int64_t columns, int64_t widest,
                    void (*kernel)(const BackwardStrip<T>&), MakeBody make_body) {
  const int64_t width = strip_width(columns, widest);
  const int64_t strips = (columns + width - 1) / width;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> memory;
    Scratch scratch(b.signs == nullptr ? 0 : kernels().backward_scratch(b.signs->words()));
    Scratch tile_scratch(b.signs == nullptr || b.signs->planes[0] != nullptr
                             ? 0
                             : kernels().covariance_scratch);
    auto body = make_body();
    for (int64_t index = begin; index < end; ++index) {
      const int64_t at = index * width, column = b.start + at;
      BackwardStrip<T> s{};
      s.n = n;
      s.columns = std::min(columns - at, width);
      s.shift = b.shift.has_value() ? data<T>(*b.shift) + at : nullptr;
      s.curvature = b.curvature.has_value() ? data<T>(*b.curvature) + at : nullptr;
      s.rows = data<uint32_t>(b.words);
      s.rows_stride = s.bits_stride = row_stride(b.words);
      s.bits = s.rows + column / kWordBits;
      if (b.window.has_value()) {
        s.window = data<uint32_t>(*b.window) + column / kWordBits;
        s.window_stride = row_stride(*b.window);
      }
      if (b.factor.has_value()) {
        s.factor = data<T>(*b.factor) + at;
        s.factor_stride = row_stride(*b.factor);
      }
      s.official = b.official;
      s.keep = data_or_null<bool>(b.keep);
      s.column_sum = mutable_data<double>(b.column_sum) + at;
      body(s, at, [&] {
        if (b.signs != nullptr) {
          const uint32_t* planes[2];
          s.planes_stride =
              b.signs->strip(column, s.columns, memory, tile_scratch.get(), planes);
          s.above = planes[0];
          s.below = planes[1];
          s.scratch = scratch.get();
          s.sign_words = b.signs->words();
          s.digits = data<uint32_t>(*b.digits);
          s.n_digits = b.digits->size(0);
          s.n_rows = static_cast<double>(b.signs->n_rows);
          s.scale = b.scale;
        }
        kernel(s);
      });
    }
  });
}

// The statistics of a covariance: stored signs, or what makes them again.
struct Statistics {
  SignSource source{};
  std::vector<int32_t> ones;

  Statistics(const std::optional<Tensor>& signs, const std::optional<Tensor>& columns,
             const Tensor& counts, int64_t n_rows) {
    source.k = counts.numel();
    source.n_rows = n_rows;
    if (signs.has_value()) {
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

// g, the gradient at the bits from the reconstruction, becomes the gradient at pre; its column
// sums are added up in float64.
void backward(Tensor g, Tensor words, int64_t start, std::optional<Tensor> shift,
              std::optional<Tensor> curvature, bool covariance, std::optional<Tensor> signs,
              std::optional<Tensor> columns, Tensor counts, int64_t n_rows,
              std::optional<Tensor> digits, double scale, std::optional<Tensor> window,
              std::optional<Tensor> factor, std::optional<Tensor> keep, bool official,
              Tensor column_sum) {
  const Statistics statistics(signs, columns, counts, n_rows);
  const Backward b{words,  start,  shift, curvature, covariance ? &statistics.source : nullptr,
                   digits, scale,  window, factor,   keep, official, column_sum};
  const auto in_place = [&](auto element) {
    using T = decltype(element);
    return [&] {
      return [&](BackwardStrip<T>& s, int64_t at, auto run) {
        s.g = mutable_data<T>(g) + at;
        s.g_stride = row_stride(g);
        run();
      };
    };
  };
  if (g.scalar_type() == ScalarType::Double) {
    for_each_strip<double>(b, g.size(0), g.size(1), kernels().strip,
                           kernels().backward_strip_f64, in_place(double{}));
  } else {
    for_each_strip<float>(b, g.size(0), g.size(1), kernels().strip, kernels().backward_strip_f32,
                          in_place(float{}));
  }
}

// ---- backward of the encoder on listed entries --------------------------------------------------

constexpr int64_t kEntries = int64_t{1} << 21;  // listed at once, one tile of columns at least
constexpr int64_t kSignBlock = 256;             // words of a row: 512 KiB of a block of rows

template <typename T>
const SparseKernels<T>& sparse_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().sparse_f32;
  } else {
    return kernels().sparse_f64;
  }
}

// The rectangle's backward on the entries inside its window. A span of columns at a time: its
// entries are listed by column and, within, by blocks of kPanelRows rows; their gradient is
//
//     g_nj = G_n . W_dec_j + h_j + v_j (1 - 2 b_nj) + scale (N (B S)_nj - (n^T S)_j)
//
// Threads share the columns for g, db_enc and dW_enc, then the columns of x for dx, for which the
// entries are listed again, by row and within kPanelRows columns of W_enc.
template <typename T>
class SparseBackward {
 public:
  int64_t n, k;
  Tensor window;              // row-packed [n, words]
  const bool* keep;           // rows that count, or null
  const uint32_t* rows;       // row-packed bits
  int64_t rows_stride;
  const T* grad_recon = nullptr;  // [n, d_out], or null
  int64_t grad_recon_stride, d_out;
  const T* W_dec;  // [k, d_out]
  int64_t W_dec_stride;
  const T* shift;      // per column, or null
  const T* curvature;  // per column, or null
  const SignSource* signs;
  const uint32_t* digits;
  int64_t n_digits;
  double scale;
  const T* x;  // [n, d]
  int64_t x_stride, d;
  const T* W_enc;  // [d, k]
  int64_t W_enc_stride;
  T* grad_x;  // [n, d], added to; or null
  T* grad_W;  // [d, k], or null
  double* column_sum;

  void run() {
    blocks_ = (n + kPanelRows - 1) / kPanelRows;
    Tensor columns = rows_to_columns(window, k);
    columns_ = mutable_data<uint32_t>(columns);
    stride_ = row_stride(columns);
    if (keep != nullptr) drop_rows();
    if (grad_W != nullptr) prefer_large_pages(grad_W, d * k * sizeof(T));
    for (first_ = 0; first_ < k; first_ = last_) {
      count_span();
      const int64_t tiles = (last_ - first_ + kStrip - 1) / kStrip;
      torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        const int64_t to = std::min(end * kStrip, last_ - first_);
        Worker worker;
        list_columns(begin * kStrip, to);
        if (grad_recon != nullptr) dots(worker, begin * kStrip, to);
        finish(begin * kStrip, to);
        if (grad_W != nullptr) weight_gradient(worker, begin * kStrip, to);
      });
      if (grad_x != nullptr && begin_.back() > 0) input_gradient();
    }
  }

 private:
  static constexpr int64_t kWidth = kPanelBytes / sizeof(T);
  static constexpr int64_t kLine = 64 / sizeof(T);
  // transposed by lines: their distance must not be a power of two
  static constexpr int64_t kPitch = kWidth + kLine;

  // A thread's panel, and which block of which matrix it holds.
  struct Worker {
    Scratch panel{kPanelRows * kPanelBytes}, output{kPanelRows * kPitch * sizeof(T)};
    const T* held = nullptr;
    int64_t block = -1, column = -1;
  };

  int64_t blocks_;  // of rows
  uint32_t* columns_;
  int64_t stride_;
  int64_t first_, last_;         // the span
  std::vector<int64_t> begin_;   // of column j and block r: begin_[j blocks + r]
  std::vector<uint16_t> index_;  // row within its block
  std::vector<T> value_;

  int64_t begin_of(int64_t j) const { return begin_[j * blocks_]; }

  void drop_rows() {
    for (int64_t m = 0; m < n_words(n); ++m) {
      uint32_t kept = 0;
      for (int64_t row = m * kWordBits; row < std::min((m + 1) * kWordBits, n); ++row) {
        kept |= static_cast<uint32_t>(keep[row]) << row % kWordBits;
      }
      for (int64_t j = 0; j < k; ++j) columns_[m * stride_ + j] &= kept;
    }
  }

  // Tiles of columns from first_ while their entries fit; where each list begins.
  void count_span() {
    constexpr int64_t kWords = kPanelRows / kWordBits;
    begin_.assign(1, 0);
    for (last_ = first_; last_ < k; last_ = std::min(last_ + kStrip, k)) {
      const int64_t used = std::min(k - last_, kStrip), at = begin_.size();
      begin_.resize(at + used * blocks_, 0);
      for (int64_t r = 0; r < blocks_; ++r) {
        int64_t counts[kStrip] = {};
        kernels().column_counts(columns_ + r * kWords * stride_ + last_, stride_,
                                std::min(n_words(n) - r * kWords, kWords), used, counts);
        for (int64_t j = 0; j < used; ++j) begin_[at + j * blocks_ + r] = counts[j];
      }
      for (int64_t b = at; b < static_cast<int64_t>(begin_.size()); ++b) begin_[b] += begin_[b - 1];
      if (last_ > first_ && begin_.back() > kEntries) {
        begin_.resize(at);
        break;
      }
    }
    index_.resize(begin_.back());
    value_.assign(begin_.back(), 0);
  }

  void list_columns(int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j) {
      uint16_t* out = index_.data() + begin_of(j);
      for (int64_t m = 0; m < n_words(n); ++m) {
        const int64_t row = m * kWordBits % kPanelRows;
        for (uint32_t rest = columns_[m * stride_ + first_ + j]; rest != 0; rest &= rest - 1) {
          *out++ = static_cast<uint16_t>(row + __builtin_ctz(rest));
        }
      }
    }
  }

  // Columns from .. from + count of the span against one block of rows of a dense matrix, of which
  // the panel takes columns c .. c + kWidth.
  SparseLists<T> lists(Worker& w, int64_t from, int64_t count, const T* dense, int64_t stride,
                       int64_t width, int64_t block, int64_t c) const {
    T* const panel = reinterpret_cast<T*>(w.panel.get());
    const int64_t used = std::min(width - c, kWidth);
    if (w.held != dense || w.block != block || w.column != c) {
      w.held = dense, w.block = block, w.column = c;
      const int64_t top = block * kPanelRows, bottom = std::min(n, top + kPanelRows);
      for (int64_t row = top; row < bottom; ++row) {
        T* to = panel + (row - top) * kWidth;
        std::copy_n(dense + row * stride + c, used, to);
        std::fill(to + used, to + round_up(used, kLine), T{0});
      }
    }
    return {begin_.data() + from * blocks_ + block, blocks_, count, index_.data(), panel, kWidth,
            used};
  }

  // With several blocks of rows a panel serves so many columns that its copy does not count.
  int64_t group(int64_t from, int64_t to) const {
    return blocks_ == 1 ? to - from : std::min(to - from, kPanelRows);
  }

  void dots(Worker& w, int64_t from, int64_t to) {
    for (int64_t j = from, step = group(from, to); j < to; j += step) {
      const int64_t count = std::min(to - j, step);
      for (int64_t c = 0; c < d_out; c += kWidth) {
        for (int64_t r = 0; r < blocks_; ++r) {
          sparse_kernels<T>().dots(lists(w, j, count, grad_recon, grad_recon_stride, d_out, r, c),
                                   W_dec + (first_ + j) * W_dec_stride + c, W_dec_stride,
                                   value_.data());
        }
      }
    }
  }

  // What has no depth, and the sums of db_enc.
  void finish(int64_t from, int64_t to) {
    std::vector<uint32_t> planes_memory;
    std::vector<int32_t> products, digit_products;
    const bool computed = signs != nullptr && signs->planes[0] == nullptr;
    Scratch scratch(computed ? kernels().covariance_scratch : 0);
    for (int64_t j0 = from; j0 < to; j0 += kernels().strip) {
      const int64_t j1 = std::min(to, j0 + kernels().strip);
      if (signs != nullptr) {
        products.assign(begin_of(j1) - begin_of(j0), 0);
        digit_products.assign((j1 - j0) * n_digits, 0);
        if (!products.empty()) {
          const uint32_t* planes[2];
          const int64_t planes_stride =
              signs->strip(first_ + j0, j1 - j0, planes_memory, scratch.get(), planes);
          count_signs(j0, j1, planes, planes_stride, products.data(), digit_products.data());
        }
      }
      for (int64_t j = j0; j < j1; ++j) {
        const int64_t column = first_ + j;
        double counts_signs = 0, sum = 0;  // n^T S, an integer
        for (int64_t b = 0; signs != nullptr && b < n_digits; ++b) {
          counts_signs +=
              static_cast<double>(int64_t{1} << b) * digit_products[(j - j0) * n_digits + b];
        }
        for (int64_t r = 0; r < blocks_; ++r) {
          for (int64_t e = begin_[j * blocks_ + r]; e < begin_[j * blocks_ + r + 1]; ++e) {
            T g = value_[e];
            if (shift != nullptr) g += shift[column];
            if (curvature != nullptr) {
              const uint32_t* row = rows + (r * kPanelRows + index_[e]) * rows_stride;
              const bool bit = (row[column / kWordBits] >> column % kWordBits & 1) != 0;
              g += bit ? -curvature[column] : curvature[column];
            }
            if (signs != nullptr) {
              // both terms are integers below 2^53: the difference is exact
              const double product = products[e - begin_of(j0)];
              g += static_cast<T>((static_cast<double>(signs->n_rows) * product - counts_signs) *
                                  scale);
            }
            value_[e] = g;
            sum += g;
          }
        }
        column_sum[column] = sum;
      }
    }
  }

  // B S of the entries of columns j0 .. j1, and the signs' products with the digits of the counts.
  void count_signs(int64_t j0, int64_t j1, const uint32_t* const* planes, int64_t planes_stride,
                   int32_t* products, int32_t* digit_products) const {
    for (int64_t w = 0; w < signs->words(); w += kSignBlock) {
      SignCounts s{};
      s.words = std::min(signs->words() - w, kSignBlock);
      for (int64_t j = j0; j < j1; ++j) {
        if (begin_of(j) == begin_of(j + 1)) continue;
        s.above = planes[0] + (j - j0) * planes_stride + w;
        s.below = planes[1] + (j - j0) * planes_stride + w;
        s.rows_stride = rows_stride;
        for (int64_t r = 0; r < blocks_; ++r) {
          const int64_t at = begin_[j * blocks_ + r];
          s.rows = rows + r * kPanelRows * rows_stride + w;
          s.index = index_.data() + at;
          s.count = begin_[j * blocks_ + r + 1] - at;
          s.out = products + at - begin_of(j0);
          kernels().sign_counts(s);
        }
        s.rows = digits + w;
        s.rows_stride = signs->words();
        s.index = nullptr;
        s.count = n_digits;
        s.out = digit_products + (j - j0) * n_digits;
        kernels().sign_counts(s);
      }
    }
  }

  // Columns of dW_enc are made as rows, a few together, and transposed: whole lines are written.
  void weight_gradient(Worker& w, int64_t from, int64_t to) {
    T* const out = reinterpret_cast<T*>(w.output.get());
    for (int64_t j0 = from, step = group(from, to); j0 < to; j0 += step) {
      const int64_t j1 = std::min(to, j0 + step), few = std::min(step, kPanelRows);
      for (int64_t c = 0; c < d; c += kWidth) {
        for (int64_t j = j0; j < j1; j += few) {
          const int64_t count = std::min(j1 - j, few);
          std::fill_n(out, count * kPitch, T{0});
          for (int64_t r = 0; r < blocks_; ++r) {
            sparse_kernels<T>().sums(lists(w, j, count, x, x_stride, d, r, c), value_.data(), out,
                                     kPitch);
          }
          sparse_kernels<T>().transpose(out, kPitch, count, std::min(d - c, kWidth),
                                        grad_W + c * k + first_ + j, k);
        }
      }
    }
  }

  void input_gradient() {
    const int64_t columns = last_ - first_, groups = (columns + kPanelRows - 1) / kPanelRows;
    std::vector<int64_t> row_begin(groups * (n + 1));
    std::vector<uint16_t> column(begin_.back());
    std::vector<T> value(begin_.back());
    const uint32_t* const words = data<uint32_t>(window) + first_ / kWordBits;
    const int64_t words_stride = row_stride(window);
    torch::stable::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
      for (int64_t g = from; g < to; ++g) {
        const int64_t j0 = g * kPanelRows, count = std::min(columns - j0, kPanelRows);
        int64_t next[kPanelRows], at = begin_of(j0);
        for (int64_t j = 0; j < count; ++j) next[j] = begin_of(j0 + j);
        for (int64_t row = 0; row < n; ++row) {
          row_begin[g * (n + 1) + row] = at;
          if (keep != nullptr && !keep[row]) continue;
          for (int64_t m = 0; m < n_words(count); ++m) {
            uint32_t rest = words[row * words_stride + j0 / kWordBits + m];
            for (; rest != 0; rest &= rest - 1) {
              const int64_t j = m * kWordBits + __builtin_ctz(rest);
              column[at] = static_cast<uint16_t>(j);
              value[at++] = value_[next[j]++];
            }
          }
        }
        row_begin[g * (n + 1) + n] = at;
      }
    });
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t width = std::min(kWidth, round_up((d + threads - 1) / threads, kLine));
    torch::stable::parallel_for(0, (d + width - 1) / width, 1, [&](int64_t from, int64_t to) {
      Scratch scratch(kPanelRows * kPitch * sizeof(T));
      T* const panel = reinterpret_cast<T*>(scratch.get());
      for (int64_t c = from * width; c < std::min(to * width, d); c += width) {
        const int64_t used = std::min(d - c, width);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t j0 = g * kPanelRows, count = std::min(columns - j0, kPanelRows);
          sparse_kernels<T>().transpose(W_enc + c * W_enc_stride + first_ + j0, W_enc_stride, used,
                                        count, panel, kPitch);
          sparse_kernels<T>().sums({row_begin.data() + g * (n + 1), 1, n, column.data(), panel,
                                    kPitch, used},
                                   value.data(), grad_x + c, d);
        }
      }
    });
  }
};

template <typename T>
const T* matrix(const Tensor& tensor, int64_t* stride) {
  *stride = row_stride(tensor);
  return data<T>(tensor);
}

// Gradients of x, W_enc and b_enc (in float64) for the entries inside the window; an empty grad_x
// or grad_W is not asked for.
void sparse_backward(Tensor window, std::optional<Tensor> keep, Tensor words,
                     std::optional<Tensor> grad_recon, Tensor W_dec, std::optional<Tensor> shift,
                     std::optional<Tensor> curvature, bool covariance,
                     std::optional<Tensor> signs, std::optional<Tensor> columns, Tensor counts,
                     int64_t n_rows, std::optional<Tensor> digits, double scale, Tensor x,
                     Tensor W_enc, Tensor grad_x, Tensor grad_W, Tensor column_sum) {
  const Statistics statistics(signs, columns, counts, n_rows);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    SparseBackward<T> b{};
    b.n = x.size(0), b.k = column_sum.numel(), b.d = x.size(1);
    b.window = window;
    b.keep = data_or_null<bool>(keep);
    b.rows = matrix<uint32_t>(words, &b.rows_stride);
    if (grad_recon.has_value()) {
      b.grad_recon = matrix<T>(*grad_recon, &b.grad_recon_stride);
      b.d_out = grad_recon->size(1);
      b.W_dec = matrix<T>(W_dec, &b.W_dec_stride);
    }
    b.shift = data_or_null<T>(shift);
    b.curvature = data_or_null<T>(curvature);
    if (covariance) {
      b.signs = &statistics.source;
      b.digits = data<uint32_t>(*digits);
      b.n_digits = digits->size(0);
      b.scale = scale;
    }
    b.x = matrix<T>(x, &b.x_stride);
    b.W_enc = matrix<T>(W_enc, &b.W_enc_stride);
    b.grad_x = grad_x.numel() > 0 ? mutable_data<T>(grad_x) : nullptr;
    b.grad_W = grad_W.numel() > 0 ? mutable_data<T>(grad_W) : nullptr;
    b.column_sum = mutable_data<double>(column_sum);
    b.run();
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

// ---- matrix units -------------------------------------------------------------------------------

bool has_units() { return kernels().units != nullptr; }

// [rows, columns] of floats or bf16 numbers, or of bits.
Matrix as_matrix(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  Matrix m{t.data_ptr(), t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), Matrix::kBits};
  if (dtype != ScalarType::Int) {
    m.element = dtype == ScalarType::Float ? Matrix::kFloat : Matrix::kBfloat16;
    if (t.size(0) == 1 && m.column != 1) m.row = 1;
    STD_TORCH_CHECK(m.row == 1 || m.column == 1, "a matrix must be contiguous one way");
  }
  return m;
}

Matrix transposed(Matrix m) {
  std::swap(m.row, m.column);
  return m;
}

// The same matrix from element (row, column) on.
Matrix from(Matrix m, int64_t row, int64_t column) {
  const char* at = static_cast<const char*>(m.data);
  if (m.element == Matrix::kBits) {
    m.data = at + (row * m.row + column / kWordBits) * 4;
  } else {
    m.data = at + (row * m.row + column * m.column) * (m.element == Matrix::kFloat ? 4 : 2);
  }
  return m;
}

// The left side of products, packed by all threads.
class LeftPanel {
 public:
  LeftPanel(const Matrix& m, int64_t rows, int64_t depth, int64_t digits)
      : memory_(kernels().units->panel_bytes(rows, depth, digits)) {
    const Units& units = *kernels().units;
    const int64_t groups = (rows + units.rows - 1) / units.rows;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        if (!units.pack(m, begin * units.rows, rows, depth, digits, memory_.get())) exact_ = false;
      }
    });
  }
  const uint8_t* get() const { return memory_.get(); }
  bool exact() const { return exact_; }

 private:
  Scratch memory_;
  std::atomic<bool> exact_{true};
};

// Rows and summed elements of a panel: tens of MiB.
constexpr int64_t kPanelRows = 1024, kPanelDepth = 8192;

// Bits and window of x W + b, as `threshold`, without ever holding x W. False, and nothing of use,
// where the operands are too large for the digits.
bool unit_encode(Tensor x, Tensor W, Tensor bias, std::optional<Tensor> keep, double width,
                 int64_t digits, Tensor words, Tensor window) {
  const int64_t n = x.size(0), depth = x.size(1), columns = W.size(1);
  const Matrix left = as_matrix(x), right = as_matrix(W);
  const Units& units = *kernels().units;
  const int64_t strip = strip_width(columns, units.columns);
  const bool windowed = window.numel() > 0;
  std::atomic<bool> exact{true};
  for (int64_t top = 0; top < n && exact; top += kPanelRows) {
    const int64_t rows = std::min(n - top, kPanelRows);
    const LeftPanel panel(from(left, top, 0), rows, depth, digits);
    if (!panel.exact()) return false;
    torch::stable::parallel_for(0, (columns + strip - 1) / strip, 1,
                                [&](int64_t begin, int64_t end) {
      Scratch scratch(units.scratch);
      for (int64_t at = begin * strip; at < std::min(end * strip, columns); at += strip) {
        const UnitStrip s{panel.get(), from(right, 0, at),          rows,
                          depth,       std::min(columns - at, strip), digits,
                          scratch.get()};
        EncodeStrip e{};
        e.bias = data<float>(bias) + at;
        e.keep = keep.has_value() ? data<bool>(*keep) + top : nullptr;
        e.width = static_cast<float>(width);
        e.words_stride = row_stride(words);
        e.words = mutable_data<uint32_t>(words) + top * e.words_stride + at / kWordBits;
        if (windowed) {
          e.window_stride = row_stride(window);
          e.window = mutable_data<uint32_t>(window) + top * e.window_stride + at / kWordBits;
        }
        if (!units.encode(s, e)) exact = false;
      }
    });
  }
  return exact;
}

// out (+)= left right, sums in fp32; left may be packed bits. False as above.
bool unit_product(Tensor left, Tensor right, int64_t digits, bool add, Tensor out) {
  const int64_t n = out.size(0), columns = out.size(1), depth = right.size(0);
  const Matrix from_left = as_matrix(left), from_right = as_matrix(right);
  const Units& units = *kernels().units;
  const int64_t strip = strip_width(columns, units.columns), stride = row_stride(out);
  std::atomic<bool> exact{true};
  prefer_large_pages(out);
  for (int64_t top = 0; top < n; top += kPanelRows) {
    for (int64_t k0 = 0; k0 < depth; k0 += kPanelDepth) {
      const int64_t rows = std::min(n - top, kPanelRows), deep = std::min(depth - k0, kPanelDepth);
      const LeftPanel panel(from(from_left, top, k0), rows, deep, digits);
      if (!panel.exact() || !exact) return false;
      torch::stable::parallel_for(0, (columns + strip - 1) / strip, 1,
                                  [&](int64_t begin, int64_t end) {
        Scratch scratch(units.scratch);
        for (int64_t at = begin * strip; at < std::min(end * strip, columns); at += strip) {
          const UnitStrip s{panel.get(), from(from_right, k0, at),     rows,
                            deep,        std::min(columns - at, strip), digits,
                            scratch.get()};
          float* to = mutable_data<float>(out) + top * stride + at;
          if (!units.product(s, to, stride, add || k0 > 0)) exact = false;
        }
      });
    }
  }
  return exact;
}

// Backward of the encoder, strip by strip: the product G W_dec^T, all that `backward` does, and the
// product x^T g. Nothing of [N, K] is ever whole in memory. False as above.
bool unit_backward(Tensor x, Tensor grad_recon, Tensor W_dec, int64_t digits_of_numbers,
                   Tensor words, std::optional<Tensor> shift, std::optional<Tensor> curvature,
                   bool covariance, std::optional<Tensor> signs, std::optional<Tensor> columns,
                   Tensor counts, int64_t n_rows, std::optional<Tensor> digits, double scale,
                   std::optional<Tensor> window, std::optional<Tensor> keep, bool official,
                   Tensor column_sum, Tensor grad_W) {
  const int64_t n = x.size(0), d = x.size(1), d_out = grad_recon.size(1), k = W_dec.size(0);
  const Statistics statistics(signs, columns, counts, n_rows);
  const std::optional<Tensor> no_factor;
  const Backward b{words,  0,     shift,  curvature, covariance ? &statistics.source : nullptr,
                   digits, scale, window, no_factor, keep, official, column_sum};
  const Units& units = *kernels().units;
  const LeftPanel gradients(as_matrix(grad_recon), n, d_out, digits_of_numbers);
  const bool weights = grad_W.numel() > 0;
  const LeftPanel rows(transposed(as_matrix(x)), weights ? d : 0, n, digits_of_numbers);
  if (!gradients.exact() || !rows.exact()) return false;
  if (weights) prefer_large_pages(grad_W);
  const Matrix decoder = transposed(as_matrix(W_dec));
  std::atomic<bool> exact{true};
  for_each_strip<float>(
      b, n, k, std::min(units.columns, kernels().strip), kernels().backward_strip_f32, [&] {
        auto scratch = std::make_shared<Scratch>(units.scratch);
        auto memory = std::make_shared<Scratch>(n * units.columns * 4);
        return [&, scratch, memory](BackwardStrip<float>& s, int64_t at, auto run) {
          s.g = reinterpret_cast<float*>(memory->get());
          s.g_stride = units.columns;
          const UnitStrip decode{gradients.get(), from(decoder, 0, at), n, d_out,
                                 s.columns,       digits_of_numbers,    scratch->get()};
          if (!units.product(decode, s.g, s.g_stride, false)) exact = false;
          run();
          if (!weights) return;
          const Matrix g{s.g, s.g_stride, 1, Matrix::kFloat};
          const UnitStrip encode{rows.get(), g,                 d,
                                 n,          s.columns,         digits_of_numbers,
                                 scratch->get()};
          if (!units.product(encode, mutable_data<float>(grad_W) + at, row_stride(grad_W),
                             false)) {
            exact = false;
          }
        };
      });
  return exact;
}

// ---- bits x dense -------------------------------------------------------------------------------

// Whether there is a product faster than torch's at any density.
bool has_bits_product() { return kernels().bits_product != nullptr; }

// out (+)= bits dense, in fp32: by gathering rows, or by the kernel for any density. False, and
// nothing of use, where that kernel met a number that is not finite.
bool bits_product(Tensor bits, Tensor dense, bool gather, bool add, Tensor out) {
  const int64_t rows = out.size(0), columns = out.size(1), depth = dense.size(0);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t width = strip_width(columns, gather ? kProductColumns : kernels().product_columns);
  const int64_t strips = (columns + width - 1) / width;
  // rows are shared out too where there are few strips; enough of them to pay for the panels
  const int64_t parts = std::max<int64_t>(1, std::min((threads + strips - 1) / strips, rows / 64));
  const int64_t share = (rows + parts - 1) / parts;
  std::atomic<bool> finite{true};
  prefer_large_pages(out);
  torch::stable::parallel_for(0, strips * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(gather ? 0 : kernels().product_scratch);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % parts * share, at = index / parts * width;
      if (first >= rows) continue;
      BitsProduct p{};
      p.bits_stride = row_stride(bits);
      p.bits = data<uint32_t>(bits) + first * p.bits_stride;
      p.dense = data<float>(dense) + at;
      p.dense_stride = row_stride(dense);
      p.out_stride = row_stride(out);
      p.out = mutable_data<float>(out) + first * p.out_stride + at;
      p.rows = std::min(rows - first, share);
      p.depth = depth;
      p.columns = std::min(columns - at, width);
      p.add = add;
      p.scratch = scratch.get();
      if (gather) {
        kernels().gather_product(p);
      } else if (!kernels().bits_product(p)) {
        finite = false;
      }
    }
  });
  return finite;
}

// ---- registration -------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(bae_fast, CompositeExplicitAutograd, m) {
  m.impl("cpp_simd", TORCH_BOX(&simd));
  m.impl("cpp_has_bits_product", TORCH_BOX(&has_bits_product));
  m.impl("cpp_has_units", TORCH_BOX(&has_units));
  m.impl("cpp_new_gradient", TORCH_BOX(&new_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(bae_fast, CPU, m) {
  m.impl("cpp_rows_to_columns", TORCH_BOX(&rows_to_columns));
  m.impl("cpp_column_counts", TORCH_BOX(&column_counts));
  m.impl("cpp_threshold", TORCH_BOX(&threshold));
  m.impl("cpp_covariance", TORCH_BOX(&covariance));
  m.impl("cpp_backward", TORCH_BOX(&backward));
  m.impl("cpp_sparse_backward", TORCH_BOX(&sparse_backward));
  m.impl("cpp_rows_to_features", TORCH_BOX(&rows_to_features));
  m.impl("cpp_bits_product", TORCH_BOX(&bits_product));
  m.impl("cpp_unit_encode", TORCH_BOX(&unit_encode));
  m.impl("cpp_unit_product", TORCH_BOX(&unit_product));
  m.impl("cpp_unit_backward", TORCH_BOX(&unit_backward));
}

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace bae_fast

// Importing the module registers the operators; it holds nothing else.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&bae_fast::module); }
