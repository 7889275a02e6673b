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

// Asks the system for large pages under memory that was just allocated: the first touch of 64 MiB
// costs as much as a product otherwise.
void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + fresh.numel() * fresh.element_size()) / kPage * kPage;
  if (last >= first + 2 * kPage) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
  }
#endif
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
  prefer_huge_pages(out);
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
  if (weights) prefer_huge_pages(grad_W);
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
  prefer_huge_pages(out);
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
}

STABLE_TORCH_LIBRARY_IMPL(bae_fast, CPU, m) {
  m.impl("cpp_rows_to_columns", TORCH_BOX(&rows_to_columns));
  m.impl("cpp_column_counts", TORCH_BOX(&column_counts));
  m.impl("cpp_threshold", TORCH_BOX(&threshold));
  m.impl("cpp_covariance", TORCH_BOX(&covariance));
  m.impl("cpp_backward", TORCH_BOX(&backward));
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
