// Transposes and counts of packed bits.
#include "operators.h"

namespace bae_fast {
namespace {

// Column-packed words with a stride for kernels: whole strips of columns, and an odd number (5
// modulo 8) of cache lines, so that the words of one column do not share a set of the cache.
int64_t padded_stride(int64_t columns) {
  int64_t stride = round_up(columns, kStrip);
  while (stride / 16 % 8 != 5) stride += 16;
  return stride;
}

// Columns that are taken at once, and how many such spans a thread takes at least: those of a small
// step are done sooner than a thread wakes.
constexpr int64_t kSpan = 512, kWordsOfThread = 1 << 16;

int64_t spans_of(int64_t columns) { return (columns + kSpan - 1) / kSpan; }

int64_t spans_of_thread(int64_t rows) {
  return 1 + kWordsOfThread / std::max<int64_t>(rows * (kSpan / kWordBits), 1);
}

void transpose_rows(const uint32_t* words, int64_t stride, int64_t n, int64_t columns,
                    uint32_t* out, int64_t out_stride) {
  parallel_for(0, n_words(n), 8, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t first = m * kWordBits;
      uint32_t* to = out + m * out_stride;
      kernels().transpose(words + first * stride, stride, std::min(n - first, kWordBits), columns,
                          to, 1);
      std::fill(to + columns, to + out_stride, 0);
    }
  });
}

}  // namespace

// Row-packed [N, W] to column-packed [ceil(N/32), stride >= K], zero past column K.
Tensor rows_to_columns(Tensor words, int64_t n_columns) {
  const int64_t n = words.size(0), stride = padded_stride(n_columns);
  Tensor out = new_empty(ScalarType::Int, n_words(n), stride);
  transpose_rows(data<uint32_t>(words), row_stride(words), n, n_columns,
                 mutable_data<uint32_t>(out), stride);
  return out;
}

// Row-packed [N, W] to feature-packed without alignment, [K, ceil(N/32)].
Tensor rows_to_features(Tensor words, int64_t n_columns) {
  const int64_t n = words.size(0), m = n_words(n), stride = row_stride(words);
  Tensor out = new_empty(ScalarType::Int, n_columns, m);
  const uint32_t* in = data<uint32_t>(words);
  uint32_t* to = mutable_data<uint32_t>(out);
  parallel_for(0, spans_of(n_columns), spans_of_thread(n), [&](int64_t begin, int64_t end) {
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
  Tensor counts = new_zeros(ScalarType::Long, n_columns);
  const uint32_t* in = data<uint32_t>(words);
  int64_t* out = mutable_data<int64_t>(counts);
  parallel_for(0, spans_of(n_columns), spans_of_thread(n), [&](int64_t begin, int64_t end) {
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

// Ones in all of the words.
int64_t count_ones(Tensor words) {
  const int64_t n = words.size(0), width = words.size(1), stride = row_stride(words);
  const uint32_t* in = data<uint32_t>(words);
  std::atomic<int64_t> total{0};
  const int64_t grain = 1 + kWordsOfThread / std::max<int64_t>(width, 1);
  parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    int64_t counts[kSpan] = {}, sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t w = 0; w < width; w += kSpan) {
        kernels().column_counts(in + row * stride + w, 0, 1, std::min(width - w, kSpan), counts);
      }
    }
    for (const int64_t count : counts) sum += count;
    total += sum;
  });
  return total;
}

}  // namespace bae_fast
