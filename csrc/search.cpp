// The search for a code: bits of a row are flipped while that lowers the squared error and the
// price of the bits together.
#include "operators.h"

namespace bae_fast {

// Flips bits in words [N, ceil(K / 32)], the one that gains most first, and returns how many in
// each row, int32 [N].
//
// projection [N, K] is (x - x_hat) D^T of the words as they come, D [K, d] what each bit adds to
// x_hat; gram [K, K] is D D^T. Turning bit j on gains projection - on[j], turning it off gains
// off[j] - projection, both in halves of the objective. A flip of bit i changes the projection by
// -gram[i], or gram[i] where it is turned off. What the projection holds on return is of no use.
Tensor search(Tensor projection, Tensor gram, Tensor on, Tensor off, int64_t most, double least,
              Tensor words) {
  const int64_t n = projection.size(0), columns = projection.size(1), stride = row_stride(words);
  Tensor flips = new_empty(ScalarType::Int, n);
  float* const gains = mutable_data<float>(projection);
  const float* const to_on = data<float>(on);
  const float* const to_off = data<float>(off);
  uint32_t* const bits = mutable_data<uint32_t>(words);
  int32_t* const count = mutable_data<int32_t>(flips);
  const Kernels& k = kernels();
  const int64_t blocks = (columns + kSearchBlock - 1) / kSearchBlock;
  parallel_for(0, n, 8, [&](int64_t begin, int64_t end) {
    const Scratch scratch((columns + blocks) * static_cast<int64_t>(sizeof(float)));
    float* const direction = reinterpret_cast<float*>(scratch.get());
    for (int64_t r = begin; r < end; ++r) {
      float* const gain = gains + r * columns;
      uint32_t* const row = bits + r * stride;
      for (int64_t j = 0; j < columns; ++j) {
        const bool is_on = (row[j / kWordBits] >> (j % kWordBits) & 1) != 0;
        direction[j] = is_on ? -1.0f : 1.0f;
        gain[j] = is_on ? to_off[j] - gain[j] : gain[j] - to_on[j];
      }
      count[r] = static_cast<int32_t>(
          k.search_row({gain, direction, direction + columns, data<float>(gram), columns, most,
                        static_cast<float>(least)}));
      if (count[r] == 0) continue;
      for (int64_t j = 0; j < columns; j += kWordBits) {
        uint32_t word = 0;
        for (int64_t t = 0; t < kWordBits && j + t < columns; ++t) {
          word |= static_cast<uint32_t>(direction[j + t] < 0) << t;
        }
        row[j / kWordBits] = word;
      }
    }
  });
  return flips;
}

}  // namespace bae_fast
