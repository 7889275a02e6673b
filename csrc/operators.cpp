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

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
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

// Memory of one thread, on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(bytes > 0 ? bytes + 63 : 0) {}
  uint8_t* get() {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.empty() ? nullptr : memory_.data() + (64 - at % 64) % 64;
  }

 private:
  std::vector<uint8_t> memory_;
};

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
    constexpr int64_t kTileWords = kTile / kWordBits;
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
          for (int64_t r = 0; r < rows; ++r) {
            std::copy_n(parts[p] + r * kTileWords, n_words(across),
                        planes[p] + (i0 + r) * w + j0 / kWordBits);
          }
          if (i0 == j0) continue;
          for (int64_t r = 0; r < rows; r += kWordBits) {
            kernels().transpose(parts[p] + r * kTileWords, kTileWords,
                                std::min(rows - r, kWordBits), across, mirror + r / kWordBits,
                                kTileWords);
          }
          for (int64_t r = 0; r < across; ++r) {
            std::copy_n(mirror + r * kTileWords, n_words(rows),
                        planes[p] + (j0 + r) * w + i0 / kWordBits);
          }
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
    tile.i0 = first, tile.i1 = first + round_up(used, kStrip);
    tile.j0 = 0, tile.j1 = round_up(k, kStrip);
    tile.above = memory.data();
    tile.below = memory.data() + kMaxStrip * stride_out;
    tile.planes_stride = stride_out;
    tile.scratch = scratch;
    kernels().covariance_tile(tile);
    for (int64_t i = first; i < first + used; ++i) {
      tile.above[(i - first) * stride_out + i / kWordBits] &= ~(1u << i % kWordBits);
    }
    out[0] = tile.above;
    out[1] = tile.below;
    return stride_out;
  }
};

template <typename T>
void backward_chunk(const Tensor& g, const Tensor& words, int64_t start,
                    const std::optional<Tensor>& shift, const std::optional<Tensor>& curvature,
                    const SignSource* signs, const std::optional<Tensor>& digits, double scale,
                    const std::optional<Tensor>& window, const std::optional<Tensor>& factor,
                    const std::optional<Tensor>& keep, bool official, const Tensor& column_sum,
                    void (*kernel)(const BackwardStrip<T>&)) {
  const int64_t n = g.size(0), columns = g.size(1);
  // wide strips read the rows less often, but every thread should have one
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = round_up((columns + threads - 1) / threads, kStrip);
  const int64_t width = std::min(kernels().strip, share);
  const int64_t strips = (columns + width - 1) / width;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> memory;
    Scratch scratch(signs == nullptr ? 0 : kernels().backward_scratch(signs->words()));
    Scratch tile_scratch(signs == nullptr || signs->planes[0] != nullptr
                             ? 0
                             : kernels().covariance_scratch);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t at = index * width, column = start + at;
      BackwardStrip<T> s{};
      s.g = mutable_data<T>(g) + at;
      s.g_stride = row_stride(g);
      s.n = n;
      s.columns = std::min(columns - at, width);
      s.shift = shift.has_value() ? data<T>(*shift) + at : nullptr;
      s.curvature = curvature.has_value() ? data<T>(*curvature) + at : nullptr;
      s.rows = data<uint32_t>(words);
      s.rows_stride = s.bits_stride = row_stride(words);
      s.bits = s.rows + column / kWordBits;
      if (signs != nullptr) {
        const uint32_t* planes[2];
        s.planes_stride = signs->strip(column, s.columns, memory, tile_scratch.get(), planes);
        s.above = planes[0];
        s.below = planes[1];
        s.scratch = scratch.get();
        s.sign_words = signs->words();
        s.digits = data<uint32_t>(*digits);
        s.n_digits = digits->size(0);
        s.n_rows = static_cast<double>(signs->n_rows);
        s.scale = scale;
      }
      if (window.has_value()) {
        s.window = data<uint32_t>(*window) + column / kWordBits;
        s.window_stride = row_stride(*window);
      }
      if (factor.has_value()) {
        s.factor = data<T>(*factor) + at;
        s.factor_stride = row_stride(*factor);
      }
      s.official = official;
      s.keep = data_or_null<bool>(keep);
      s.column_sum = mutable_data<double>(column_sum) + at;
      kernel(s);
    }
  });
}

// g, the gradient at the bits from the reconstruction, becomes the gradient at pre; its column
// sums are added up in float64.
void backward(Tensor g, Tensor words, int64_t start, std::optional<Tensor> shift,
              std::optional<Tensor> curvature, bool covariance, std::optional<Tensor> signs,
              std::optional<Tensor> columns, Tensor counts, int64_t n_rows,
              std::optional<Tensor> digits, double scale, std::optional<Tensor> window,
              std::optional<Tensor> factor, std::optional<Tensor> keep, bool official,
              Tensor column_sum) {
  SignSource source{};
  std::vector<int32_t> ones;
  if (covariance) {
    source.k = counts.numel();
    source.n_rows = n_rows;
    if (signs.has_value()) {
      source.planes[0] = data<uint32_t>(*signs);
      source.planes[1] = source.planes[0] + source.k * source.words();
    } else {
      source.columns = data<uint32_t>(*columns);
      source.stride = row_stride(*columns);
      source.rows_words = columns->size(0);
      ones = padded_counts(counts, source.stride);
      source.counts = &ones;
    }
  }
  const SignSource* from = covariance ? &source : nullptr;
  if (g.scalar_type() == ScalarType::Double) {
    backward_chunk<double>(g, words, start, shift, curvature, from, digits, scale, window, factor,
                           keep, official, column_sum, kernels().backward_strip_f64);
  } else {
    backward_chunk<float>(g, words, start, shift, curvature, from, digits, scale, window, factor,
                          keep, official, column_sum, kernels().backward_strip_f32);
  }
}

// ---- bits x dense -------------------------------------------------------------------------------

// out (+)= bits dense, in fp32: by gathering rows, or by the kernel for any density.
void bits_product(Tensor bits, Tensor dense, bool gather, bool add, Tensor out) {
  const int64_t rows = out.size(0), columns = out.size(1), depth = dense.size(0);
  const int64_t threads = torch::stable::get_num_threads();
  // wide strips list the ones less often, but every thread should have one
  const int64_t share_of_columns =
      round_up((columns + threads - 1) / threads, kProductColumns);
  const int64_t width =
      std::min(gather ? INT64_MAX : kernels().product_columns, share_of_columns);
  const int64_t strips = (columns + width - 1) / width;
  // rows are shared out too where there are few strips; enough of them to pay for the panels
  const int64_t parts = std::max<int64_t>(1, std::min((threads + strips - 1) / strips, rows / 64));
  const int64_t share = (rows + parts - 1) / parts;
  const auto kernel = gather ? kernels().gather_product : kernels().bits_product;
  torch::stable::parallel_for(0, strips * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(gather ? kernels().gather_scratch : kernels().product_scratch);
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
      kernel(p);
    }
  });
}

// ---- registration -------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(bae_fast, CompositeExplicitAutograd, m) {
  m.impl("cpp_simd", TORCH_BOX(&simd));
}

STABLE_TORCH_LIBRARY_IMPL(bae_fast, CPU, m) {
  m.impl("cpp_rows_to_columns", TORCH_BOX(&rows_to_columns));
  m.impl("cpp_column_counts", TORCH_BOX(&column_counts));
  m.impl("cpp_threshold", TORCH_BOX(&threshold));
  m.impl("cpp_covariance", TORCH_BOX(&covariance));
  m.impl("cpp_backward", TORCH_BOX(&backward));
  m.impl("cpp_rows_to_features", TORCH_BOX(&rows_to_features));
  m.impl("cpp_bits_product", TORCH_BOX(&bits_product));
}

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace bae_fast

// Importing the module registers the operators; it holds nothing else.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&bae_fast::module); }
