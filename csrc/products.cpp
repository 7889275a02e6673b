// Products, and what turns pre-activations into bits.
#include "operators.h"
#include "units.h"

namespace bae_fast {
namespace {

// Rows and summed elements of a left panel: tens of MiB.
constexpr int64_t kRowsAtOnce = 1024, kDepthAtOnce = 8192;
// Of a screen, which prepares the right side anew for each.
constexpr int64_t kScreenedAtOnce = 4096;

// Pre-activations without their bias, of one row: the sum never leaves the inner cache.
template <typename T>
void threshold_sums(const T* pre, const T* bias, int64_t columns, T width, uint32_t* words,
                    uint32_t* window, void (*kernel)(const T*, int64_t, T, uint32_t*, uint32_t*)) {
  constexpr int64_t kSpan = 1024;
  T sum[kSpan];
  for (int64_t at = 0; at < columns; at += kSpan) {
    const int64_t used = std::min(columns - at, kSpan), word = at / kWordBits;
    for (int64_t j = 0; j < used; ++j) sum[j] = pre[at + j] + bias[at + j];
    kernel(sum, used, width, words + word, window == nullptr ? nullptr : window + word);
  }
}

}  // namespace

// ---- encode -------------------------------------------------------------------------------------

// [pre > 0] and, unless window is empty, [|pre| < width] of columns start .. of the packed code; a
// bias is added to pre first, in pre's dtype: fp32 or float64.
void threshold(Tensor pre, std::optional<Tensor> bias, std::optional<Tensor> keep, double width,
               int64_t start, Tensor words, Tensor window) {
  const int64_t n = pre.size(0), columns = pre.size(1), stride = row_stride(pre);
  const ScalarType dtype = pre.scalar_type();
  const bool* kept = data_or_null<bool>(keep);
  const bool windowed = window.numel() > 0;
  uint32_t* const bits = mutable_data<uint32_t>(words) + start / kWordBits;
  uint32_t* const inside = windowed ? mutable_data<uint32_t>(window) + start / kWordBits : nullptr;
  const int64_t bits_stride = row_stride(words);
  const int64_t inside_stride = windowed ? row_stride(window) : 0;
  const float narrow = static_cast<float>(width);
  const Kernels& k = kernels();
  parallel_for(0, n, 1 + (1 << 15) / columns, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint32_t* to = bits + row * bits_stride;
      uint32_t* in = windowed ? inside + row * inside_stride : nullptr;
      if (kept != nullptr && !kept[row]) {
        std::fill(to, to + n_words(columns), 0);
        if (windowed) std::fill(in, in + n_words(columns), 0);
      } else if (bias.has_value() && dtype == ScalarType::Float) {
        threshold_sums(data<float>(pre) + row * stride, data<float>(*bias), columns, narrow, to, in,
                       k.threshold_f32);
      } else if (bias.has_value() && dtype == ScalarType::Double) {
        threshold_sums(data<double>(pre) + row * stride, data<double>(*bias), columns, width, to,
                       in, k.threshold_f64);
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

// ---- dense x dense ------------------------------------------------------------------------------

// 0: none; 1: numbers are multiplied as they are; 2: in digits, on matrix units.
int64_t unit_kind() {
  const Units* const found = kernels().units;
  return found == nullptr ? 0 : found->split ? 2 : 1;
}

// Bits and window of x W + b, as `threshold`, without ever holding x W. False, and nothing of use,
// where the operands are too large for the digits.
bool unit_encode(Tensor x, Tensor W, Tensor bias, std::optional<Tensor> keep, double width,
                 int64_t digits, Tensor words, Tensor window) {
  const int64_t n = x.size(0), depth = x.size(1), columns = W.size(1);
  const Matrix left = as_matrix(x), right = as_matrix(W);
  const bool windowed = window.numel() > 0;
  // encode(strip, out) by strips; false as soon as one of them is
  const auto by_strips = [&](int64_t most_columns, int64_t scratch_bytes, const LeftPanel& panel,
                             int64_t top, int64_t rows, auto encode) {
    const int64_t strip = strip_width(columns, most_columns);
    std::atomic<bool> exact{panel.exact()};
    parallel_for(0, (columns + strip - 1) / strip, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(scratch_bytes);
      for (int64_t at = begin * strip; exact && at < std::min(end * strip, columns); at += strip) {
        const UnitStrip s{
            panel.get(),   from(right, 0, at), rows, depth, std::min(columns - at, strip), digits,
            scratch.get(), from(left, top, 0)};
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
        if (!encode(s, e)) exact = false;
      }
    });
    return exact.load();
  };
  const Screen* const screen = kernels().screen;
  bool screened = screen != nullptr && digits == 3 && depth <= screen->depth;
  int64_t rows = 0;
  for (int64_t top = 0; top < n; top += rows) {
    if (screened) {
      rows = std::min(n - top, kScreenedAtOnce);
      const LeftPanel panel(screen->panel_bytes(rows, depth), rows, screen->rows,
                            [&](int64_t first, uint8_t* to) {
                              return screen->pack(from(left, top, 0), first, rows, depth, to);
                            });
      screened = by_strips(screen->columns(depth), screen->scratch_bytes(depth), panel, top, rows,
                           screen->encode);
    }
    if (screened) continue;
    // these rows and all below by sums in fp32
    rows = std::min(n - top, kRowsAtOnce);
    const Units& units = *kernels().units;
    const LeftPanel panel(from(left, top, 0), rows, depth, digits);
    if (!by_strips(units.columns, units.scratch, panel, top, rows, units.encode)) return false;
  }
  return true;
}

// out (+)= left right, sums in fp32; left may be packed bits. False as unit_encode.
bool unit_product(Tensor left, Tensor right, int64_t digits, bool add, Tensor out) {
  const int64_t n = out.size(0), columns = out.size(1), depth = right.size(0);
  const Matrix from_left = as_matrix(left), from_right = as_matrix(right);
  const Units& units = *kernels().units;
  const int64_t strip = strip_width(columns, units.columns), stride = row_stride(out);
  std::atomic<bool> exact{true};
  for (int64_t top = 0; top < n; top += kRowsAtOnce) {
    for (int64_t k0 = 0; k0 < depth; k0 += kDepthAtOnce) {
      const int64_t rows = std::min(n - top, kRowsAtOnce),
                    deep = std::min(depth - k0, kDepthAtOnce);
      const LeftPanel panel(from(from_left, top, k0), rows, deep, digits);
      if (!panel.exact() || !exact) return false;
      parallel_for(0, (columns + strip - 1) / strip, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(units.scratch);
        for (int64_t at = begin * strip; at < std::min(end * strip, columns); at += strip) {
          const UnitStrip s{panel.get(),   from(from_right, k0, at),      rows,
                            deep,          std::min(columns - at, strip), digits,
                            scratch.get(), from(from_left, top, k0)};
          float* to = mutable_data<float>(out) + top * stride + at;
          if (!units.product(s, to, stride, add || k0 > 0)) exact = false;
        }
      });
    }
  }
  return exact;
}

// ---- bits x dense -------------------------------------------------------------------------------

// out (+)= bits dense, in fp32: by gathering rows, or by the kernel for any density. False, and
// nothing of use, where that kernel met a number that is not finite.
bool bits_product(Tensor bits, Tensor dense, bool gather, bool add, Tensor out) {
  const int64_t rows = out.size(0), columns = out.size(1), depth = dense.size(0);
  const int64_t threads = get_num_threads();
  const int64_t width = strip_width(columns, gather ? INT64_MAX : kernels().product_columns);
  const int64_t strips = (columns + width - 1) / width;
  // rows are shared out too where there are few strips; enough of them to pay for the panels
  const int64_t parts = std::max<int64_t>(1, std::min((threads + strips - 1) / strips, rows / 64));
  const int64_t share = (rows + parts - 1) / parts;
  std::atomic<bool> finite{true};
  parallel_for(0, strips * parts, 1, [&](int64_t begin, int64_t end) {
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
      if (gather) {
        kernels().gather_product(p);
      } else if (!kernels().bits_product(p)) {
        finite = false;
      }
    }
  });
  return finite;
}

}  // namespace bae_fast
