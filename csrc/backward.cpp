// Backward of the encoder. A strip is 64 to 256 columns and all rows; where no sign planes were
// stored, those of the strip are computed again. Scratch is per thread and at most a few strips.

#include "operators.h"
#include "signs.h"
#include "units.h"

namespace bae_fast {
namespace {

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

// One thread's products of a strip of columns with all rows, from lists.
class ListedStrip {
 public:
  ListedStrip(const ListedSigns& signs, int64_t n, int64_t width)
      : row_(signs), n_(n), width_(width), products_(n * width), columns_(kTogether * n) {}

  void fill(int64_t first, int64_t columns) {
    for (int64_t j0 = 0; j0 < columns; j0 += kTogether) {
      const int64_t together = std::min(columns - j0, kTogether);
      for (int64_t j = 0; j < together; ++j) {
        row_.make(first + j0 + j);
        counts_signs_[j0 + j] = row_.counts_signs();
        row_.all(columns_.data() + j * n_);
      }
      for (int64_t r = 0; r < n_; ++r) {
        int32_t* const to = products_.data() + r * width_ + j0;
        for (int64_t j = 0; j < together; ++j) to[j] = columns_[j * n_ + r];
      }
    }
  }

  const int32_t* products() const { return products_.data(); }
  const double* counts_signs() const { return counts_signs_; }

 private:
  static constexpr int64_t kTogether = 16;  // one cache line of each row of products

  SignRow row_;
  int64_t n_, width_;
  std::vector<int32_t> products_, columns_;
  double counts_signs_[kMaxStrip];
};

// Runs the kernel, or with lists the other one, on strips of `columns` columns. body(strip, at,
// run) of every thread's own body sets strip.g for columns at .. and calls run().
template <typename T, typename MakeBody>
void for_each_strip(const Backward& b, int64_t n, int64_t columns, int64_t widest,
                    void (*kernel)(const BackwardStrip<T>&),
                    void (*kernel_given)(const BackwardStrip<T>&), MakeBody make_body) {
  const int64_t width = strip_width(columns, widest);
  const int64_t strips = (columns + width - 1) / width;
  parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> memory;
    const bool listed = b.signs != nullptr && b.signs->lists != nullptr;
    const bool planes_needed = b.signs != nullptr && !listed;
    Scratch scratch(planes_needed ? kernels().backward_scratch(b.signs->words()) : 0);
    Scratch tile_scratch(
        planes_needed && b.signs->planes[0] == nullptr ? kernels().covariance_scratch : 0);
    std::optional<ListedStrip> list_products;
    if (listed) list_products.emplace(*b.signs->lists, n, width);
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
        if (b.signs == nullptr) return kernel(s);
        s.sign_words = b.signs->words();
        s.n_rows = static_cast<double>(b.signs->n_rows);
        s.scale = b.scale;
        if (listed) {
          list_products->fill(column, s.columns);
          s.products = list_products->products();
          s.products_stride = width;
          s.counts_signs = list_products->counts_signs();
          return kernel_given(s);
        }
        const uint32_t* planes[2];
        s.planes_stride = b.signs->strip(column, s.columns, memory, tile_scratch.get(), planes);
        s.above = planes[0];
        s.below = planes[1];
        s.scratch = scratch.get();
        s.digits = data<uint32_t>(*b.digits);
        s.n_digits = b.digits->size(0);
        kernel(s);
      });
    }
  });
}

}  // namespace

// g, the gradient at the bits from the reconstruction, becomes the gradient at pre; its column
// sums are added up in float64.
void backward(Tensor g, Tensor words, int64_t start, std::optional<Tensor> shift,
              std::optional<Tensor> curvature, bool covariance, std::optional<Tensor> signs,
              std::optional<Tensor> columns, std::optional<Tensor> ranks,
              std::optional<Tensor> counted, std::optional<Tensor> at_hand, Tensor counts,
              int64_t n_rows, std::optional<Tensor> digits, double scale,
              std::optional<Tensor> window, std::optional<Tensor> factor,
              std::optional<Tensor> keep, bool official, Tensor column_sum) {
  const std::optional<Tensor> lists[] = {ranks, counted, at_hand};
  const Statistics statistics(signs, columns, lists, counts, n_rows);
  const Backward b{
      words,    start,     shift,  curvature, covariance ? &statistics.source : nullptr,
      digits,   scale,     window, factor,    keep,
      official, column_sum};
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
    for_each_strip<double>(b, g.size(0), g.size(1), kernels().strip, kernels().backward_strip_f64,
                           kernels().backward_given_f64, in_place(double{}));
  } else {
    for_each_strip<float>(b, g.size(0), g.size(1), kernels().strip, kernels().backward_strip_f32,
                          kernels().backward_given_f32, in_place(float{}));
  }
}

// Backward of the encoder, strip by strip: the product G W_dec^T, all that `backward` does, and the
// product x^T g. Nothing of [N, K] is ever whole in memory. False, and nothing of use written,
// where an operand is too large for the digits.
bool unit_backward(Tensor x, Tensor grad_recon, Tensor W_dec, int64_t digits_of_numbers,
                   Tensor words, std::optional<Tensor> shift, std::optional<Tensor> curvature,
                   bool covariance, std::optional<Tensor> signs, std::optional<Tensor> columns,
                   std::optional<Tensor> ranks, std::optional<Tensor> counted,
                   std::optional<Tensor> at_hand, Tensor counts, int64_t n_rows,
                   std::optional<Tensor> digits, double scale, std::optional<Tensor> window,
                   std::optional<Tensor> keep, bool official, Tensor column_sum, Tensor grad_W) {
  const int64_t n = x.size(0), d = x.size(1), d_out = grad_recon.size(1), k = W_dec.size(0);
  const std::optional<Tensor> lists[] = {ranks, counted, at_hand};
  const Statistics statistics(signs, columns, lists, counts, n_rows);
  const std::optional<Tensor> no_factor;
  const Backward b{
      words,    0,         shift,  curvature, covariance ? &statistics.source : nullptr,
      digits,   scale,     window, no_factor, keep,
      official, column_sum};
  const Units& units = *kernels().units;
  const LeftPanel gradients(as_matrix(grad_recon), n, d_out, digits_of_numbers);
  const bool weights = grad_W.numel() > 0;
  const LeftPanel rows(transposed(as_matrix(x)), weights ? d : 0, n, digits_of_numbers);
  if (!gradients.exact() || !rows.exact()) return false;
  const Matrix decoder = transposed(as_matrix(W_dec));
  // of many rows narrower strips: every thread has one in memory
  constexpr int64_t kStripNumbers = int64_t{1} << 22;
  const int64_t widest = std::clamp(kStripNumbers / n / kStrip * kStrip, kStrip,
                                    std::min(units.columns, kernels().strip));
  std::atomic<bool> exact{true};
  for_each_strip<float>(
      b, n, k, widest, kernels().backward_strip_f32, kernels().backward_given_f32, [&] {
        return [&, scratch = Scratch(units.scratch), memory = Scratch(n * widest * 4)](
                   BackwardStrip<float>& s, int64_t at, auto run) {
          s.g = reinterpret_cast<float*>(memory.get());
          s.g_stride = widest;
          const UnitStrip decode{gradients.get(),   from(decoder, 0, at), n, d_out, s.columns,
                                 digits_of_numbers, scratch.get()};
          if (!units.product(decode, s.g, s.g_stride, false)) exact = false;
          run();
          if (!weights) return;
          const Matrix g{s.g, s.g_stride, 1, Matrix::kFloat};
          const UnitStrip encode{rows.get(), g, d, n, s.columns, digits_of_numbers, scratch.get()};
          if (!units.product(encode, mutable_data<float>(grad_W) + at, row_stride(grad_W), false)) {
            exact = false;
          }
        };
      });
  return exact;
}

}  // namespace bae_fast
