// Backward of the encoder where only listed entries carry gradient: those inside the window.
#include <type_traits>

#include "operators.h"
#include "signs.h"

namespace bae_fast {
namespace {

// listed at once, one tile of columns at least: entries, and lists of them
constexpr int64_t kEntries = int64_t{1} << 21, kLists = int64_t{1} << 18;
constexpr int64_t kReuse = 2;  // entries of a group for a row of it, from which panels are copied
// The same of all columns, below which rows are not blocked: of matrices that the last cache holds
// (measured from 3 on; at 97 both take as long), and of others.
constexpr int64_t kScattered = 16, kScatteredOutside = 1;
constexpr int64_t kLastCache = int64_t{1} << 24;  // bytes of a matrix
constexpr int64_t kGroup = 4 * kPanelRows;  // columns for which a part of all rows stays at hand
constexpr int64_t kIndexed = 1 << 16;       // rows that an index of a block may name
constexpr int64_t kSignBlock = 256;         // words of a row: 512 KiB of a block of rows

template <typename T>
const SparseKernels<T>& sparse_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().sparse_f32;
  } else {
    return kernels().sparse_f64;
  }
}

// The rectangle's backward on the entries inside its window. A span of columns at a time: its
// entries are listed by column and, within, by blocks of rows; their gradient is
//
//     g_nj = G_n . W_dec_j + h_j + v_j (1 - 2 b_nj) + scale (N (B S)_nj - (n^T S)_j)
//
// Threads share the columns for g, db_enc and dW_enc, then the columns of x for dx, for which the
// entries are listed again, by row and within kPanelRows columns of W_enc.
//
// A block has kPanelRows rows, of which a panel is copied, or where entries are few as many as an
// index can name: then rows are read where they lie, and lists are hardly more than columns.
template <typename T>
class SparseBackward {
 public:
  // Rows of a matrix [n, width].
  struct Rows {
    const T* data = nullptr;
    int64_t stride = 0, width = 0;
    bool whole = false;  // cache lines, where there is memory behind the last column
  };

  int64_t n, k;
  const int32_t* row_begin;  // [n + 1], of a row in `entries`
  const int32_t* entries;    // columns inside the window, rising in each row
  const uint32_t* rows;      // row-packed bits
  int64_t rows_stride;
  Rows grad_recon;  // [n, d_out], or null
  const T* W_dec;   // [k, d_out]
  int64_t W_dec_stride;
  const T* shift;      // per column, or null
  const T* curvature;  // per column, or null
  const SignSource* signs;
  const uint32_t* digits;
  int64_t n_digits;
  double scale;
  Rows x;          // [n, d]
  const T* W_enc;  // [d, k]
  int64_t W_enc_stride;
  T* grad_x;  // [n, d], added to; or null
  T* grad_W;  // [d, k], or null
  double* column_sum;

  void run() {
    const double per_group = static_cast<double>(row_begin[n]) * kPanelRows / k;
    const int64_t largest = n * std::max(x.width, grad_recon.width) * sizeof(T);
    const int64_t most_scattered = largest <= kLastCache ? kScattered : kScatteredOutside;
    scattered_ = per_group < static_cast<double>(most_scattered * n);
    std::optional<Scratch> padded[2];
    if (scattered_ || per_group < static_cast<double>(kReuse * n)) {
      pad(grad_recon, padded[0]);
      pad(x, padded[1]);
    }
    block_rows_ = scattered_ ? kIndexed : kPanelRows;
    blocks_ = (n + block_rows_ - 1) / block_rows_;
    span_begin_.assign(row_begin, row_begin + n);
    span_end_.resize(n);
    int64_t most = kLists / blocks_;
    if (grad_x != nullptr) most = std::min(most, kLists * kPanelRows / n);  // lists by row
    most = std::max(most / kStrip, int64_t{1}) * kStrip;
    for (first_ = 0; first_ < k; first_ = last_) {
      while (last_ = std::min(k, first_ + most), !end_span()) {
        most = round_up((last_ - first_) / 2, kStrip);
      }
      list_columns();
      const int64_t tiles = (last_ - first_ + kStrip - 1) / kStrip;
      parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        const int64_t to = std::min(end * kStrip, last_ - first_);
        Worker worker;
        if (grad_recon.data != nullptr) dots(worker, begin * kStrip, to);
        finish(begin * kStrip, to);
        if (grad_W != nullptr) weight_gradient(worker, begin * kStrip, to);
      });
      if (grad_x != nullptr && begin_.back() > 0) input_gradient();
      span_begin_.swap(span_end_);
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
    const Rows* held = nullptr;
    int64_t block = -1, column = -1;
  };

  bool scattered_;
  int64_t block_rows_, blocks_;
  int64_t first_, last_;                        // the span
  std::vector<int32_t> span_begin_, span_end_;  // of a row in `entries`
  std::vector<int64_t> begin_;                  // of column j and block r: begin_[j blocks + r]
  std::vector<uint16_t> index_;                 // row within its block
  std::vector<T> value_;

  int64_t begin_of(int64_t j) const { return begin_[j * blocks_]; }

  // Copies rows that do not end with a cache line: then they too are read where they lie.
  void pad(Rows& m, std::optional<Scratch>& memory) const {
    m.whole = m.width % kLine == 0;
    if (m.data == nullptr || m.whole) return;
    const int64_t stride = round_up(m.width, kLine);
    memory.emplace(n * stride * sizeof(T));
    T* const to = reinterpret_cast<T*>(memory->get());
    for (int64_t r = 0; r < n; ++r) {
      std::copy_n(m.data + r * m.stride, m.width, to + r * stride);
      std::fill(to + r * stride + m.width, to + (r + 1) * stride, T{0});
    }
    m.data = to, m.stride = stride, m.whole = true;
  }

  // Where the entries of a row before a column end.
  int32_t entries_before(int64_t row, int64_t column) const {
    const int32_t* const from = entries + span_begin_[row];
    return static_cast<int32_t>(std::lower_bound(from, entries + row_begin[row + 1], column) -
                                entries);
  }

  // Finds the entries of the span; false where they are too many.
  bool end_span() {
    int64_t total = 0;
    for (int64_t row = 0; row < n; ++row) {
      span_end_[row] = last_ == k ? row_begin[row + 1] : entries_before(row, last_);
      total += span_end_[row] - span_begin_[row];
    }
    return total <= kEntries || last_ - first_ <= kStrip;
  }

  // Sorts them by column and, within, by blocks; rows rise, as they are taken from the last.
  // Threads share the columns.
  void list_columns() {
    const int64_t columns = last_ - first_;
    const int64_t parts = std::min(get_num_threads(), columns);
    std::vector<int64_t> before(parts + 1, 0);  // entries of the parts before
    begin_.assign(columns * blocks_ + 1, 0);
    const auto part_begin = [&](int64_t part) { return columns * part / parts; };
    const auto each_entry = [&](int64_t part, auto visit) {
      const int64_t from = first_ + part_begin(part), to = first_ + part_begin(part + 1);
      for (int64_t row = n - 1; row >= 0; --row) {
        const int64_t block = row / block_rows_;
        const int32_t end = part + 1 == parts ? span_end_[row] : entries_before(row, to);
        for (int32_t e = part == 0 ? span_begin_[row] : entries_before(row, from); e < end; ++e) {
          visit((entries[e] - first_) * blocks_ + block, row - block * block_rows_);
        }
      }
    };
    parallel_for(0, parts, 1, [&](int64_t part, int64_t end) {
      for (; part < end; ++part) {
        each_entry(part, [&](int64_t list, int64_t) { ++begin_[list]; });
        int64_t total = 0;
        for (int64_t i = part_begin(part) * blocks_; i < part_begin(part + 1) * blocks_; ++i) {
          begin_[i] = total += begin_[i];
        }
        before[part + 1] = total;
      }
    });
    for (int64_t part = 0; part < parts; ++part) before[part + 1] += before[part];
    begin_.back() = before[parts];
    index_.resize(begin_.back());
    value_.assign(begin_.back(), 0);
    parallel_for(0, parts, 1, [&](int64_t part, int64_t end) {
      for (; part < end; ++part) {
        for (int64_t i = part_begin(part) * blocks_; i < part_begin(part + 1) * blocks_; ++i) {
          begin_[i] += before[part];
        }
        each_entry(part, [&](int64_t list, int64_t row) {
          index_[--begin_[list]] = static_cast<uint16_t>(row);
        });
      }
    });
  }

  // Whether rows of a dense matrix are read where they lie: by few entries, in whole cache lines.
  bool in_place(int64_t from, int64_t count, const Rows& dense) const {
    return scattered_ || (dense.whole && begin_of(from + count) - begin_of(from) < kReuse * n);
  }

  // Columns from .. from + count of the span against one block of rows of a dense matrix, of which
  // the panel takes columns c .. c + kWidth; or the matrix itself, from column c on.
  SparseLists<T> lists(Worker& w, int64_t from, int64_t count, const Rows& dense, int64_t block,
                       int64_t c, bool here) const {
    const int64_t* const begin = begin_.data() + from * blocks_ + block;
    if (here) {
      const T* const rows_here = dense.data + block * block_rows_ * dense.stride + c;
      return {begin, blocks_, count, index_.data(), rows_here, dense.stride, dense.width - c};
    }
    const int64_t used = std::min(dense.width - c, kWidth);
    T* const panel = reinterpret_cast<T*>(w.panel.get());
    if (w.held != &dense || w.block != block || w.column != c) {
      w.held = &dense, w.block = block, w.column = c;
      const int64_t top = block * kPanelRows, bottom = std::min(n, top + kPanelRows);
      for (int64_t row = top; row < bottom; ++row) {
        T* to = panel + (row - top) * kWidth;
        std::copy_n(dense.data + row * dense.stride + c, used, to);
        std::fill(to + used, to + round_up(used, kLine), T{0});
      }
    }
    return {begin, blocks_, count, index_.data(), panel, kWidth, used};
  }

  // With several blocks of rows a panel serves so many columns that its copy does not count.
  int64_t group(int64_t from, int64_t to) const {
    return blocks_ == 1 ? to - from : std::min(to - from, kGroup);
  }

  void dots(Worker& w, int64_t from, int64_t to) {
    const int64_t d = grad_recon.width;
    for (int64_t j = from, step = group(from, to); j < to; j += step) {
      const int64_t count = std::min(to - j, step);
      const bool here = in_place(j, count, grad_recon);
      const int64_t span = here && d % kLine == 0 ? d : kWidth;
      for (int64_t c = 0; c < d; c += span) {
        for (int64_t r = 0; r < blocks_; ++r) {
          SparseLists<T> rows_of_grad = lists(w, j, count, grad_recon, r, c, here);
          rows_of_grad.width = std::min(rows_of_grad.width, span);
          sparse_kernels<T>().dots(rows_of_grad, W_dec + (first_ + j) * W_dec_stride + c,
                                   W_dec_stride, value_.data());
        }
      }
    }
  }

  // What has no depth, and the sums of db_enc.
  void finish(int64_t from, int64_t to) {
    std::vector<uint32_t> planes_memory;
    std::vector<int32_t> products, digit_products;
    const bool listed = signs != nullptr && signs->lists != nullptr;
    const bool computed = signs != nullptr && !listed && signs->planes[0] == nullptr;
    Scratch scratch(computed ? kernels().covariance_scratch : 0);
    std::optional<SignRow> row;
    if (listed) row.emplace(*signs->lists);
    std::vector<double> counts_signs;  // n^T S, integers
    for (int64_t j0 = from; j0 < to; j0 += kernels().strip) {
      const int64_t j1 = std::min(to, j0 + kernels().strip);
      if (signs != nullptr) {
        products.assign(begin_of(j1) - begin_of(j0), 0);
        digit_products.assign((j1 - j0) * n_digits, 0);
        counts_signs.assign(j1 - j0, 0);
        if (listed) {
          list_signs(*row, j0, j1, products.data(), counts_signs.data());
        } else if (!products.empty()) {
          const uint32_t* planes[2];
          const int64_t planes_stride =
              signs->strip(first_ + j0, j1 - j0, planes_memory, scratch.get(), planes);
          count_signs(j0, j1, planes, planes_stride, products.data(), digit_products.data());
        }
      }
      for (int64_t j = j0; j < j1; ++j) {
        const int64_t column = first_ + j;
        double sum = 0;
        for (int64_t b = 0; signs != nullptr && !listed && b < n_digits; ++b) {
          counts_signs[j - j0] +=
              static_cast<double>(int64_t{1} << b) * digit_products[(j - j0) * n_digits + b];
        }
        for (int64_t r = 0; r < blocks_; ++r) {
          for (int64_t e = begin_[j * blocks_ + r]; e < begin_[j * blocks_ + r + 1]; ++e) {
            T g = value_[e];
            if (shift != nullptr) g += shift[column];
            if (curvature != nullptr) {
              const uint32_t* row = rows + (r * block_rows_ + index_[e]) * rows_stride;
              const bool bit = (row[column / kWordBits] >> column % kWordBits & 1) != 0;
              g += bit ? -curvature[column] : curvature[column];
            }
            if (signs != nullptr) {
              // both terms are integers below 2^53: the difference is exact
              const double product = products[e - begin_of(j0)];
              g += static_cast<T>(
                  (static_cast<double>(signs->n_rows) * product - counts_signs[j - j0]) * scale);
            }
            value_[e] = g;
            sum += g;
          }
        }
        column_sum[column] = sum;
      }
    }
  }

  // B S of the entries of columns j0 .. j1, and n^T S of these, from lists.
  void list_signs(SignRow& row, int64_t j0, int64_t j1, int32_t* products,
                  double* counts_signs) const {
    std::vector<int32_t> row_of;  // of the entries of a column
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t count = begin_of(j + 1) - begin_of(j);
      if (count == 0) continue;
      int32_t* const out = products + begin_of(j) - begin_of(j0);
      row.make(first_ + j);
      counts_signs[j - j0] = row.counts_signs();
      row_of.resize(count);
      for (int64_t r = 0, e = 0; r < blocks_; ++r) {
        for (const int64_t end = begin_[j * blocks_ + r + 1] - begin_of(j); e < end; ++e) {
          row_of[e] = static_cast<int32_t>(r * block_rows_ + index_[begin_of(j) + e]);
        }
      }
      row.listed(row_of.data(), count, out);
      for (int64_t r = 0; r < blocks_; ++r) {
        const int64_t at = begin_[j * blocks_ + r];
        row.add_dense(r * block_rows_, index_.data() + at, begin_[j * blocks_ + r + 1] - at,
                      out + at - begin_of(j));
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
          s.rows = rows + r * block_rows_ * rows_stride + w;
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
    const int64_t d = x.width;
    for (int64_t j0 = from, step = group(from, to); j0 < to; j0 += step) {
      const int64_t j1 = std::min(to, j0 + step), few = std::min(step, kPanelRows);
      // columns that a panel serves
      const bool here = in_place(j0, blocks_ == 1 ? j1 - j0 : std::min(few, j1 - j0), x);
      for (int64_t c = 0; c < d; c += kWidth) {
        for (int64_t j = j0; j < j1; j += few) {
          const int64_t count = std::min(j1 - j, few);
          for (int64_t row = 0; row < count; ++row) {
            std::fill_n(out + row * kPitch, std::min(d - c, kWidth), T{0});
          }
          for (int64_t r = 0; r < blocks_; ++r) {
            SparseLists<T> rows_of_x = lists(w, j, count, x, r, c, here);
            rows_of_x.width = std::min(rows_of_x.width, kWidth);
            sparse_kernels<T>().sums(rows_of_x, value_.data(), out, kPitch);
          }
          sparse_kernels<T>().transpose(out, kPitch, count, std::min(d - c, kWidth),
                                        grad_W + c * k + first_ + j, k);
        }
      }
    }
  }

  void input_gradient() {
    const int64_t columns = last_ - first_, groups = (columns + kPanelRows - 1) / kPanelRows;
    std::vector<int64_t> list_begin(groups * (n + 1));
    std::vector<uint16_t> column(begin_.back());
    std::vector<T> value(begin_.back());
    parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
      for (int64_t g = from; g < to; ++g) {
        const int64_t j0 = g * kPanelRows, count = std::min(columns - j0, kPanelRows);
        int64_t next[kPanelRows], at = begin_of(j0);
        for (int64_t j = 0; j < count; ++j) next[j] = begin_of(j0 + j);
        for (int64_t row = 0; row < n; ++row) {
          list_begin[g * (n + 1) + row] = at;
          const int32_t end = entries_before(row, first_ + j0 + count);
          for (int32_t e = entries_before(row, first_ + j0); e < end; ++e) {
            const int64_t j = entries[e] - first_ - j0;
            column[at] = static_cast<uint16_t>(j);
            value[at++] = value_[next[j]++];
          }
        }
        list_begin[g * (n + 1) + n] = at;
      }
    });
    const int64_t threads = get_num_threads(), d = x.width;
    const int64_t width = std::min(kWidth, round_up((d + threads - 1) / threads, kLine));
    parallel_for(0, (d + width - 1) / width, 1, [&](int64_t from, int64_t to) {
      Scratch scratch(kPanelRows * kPitch * sizeof(T));
      T* const panel = reinterpret_cast<T*>(scratch.get());
      for (int64_t c = from * width; c < std::min(to * width, d); c += width) {
        const int64_t used = std::min(d - c, width);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t j0 = g * kPanelRows, count = std::min(columns - j0, kPanelRows);
          sparse_kernels<T>().transpose(W_enc + c * W_enc_stride + first_ + j0, W_enc_stride, used,
                                        count, panel, kPitch);
          sparse_kernels<T>().sums(
              {list_begin.data() + g * (n + 1), 1, n, column.data(), panel, kPitch, used},
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

}  // namespace

// The columns of the ones of rows that count, in one int32 tensor: where each row begins [n + 1],
// then the columns, rising in each row. Empty where they are more than `most`.
Tensor list_window(Tensor window, std::optional<Tensor> keep, int64_t most) {
  const int64_t n = window.size(0);
  most = std::min<int64_t>(most, INT32_MAX);
  const FoundBits bits = find_bits(window, window.size(1), data_or_null<bool>(keep), most,
                                   [](int64_t j) { return static_cast<int32_t>(j); });
  if (bits.total > most) return new_empty(ScalarType::Int, 0);
  Tensor out = new_empty(ScalarType::Int, n + 1 + bits.total);
  int32_t* const begin = mutable_data<int32_t>(out);
  begin[0] = 0;
  for (int64_t r = 0; r < n; ++r) begin[r + 1] = begin[r] + bits.length[r];
  int32_t* to = begin + n + 1;
  for (const auto& block : bits.blocks) to = std::copy(block.begin(), block.end(), to);
  return out;
}

// Gradients of x, W_enc and b_enc (in float64) for the entries inside the window, listed by
// list_window; an empty grad_x or grad_W is not asked for.
void sparse_backward(Tensor entries, Tensor words, std::optional<Tensor> grad_recon, Tensor W_dec,
                     std::optional<Tensor> shift, std::optional<Tensor> curvature, bool covariance,
                     std::optional<Tensor> signs, std::optional<Tensor> columns,
                     std::optional<Tensor> ranks, std::optional<Tensor> counted,
                     std::optional<Tensor> at_hand, Tensor counts, int64_t n_rows,
                     std::optional<Tensor> digits, double scale, Tensor x, Tensor W_enc,
                     Tensor grad_x, Tensor grad_W, Tensor column_sum) {
  const std::optional<Tensor> lists[] = {ranks, counted, at_hand};
  const Statistics statistics(signs, columns, lists, counts, n_rows);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    SparseBackward<T> b{};
    b.n = x.size(0), b.k = column_sum.numel();
    b.row_begin = data<int32_t>(entries), b.entries = b.row_begin + b.n + 1;
    b.rows = matrix<uint32_t>(words, &b.rows_stride);
    if (grad_recon.has_value()) {
      b.grad_recon = {data<T>(*grad_recon), row_stride(*grad_recon), grad_recon->size(1)};
      b.W_dec = matrix<T>(W_dec, &b.W_dec_stride);
    }
    b.shift = data_or_null<T>(shift);
    b.curvature = data_or_null<T>(curvature);
    if (covariance) {
      b.signs = &statistics.source;
      b.digits = data_or_null<uint32_t>(digits);
      b.n_digits = digits.has_value() ? digits->size(0) : 0;
      b.scale = scale;
    }
    b.x = {data<T>(x), row_stride(x), x.size(1)};
    b.W_enc = matrix<T>(W_enc, &b.W_enc_stride);
    b.grad_x = grad_x.numel() > 0 ? mutable_data<T>(grad_x) : nullptr;
    b.grad_W = grad_W.numel() > 0 ? mutable_data<T>(grad_W) : nullptr;
    b.column_sum = mutable_data<double>(column_sum);
    b.run();
  };
  x.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace bae_fast
