// Products, and what turns pre-activations into bits.
#include <iterator>
#include <utility>
#include <vector>

#include "operators.h"
#include "units.h"

namespace bae_fast {
namespace {

// Rows and summed elements of a left panel: tens of MiB.
constexpr int64_t kRowsAtOnce = 1024, kDepthAtOnce = 8192;

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

namespace {

struct Columns {
  int64_t begin, end;
};

// One by one: copies of vectors need a symbol of libstdc++ that is too new for manylinux_2_28.
void add(std::vector<Columns>& to, const Columns& some) {
  if (!to.empty() && to.back().end == some.begin) {
    to.back().end = some.end;
  } else {
    to.push_back(some);
  }
}

struct Encoded {
  std::vector<Columns> done, left;
};

// encode(strip, scratch) of strips of columns. A thread stops where it fails more often than not.
template <typename Encode>
Encoded by_strips(const std::vector<Columns>& all, int64_t most_columns, int64_t scratch_bytes,
                  const Encode& encode) {
  std::vector<Columns> strips;
  for (const Columns& c : all) {
    const int64_t width = strip_width(c.end - c.begin, most_columns);
    for (int64_t at = c.begin; at < c.end; at += width) {
      strips.push_back({at, std::min(c.end, at + width)});
    }
  }
  std::vector<char> done(strips.size());
  parallel_for(0, static_cast<int64_t>(strips.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(scratch_bytes);
    for (int64_t balance = 0; begin < end && balance >= 0; ++begin) {
      done[begin] = encode(strips[begin], scratch.get());
      balance += done[begin] ? 1 : -1;
    }
  });
  Encoded out;
  for (size_t i = 0; i < strips.size(); ++i) add(done[i] ? out.done : out.left, strips[i]);
  return out;
}

}  // namespace

// Bits and window of x W + b, as `threshold`, without ever holding x W. False, and nothing of use,
// where the operands are too large for the digits.
bool unit_encode(Tensor x, Tensor W, Tensor bias, std::optional<Tensor> keep, double width,
                 int64_t digits, Tensor words, Tensor window) {
  const int64_t n = x.size(0), depth = x.size(1), columns = W.size(1);
  const Matrix left = as_matrix(x), right = as_matrix(W);
  const bool windowed = window.numel() > 0;
  // by strips of those columns, of the rows in a panel
  const auto encode = [&](const std::vector<Columns>& some, int64_t most_columns,
                          int64_t scratch_bytes, const LeftPanel& panel, int64_t top, int64_t rows,
                          auto kernel) {
    if (!panel.exact()) {
      Encoded none;
      for (const Columns& c : some) add(none.left, c);
      return none;
    }
    return by_strips(some, most_columns, scratch_bytes, [&](const Columns& c, uint8_t* scratch) {
      const UnitStrip s{panel.get(), from(right, 0, c.begin), rows, depth, c.end - c.begin, digits,
                        scratch,     from(left, top, 0)};
      EncodeStrip e{};
      e.bias = data<float>(bias) + c.begin;
      e.keep = keep.has_value() ? data<bool>(*keep) + top : nullptr;
      e.width = static_cast<float>(width);
      e.words_stride = row_stride(words);
      e.words = mutable_data<uint32_t>(words) + top * e.words_stride + c.begin / kWordBits;
      if (windowed) {
        e.window_stride = row_stride(window);
        e.window = mutable_data<uint32_t>(window) + top * e.window_stride + c.begin / kWordBits;
      }
      return kernel(s, e);
    });
  };
  // The columns that each screen takes, and after them sums in fp32. What a screen leaves goes to
  // the next, for all rows below too; the last leaves all or nothing, as bits are not exact after
  // it.
  constexpr size_t kScreens = std::size(Kernels{}.screens);
  std::vector<Columns> of[kScreens + 1];
  size_t first = 0;
  const auto serves = [&](const Screen* screen) {
    return screen != nullptr && digits == 3 && depth <= screen->depth && n >= screen->least_rows;
  };
  while (first < kScreens && !serves(kernels().screens[first])) ++first;
  // by a screen, of columns of the rows from `top` on
  const auto by_screen = [&](const Screen& screen, const std::vector<Columns>& some, int64_t top,
                             int64_t rows) {
    const LeftPanel panel(screen.panel_bytes(rows, depth), rows, screen.rows,
                          [&](int64_t row, uint8_t* to) {
                            return screen.pack(from(left, top, 0), row, rows, depth, to);
                          });
    return encode(some, screen.columns(depth), screen.scratch_bytes(depth), panel, top, rows,
                  screen.encode);
  };
  // A few rows of a few columns, which are made again, save the panels of a screen that gives up.
  if (first < kScreens && kernels().screens[first]->tried > 0) {
    const Screen& screen = *kernels().screens[first];
    std::vector<Columns> some;
    some.push_back({0, std::min(columns, kMaxStrip)});
    if (!by_screen(screen, some, 0, std::min(n, screen.tried)).left.empty()) ++first;
  }
  of[first].push_back({0, columns});
  for (int64_t top = 0; top < n; top += kScreenedAtOnce) {
    const int64_t rows = std::min(n - top, kScreenedAtOnce);
    for (size_t i = first; i < kScreens; ++i) {
      if (of[i].empty()) continue;
      Encoded parts = by_screen(*kernels().screens[i], of[i], top, rows);
      if (parts.left.empty()) continue;
      if (i + 1 == kScreens) {
        for (const Columns& c : of[i]) add(of[i + 1], c);
        of[i].clear();
      } else {
        for (const Columns& c : parts.left) add(of[i + 1], c);
        of[i] = std::move(parts.done);
      }
    }
    if (of[kScreens].empty()) continue;
    const Units& units = *kernels().units;
    for (int64_t row = top; row < top + rows; row += kRowsAtOnce) {
      const int64_t some = std::min(top + rows - row, kRowsAtOnce);
      const LeftPanel panel(from(left, row, 0), some, depth, digits);
      const Encoded parts =
          encode(of[kScreens], units.columns, units.scratch, panel, row, some, units.encode);
      if (!parts.left.empty()) return false;
    }
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

// bits dense + bias, summed in fp32: each row of out is the sum of the listed rows of dense, fp32
// or bf16, which are read where they lie. out is of fp32, or of bf16 numbers, which are rounded
// once.
void gather_rows(Tensor bits, Tensor dense, std::optional<Tensor> bias, Tensor out) {
  const int64_t words = bits.size(1), stride = row_stride(bits), columns = out.size(1);
  const uint32_t* const from = data<uint32_t>(bits);
  ListedRows all{};
  all.half = dense.scalar_type() == ScalarType::BFloat16;
  all.dense = all.half ? static_cast<const void*>(data<uint16_t>(dense)) : data<float>(dense);
  all.dense_stride = row_stride(dense);
  all.columns = columns;
  const float* const first = data_or_null<float>(bias);
  all.add = first != nullptr;
  const bool narrow = out.scalar_type() == ScalarType::BFloat16;
  void* const memory = out.data_ptr();
  const int64_t out_stride = row_stride(out);
  parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> list(dense.size(0));
    std::vector<float> wide(narrow ? columns : 0);
    ListedRows one = all;
    one.list = list.data();
    for (int64_t row = begin; row < end; ++row) {
      one.count = kernels().set_bits(from + row * stride, words, list.data());
      one.out = narrow ? wide.data() : static_cast<float*>(memory) + row * out_stride;
      if (first != nullptr) std::copy_n(first, columns, one.out);
      kernels().add_listed_rows(one);
      if (!narrow) continue;
      uint16_t* const rounded = static_cast<uint16_t*>(memory) + row * out_stride;
      for (int64_t c = 0; c < columns; ++c) store(wide[c], rounded + c);
    }
  });
}

}  // namespace bae_fast
