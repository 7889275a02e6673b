// Kernels of the encoder's backward on listed entries, and of sums of listed rows, once for every
// instruction set; included after kernels_impl.h, whose `Vector` counts bits here too.
//
// A list names rows of a panel: a block of a dense matrix, copied so that its rows lie one after
// the other and stay in the outer cache of a core, zero up to whole registers. With i_0, i_1, ..
// the list of output j,
//
//     dots    value_k += panel_(i_k) . weight_j       a gradient at the bits, of one entry
//     sums    out_j   += sum_k value_k panel_(i_k)    a column of dW_enc or a row of dx
//
// Both read a row of the panel once an entry and keep all else in registers: eight sums of
// products, or one output. They wait for the outer cache.

namespace bae_fast {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif
constexpr int kDots = 8;             // entries taken at once
constexpr int kOutputRegisters = 8;  // of an output, kept over its list
constexpr int64_t kAhead = 8;        // rows of the weight
constexpr int64_t kSoon = 3;         // listed rows, which lie anywhere

template <typename T, int64_t kBytes>
struct Numbers {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T>
using Register = typename Numbers<T, kRegisterBytes>::type;

template <typename V, typename T>
inline V load_numbers(const T* from) {
  V out;
  __builtin_memcpy(&out, from, sizeof(out));
  return out;
}

// As many bf16 numbers as a register holds of fp32, widened.
template <typename V>
inline V load_numbers(const uint16_t* from) {
  typename Numbers<uint16_t, kRegisterBytes / 2>::type half;
  __builtin_memcpy(&half, from, sizeof(half));
  return reinterpret_cast<V>(__builtin_convertvector(half, Register<uint32_t>) << 16);
}

// sum + a b; one rounding where the level has the instruction.
#if defined(__AVX512F__)
inline Register<float> multiply_add(Register<float> a, Register<float> b, Register<float> sum) {
  return reinterpret_cast<Register<float>>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
}
inline Register<double> multiply_add(Register<double> a, Register<double> b, Register<double> sum) {
  return reinterpret_cast<Register<double>>(_mm512_fmadd_pd(
      reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(sum)));
}
#elif defined(__FMA__)
inline Register<float> multiply_add(Register<float> a, Register<float> b, Register<float> sum) {
  return reinterpret_cast<Register<float>>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
}
inline Register<double> multiply_add(Register<double> a, Register<double> b, Register<double> sum) {
  return reinterpret_cast<Register<double>>(_mm256_fmadd_pd(
      reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(sum)));
}
#else
template <typename V>
inline V multiply_add(V a, V b, V sum) {
  return sum + a * b;
}
#endif

template <typename T, int64_t kBytes>
inline T sum_halves(typename Numbers<T, kBytes>::type v) {
  if constexpr (kBytes == static_cast<int64_t>(sizeof(T))) {
    return v[0];
  } else {
    typename Numbers<T, kBytes / 2>::type half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    return sum_halves<T, kBytes / 2>(half[0] + half[1]);
  }
}

// value[k] += panel rows index[k] . weight for `used` entries, at most kCount; the last is taken
// again for those past it.
template <int kCount, typename T>
inline void dots_of(const SparseLists<T>& s, const uint16_t* index, int64_t used, const T* weight,
                    int64_t padded, T* value) {
  using V = Register<T>;
  constexpr int64_t kNumbers = kRegisterBytes / sizeof(T);
  const T* row[kCount];
  V sum[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    row[k] = s.panel + index[k < used ? k : used - 1] * s.panel_stride;
    sum[k] = V{};
  }
  for (int64_t c = 0; c < padded; c += kNumbers) {
    const V w = load_numbers<V>(weight + c);
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) sum[k] = multiply_add(load_numbers<V>(row[k] + c), w, sum[k]);
  }
  T total[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) total[k] = sum_halves<T, kRegisterBytes>(sum[k]);
  for (int64_t k = 0; k < used; ++k) value[k] += total[k];
}

template <typename T>
inline void sparse_dots(const SparseLists<T>& s, const T* weight, int64_t weight_stride, T* value) {
  constexpr int64_t kNumbers = kRegisterBytes / sizeof(T);
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t padded = round_up(s.width, kNumbers);
  alignas(64) T tail[kPanelBytes / sizeof(T)];
  for (int64_t j = 0; j < s.count; ++j) {
    const T* w = weight + j * weight_stride;
    const int64_t soon = (j + kAhead) * s.step;
    // rows are far apart: the hardware does not see them come
    if (j + kAhead < s.count && s.begin[soon] < s.begin[soon + 1]) {
      const T* next = w + kAhead * weight_stride;
      for (int64_t c = 0; c < s.width; c += kLine) __builtin_prefetch(next + c, 0, 2);
    }
    int64_t k = s.begin[j * s.step];
    const int64_t end = s.begin[j * s.step + 1];
    if (k == end) continue;
    if (padded != s.width) {
      for (int64_t c = 0; c < padded; ++c) tail[c] = c < s.width ? w[c] : 0;
      w = tail;
    }
    for (; end - k > kDots / 2; k += kDots) {
      const int64_t used = end - k < kDots ? end - k : kDots;
      dots_of<kDots>(s, s.index + k, used, w, padded, value + k);
    }
    if (k < end) dots_of<kDots / 2>(s, s.index + k, end - k, w, padded, value + k);
  }
}

// out[0 .. registers) += sum of the listed rows by their values, from column c.
template <int kCount, typename T>
inline void sums_of(const SparseLists<T>& s, int64_t c, int64_t begin, int64_t end, const T* value,
                    T* out, int64_t used) {
  using V = Register<T>;
  constexpr int64_t kNumbers = kRegisterBytes / sizeof(T), kLine = 64 / sizeof(T);
  alignas(64) T edge[kCount * kNumbers] = {};
  const bool whole = used >= kCount * kNumbers;
  if (!whole) __builtin_memcpy(edge, out, used * sizeof(T));
  T* const at = whole ? out : edge;
  V sum[kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) sum[r] = V{};
  for (int64_t k = begin; k < end; ++k) {
    const T* row = s.panel + s.index[k] * s.panel_stride + c;
    const V factor = value[k] - V{};
    if (k + kSoon < end) {
      const T* soon = s.panel + s.index[k + kSoon] * s.panel_stride + c;
      for (int64_t at = 0; at < kCount * kNumbers; at += kLine) __builtin_prefetch(soon + at);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      sum[r] = multiply_add(load_numbers<V>(row + r * kNumbers), factor, sum[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    sum[r] += load_numbers<V>(at + r * kNumbers);
    __builtin_memcpy(at + r * kNumbers, &sum[r], sizeof(V));
  }
  if (!whole) __builtin_memcpy(out, edge, used * sizeof(T));
}

template <typename T>
inline void sparse_sums(const SparseLists<T>& s, const T* value, T* out, int64_t out_stride) {
  constexpr int64_t kNumbers = kRegisterBytes / sizeof(T);
  for (int64_t j = 0; j < s.count; ++j) {
    const int64_t begin = s.begin[j * s.step], end = s.begin[j * s.step + 1];
    if (begin == end) continue;
    T* to = out + j * out_stride;
    int64_t c = 0;
    for (; c + kOutputRegisters * kNumbers <= s.width; c += kOutputRegisters * kNumbers) {
      sums_of<kOutputRegisters>(s, c, begin, end, value, to + c, s.width - c);
    }
    for (; c + 4 * kNumbers <= s.width; c += 4 * kNumbers) {
      sums_of<4>(s, c, begin, end, value, to + c, s.width - c);
    }
    for (; c < s.width; c += kNumbers) {
      sums_of<1>(s, c, begin, end, value, to + c, s.width - c);
    }
  }
}

// out [columns, rows] = in [rows, columns], transposed: a square of one cache line a side at most.
template <typename T>
inline void transpose_square(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                             int64_t out_stride) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(uint32_t)) {
    if (rows == 16 && columns == 16) {
      __m512i a[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * in_stride);
      transpose_16(a);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * out_stride, a[i]);
      return;
    }
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) out[j * out_stride + i] = in[i * in_stride + j];
  }
}

// The side whose rows are farther apart is in memory and is walked along them, the other is in a
// cache.
template <typename T>
inline void transpose_numbers(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                              int64_t out_stride) {
  constexpr int64_t kSide = 64 / sizeof(T);
  const bool along_in = in_stride > out_stride;
  const int64_t outer = along_in ? rows : columns, inner = along_in ? columns : rows;
  for (int64_t a = 0; a < outer; a += kSide) {
    for (int64_t b = 0; b < inner; b += kSide) {
      const int64_t r = along_in ? a : b, c = along_in ? b : a;
      transpose_square(in + r * in_stride + c, in_stride, rows - r < kSide ? rows - r : kSide,
                       columns - c < kSide ? columns - c : kSide, out + c * out_stride + r,
                       out_stride);
    }
  }
}

// out[k] += popcount(row_k & above) - popcount(row_k & below): (B S)_nj of listed rows n.
void sign_counts(const SignCounts& s) {
  using Counts = typename Vector::Counts;
  constexpr int kRows = 4, kLanes = Vector::kLanes;
  const int64_t whole = s.words / kLanes;  // registers
  for (int64_t k = 0; k < s.count; k += kRows) {
    const int64_t used = s.count - k < kRows ? s.count - k : kRows;
    const uint32_t* row[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = k + (r < used ? r : used - 1);
      row[r] = s.rows + (s.index != nullptr ? s.index[at] : at) * s.rows_stride;
    }
    Counts counts[kRows];
    for (int r = 0; r < kRows; ++r) counts[r] = Vector::no_counts();
    for (int64_t v0 = 0; v0 < whole; v0 += Vector::kFlush) {
      const int64_t v1 = whole - v0 < Vector::kFlush ? whole : v0 + Vector::kFlush;
      typename Vector::Partial above[kRows], below[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) above[r] = below[r] = Vector::zero();
      for (int64_t v = v0; v < v1; ++v) {
        const int64_t w = v * kLanes;
        const typename Vector::Words p = Vector::load(s.above + w), m = Vector::load(s.below + w);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const typename Vector::Words bits = Vector::load(row[r] + w);
          above[r] = Vector::add_count(above[r], bits, p);
          below[r] = Vector::add_count(below[r], bits, m);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        counts[r] = Vector::add(counts[r], Vector::widen(above[r]));
        counts[r] = Vector::subtract(counts[r], Vector::widen(below[r]));
      }
    }
    for (int64_t r = 0; r < used; ++r) {
      int32_t lanes[kLanes], total = 0;
      __builtin_memcpy(lanes, &counts[r], sizeof(lanes));
      for (int32_t lane : lanes) total += lane;
      for (int64_t w = whole * kLanes; w < s.words; ++w) {
        total += static_cast<int32_t>(popcount(row[r][w] & s.above[w]));
        total -= static_cast<int32_t>(popcount(row[r][w] & s.below[w]));
      }
      s.out[k + r] += total;
    }
  }
}

// Pairs of words that are not zero are brought together first: few are in a sparse code, and which
// ones no processor guesses.
int64_t set_bits(const uint32_t* words, int64_t n, int32_t* out) {
  constexpr int64_t kAtOnce = 512, kLine = 16;
  uint64_t some[(kAtOnce + kLine) / 2];
  int32_t place[(kAtOnce + kLine) / 2];
  int64_t found = 0;
  for (int64_t first = 0; first < n; first += kAtOnce) {
    const int64_t end = n - first < kAtOnce ? n : first + kAtOnce;
    int64_t w = first, used = 0;
#if defined(__AVX512F__)
    const __m256i lanes = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
    for (; w + kLine <= end; w += kLine) {
      const __m512i line = _mm512_loadu_si512(words + w);
      const __mmask8 any = _mm512_test_epi64_mask(line, line);
      const __m256i places = _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int32_t>(w)));
      _mm512_storeu_si512(some + used, _mm512_maskz_compress_epi64(any, line));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + used),
                          _mm256_maskz_compress_epi32(any, places));
      used += __builtin_popcount(any);
    }
#endif
    while (w < end) {
      const int64_t to = end - w < kLine ? end : w + kLine;
      uint32_t any = 0;
      for (int64_t v = w; v < to; ++v) any |= words[v];
      if (any == 0) w = to;
      for (; w < to; w += 2) {
        uint64_t pair = words[w];
        if (w + 1 < to) __builtin_memcpy(&pair, words + w, sizeof(pair));
        some[used] = pair;
        place[used] = static_cast<int32_t>(w);
        used += pair != 0;
      }
    }
    for (int64_t u = 0; u < used; ++u) {
      const int32_t column = place[u] * 32;
      uint64_t rest = some[u];
      do {
        out[found++] = column + __builtin_ctzll(rest);
        rest &= rest - 1;
      } while (rest != 0);
    }
  }
  return found;
}

// out[0 .. columns) (+)= the sum of kCount rows.
template <int kCount, typename N>
inline void add_few_rows(const ListedRows& s, const int32_t* list, bool add) {
  using V = Register<float>;
  constexpr int64_t kNumbers = kRegisterBytes / sizeof(float);
  const N* row[kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    row[r] = static_cast<const N*>(s.dense) + list[r] * s.dense_stride;
  }
  int64_t c = 0;
  for (; c + kNumbers <= s.columns; c += kNumbers) {
    V sum = load_numbers<V>(row[0] + c);
#pragma GCC unroll 8
    for (int r = 1; r < kCount; ++r) sum += load_numbers<V>(row[r] + c);
    if (add) sum += load_numbers<V>(s.out + c);
    __builtin_memcpy(s.out + c, &sum, sizeof(V));
  }
  for (; c < s.columns; ++c) {
    float sum = number(row[0][c]);
    for (int r = 1; r < kCount; ++r) sum += number(row[r][c]);
    s.out[c] = add ? s.out[c] + sum : sum;
  }
}

template <typename N>
inline void add_rows_of(const ListedRows& s) {
  int64_t k = 0;
  for (; k + 8 <= s.count; k += 8) add_few_rows<8, N>(s, s.list + k, s.add || k > 0);
  const int64_t rest = s.count - k;
  if (rest & 4) add_few_rows<4, N>(s, s.list + k, s.add || k > 0);
  k += rest & 4;
  if (rest & 2) add_few_rows<2, N>(s, s.list + k, s.add || k > 0);
  k += rest & 2;
  if (rest & 1) add_few_rows<1, N>(s, s.list + k, s.add || k > 0);
}

void add_listed_rows(const ListedRows& s) {
  if (s.count == 0 && !s.add) {
    __builtin_memset(s.out, 0, s.columns * sizeof(float));
  } else if (s.half) {
    add_rows_of<uint16_t>(s);
  } else {
    add_rows_of<float>(s);
  }
}

constexpr Kernels with_sparse(Kernels k) {
  k.sparse_f32 = {sparse_dots<float>, sparse_sums<float>, transpose_numbers<float>};
  k.sparse_f64 = {sparse_dots<double>, sparse_sums<double>, transpose_numbers<double>};
  k.sign_counts = sign_counts;
  k.set_bits = set_bits;
  k.add_listed_rows = add_listed_rows;
  return k;
}

}  // namespace
}  // namespace bae_fast
