// Runs every kernel of a level against a plain loop, in buffers of exactly the size that
// csrc/kernels.h grants, at shapes around every block edge.
//
// It is C++ without torch so that it links the kernels' objects alone: those of the shipped build,
// of a sanitized one, or of a cross compiler under an emulator. It lies with the tests because
// csrc/ holds what is built into the extension, and nothing else.
//
//     kernels_driver heap|front|back[,...] [level ...]    all levels of this CPU if none is named
//
//     heap    buffers end with their block on the heap, where AddressSanitizer looks
//     back    buffers end at a page that faults: this also sees what AddressSanitizer does not,
//             loads and stores of AMX tiles and masked lanes
//     front   buffers start behind such a page
//
// Numbers are integers, or quarters, small enough for every sum to be exact in any order: a result
// is right or wrong. Of the screen, which has others too, only what rounding in float64 leaves open
// is left out. The first wrong one, and a fault, print the case and end the program.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "layout.h"

namespace {

using namespace bae_fast;

enum class Place { kHeap, kFront, kBack };
Place place = Place::kHeap;

// ---- cases --------------------------------------------------------------------------------------

char current_case[512];
int64_t cases = 0;

__attribute__((format(printf, 1, 2))) void begin(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(current_case, sizeof(current_case), format, values);
  va_end(values);
  ++cases;
}

void on_signal(int number) {
  // only calls that a signal handler may make
  const char* name = number == SIGSEGV || number == SIGBUS ? "fault in "
                     : number == SIGILL                    ? "illegal instruction in "
                                                           : "stopped in ";
  (void)!write(2, name, strlen(name));
  (void)!write(2, current_case, strlen(current_case));
  (void)!write(2, "\n", 1);
  _exit(2);
}

[[noreturn]] void wrong(const char* what, int64_t row, int64_t column, double got, double want) {
  fprintf(stderr, "wrong %s at (%lld, %lld): %.17g, not %.17g, in %s\n", what,
          static_cast<long long>(row), static_cast<long long>(column), got, want, current_case);
  exit(1);
}

template <typename A, typename B>
void equal(const char* what, int64_t row, int64_t column, A got, B want) {
  if (!(static_cast<double>(got) == static_cast<double>(want))) {
    wrong(what, row, column, static_cast<double>(got), static_cast<double>(want));
  }
}

// ---- memory and numbers -------------------------------------------------------------------------

uint64_t state = 1;

uint64_t random_bits() {  // splitmix64
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

int64_t random_between(int64_t low, int64_t high) {
  // ranges are below 2^32: a product takes the place of a slow remainder
  const uint64_t range = static_cast<uint64_t>(high - low + 1);
  return low + static_cast<int64_t>((random_bits() >> 32) * range >> 32);
}

// `size` elements and not one more, filled with random bits or with zeros.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, size_t align = alignof(T))
      : size_(size), bytes_(static_cast<size_t>(size) * sizeof(T)) {
    if (place == Place::kHeap) {
      void* memory = nullptr;
      if (align < sizeof(void*)) align = sizeof(void*);
      if (posix_memalign(&memory, align, bytes_) != 0) abort();
      mapped_ = memory;
      data_ = static_cast<T*>(memory);
    } else {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t inner = (bytes_ + page - 1) / page * page;
      length_ = inner + 2 * page;
      mapped_ = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped_ == MAP_FAILED) abort();
      char* const first = static_cast<char*>(mapped_) + page;
      if (inner > 0 && mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) abort();
      char* const at = place == Place::kFront ? first : first + inner - bytes_;
      if (reinterpret_cast<uintptr_t>(at) % align != 0) abort();
      data_ = reinterpret_cast<T*>(at);
    }
    fill();
  }
  ~Buffer() {
    if (place == Place::kHeap) {
      free(mapped_);
    } else {
      munmap(mapped_, length_);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void fill() {
    unsigned char* to = reinterpret_cast<unsigned char*>(data_);
    for (size_t i = 0; i < bytes_; i += sizeof(uint64_t)) {
      const uint64_t bits = random_bits();
      memcpy(to + i, &bits, std::min(bytes_ - i, sizeof(bits)));
    }
  }
  void zero() const {
    for (int64_t i = 0; i < size_; ++i) data_[i] = 0;
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  std::vector<T> copy() const { return std::vector<T>(data_, data_ + size_); }

 private:
  int64_t size_;
  size_t bytes_, length_ = 0;
  void* mapped_;
  T* data_;
};

// Elements of a matrix whose rows are `stride` apart and whose last row has `used`.
int64_t extent(int64_t rows, int64_t stride, int64_t used) {
  return rows == 0 ? 0 : (rows - 1) * stride + used;
}

// A dense matrix of bits. Columns are constant, rare or random.
struct Bits {
  int64_t rows, columns;
  std::vector<uint8_t> bit;

  Bits(int64_t rows_, int64_t columns_) : rows(rows_), columns(columns_), bit(rows_ * columns_) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t density = c % 7 == 0 ? 0 : c % 7 == 1 ? 100 : c % 7 == 2 ? 3 : 20 * (c % 5);
      for (int64_t r = 0; r < rows; ++r) at(r, c) = random_between(0, 99) < density;
    }
  }
  uint8_t& at(int64_t row, int64_t column) { return bit[row * columns + column]; }
  uint8_t at(int64_t row, int64_t column) const { return bit[row * columns + column]; }

  // Row-packed: zero past the last column, random between the rows.
  void pack_rows(const Buffer<uint32_t>& out, int64_t stride) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t w = 0; w < n_words(columns); ++w) {
        uint32_t word = 0;
        for (int64_t b = 0; b < 32 && w * 32 + b < columns; ++b) {
          word |= static_cast<uint32_t>(at(r, w * 32 + b)) << b;
        }
        out[r * stride + w] = word;
      }
    }
  }
  // Column-packed: zero past the last row and past the last column.
  void pack_columns(const Buffer<uint32_t>& out, int64_t stride) const {
    out.zero();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        out[r / 32 * stride + c] |= static_cast<uint32_t>(at(r, c)) << r % 32;
      }
    }
  }
};

const int64_t kEdges[] = {1,  2,  15,  16,  17,  31,  32,  33,  47,  48,  49, 63,
                          64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513};

// ---- kernels ------------------------------------------------------------------------------------

void test_transpose(const Kernels& k) {
  for (int64_t rows : {1, 2, 15, 16, 17, 31, 32}) {
    for (int64_t columns : kEdges) {
      for (int64_t out_stride : {1, 3}) {
        const int64_t words = n_words(columns), in_stride = words + rows % 3;
        begin("%s transpose: rows %lld, columns %lld, in_stride %lld, out_stride %lld", k.name,
              (long long)rows, (long long)columns, (long long)in_stride, (long long)out_stride);
        const Bits bits(rows, columns);
        Buffer<uint32_t> in(extent(rows, in_stride, words));
        Buffer<uint32_t> out(extent(columns, out_stride, 1));
        bits.pack_rows(in, in_stride);
        const std::vector<uint32_t> before = out.copy();
        k.transpose(in.get(), in_stride, rows, columns, out.get(), out_stride);
        for (int64_t i = 0; i < out.size(); ++i) {
          uint32_t want = before[i];
          if (i % out_stride == 0) {
            want = 0;
            for (int64_t r = 0; r < rows; ++r) {
              want |= static_cast<uint32_t>(bits.at(r, i / out_stride)) << r;
            }
          }
          equal("word", i / out_stride, i % out_stride, out[i], want);
        }
      }
    }
  }
}

void test_column_counts(const Kernels& k) {
  for (int64_t words : {1, 2, 3, 32, 33}) {
    for (int64_t n : kEdges) {
      const int64_t stride = n + words % 2 * 5;
      begin("%s column_counts: words %lld, columns %lld, stride %lld", k.name, (long long)words,
            (long long)n, (long long)stride);
      Buffer<uint32_t> columns(words * stride);
      Buffer<int64_t> counts(n);
      for (int64_t j = 0; j < n; ++j) counts[j] = j;
      k.column_counts(columns.get(), stride, words, n, counts.get());
      for (int64_t j = 0; j < n; ++j) {
        int64_t want = j;
        for (int64_t w = 0; w < words; ++w) {
          for (int b = 0; b < 32; ++b) want += columns[w * stride + j] >> b & 1;
        }
        equal("count", 0, j, counts[j], want);
      }
    }
  }
}

// Words that are zero but a few, all ones, or random.
void test_set_bits(const Kernels& k) {
  for (int64_t n : kEdges) {
    for (int kind = 0; kind < 4; ++kind) {
      begin("%s set_bits: words %lld, kind %d", k.name, (long long)n, kind);
      Buffer<uint32_t> words(n);
      std::vector<int64_t> want;
      for (int64_t w = 0; w < n; ++w) {
        if (kind < 2) words[w] = random_between(0, 9) < kind ? 1u << random_between(0, 31) : 0;
        if (kind == 2) words[w] = ~0u;
        for (int64_t b = 0; b < 32; ++b) {
          if (words[w] >> b & 1) want.push_back(w * 32 + b);
        }
      }
      Buffer<int32_t> out(static_cast<int64_t>(want.size()));
      equal("number", 0, 0, k.set_bits(words.get(), n, out.get()), out.size());
      for (int64_t i = 0; i < out.size(); ++i) equal("bit", 0, i, out[i], want[i]);
    }
  }
}

float float_of(float x) { return x; }
double float_of(double x) { return x; }
float float_of(uint16_t half) {
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float out;
  memcpy(&out, &word, sizeof(out));
  return out;
}
void set(float& x, double value) { x = static_cast<float>(value); }
void set(double& x, double value) { x = value; }
void set(uint16_t& half, double value) {  // by truncation
  const float narrow = static_cast<float>(value);
  uint32_t word;
  memcpy(&word, &narrow, sizeof(word));
  half = static_cast<uint16_t>(word >> 16);
}

template <typename T, typename Width>
void test_threshold(const char* level, const char* dtype,
                    void (*kernel)(const T*, int64_t, Width, uint32_t*, uint32_t*)) {
  const double special[] = {0.0,
                            -0.0,
                            0.5,
                            -0.5,
                            0.498046875,
                            -0.498046875,
                            0.501953125,
                            1.0,
                            -1.0,
                            1e-40,
                            -1e-40,
                            std::numeric_limits<double>::infinity(),
                            -std::numeric_limits<double>::infinity(),
                            std::numeric_limits<double>::quiet_NaN()};
  for (int64_t columns : kEdges) {
    for (bool windowed : {false, true}) {
      begin("%s threshold_%s: columns %lld, window %d", level, dtype, (long long)columns, windowed);
      Buffer<T> pre(columns);
      Buffer<uint32_t> words(n_words(columns)), window(windowed ? n_words(columns) : 0);
      for (int64_t j = 0; j < columns; ++j) set(pre[j], special[random_between(0, 13)]);
      kernel(pre.get(), columns, static_cast<Width>(0.5), words.get(),
             windowed ? window.get() : nullptr);
      for (int64_t w = 0; w < n_words(columns); ++w) {
        uint32_t positive = 0, within = 0;
        for (int64_t b = 0; b < 32 && w * 32 + b < columns; ++b) {
          const auto x = float_of(pre[w * 32 + b]);
          positive |= static_cast<uint32_t>(x > 0) << b;
          within |= static_cast<uint32_t>(std::fabs(x) < 0.5) << b;
        }
        equal("word", 0, w, words[w], positive);
        if (windowed) equal("window", 0, w, window[w], within);
      }
    }
  }
}

// Bits and what follows from them, by plain loops: made once, for every level and place.
struct Pairs {
  Bits bits;
  int64_t stride;  // whole strips of columns
  std::vector<int32_t> counts;
  std::vector<int64_t> v;  // [stride, stride]

  Pairs(int64_t n, int64_t k)
      : bits(n, k), stride(round_up(k, kStrip)), counts(stride), v(stride * stride) {
    std::vector<std::vector<uint8_t>> of(k, std::vector<uint8_t>(n));
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t r = 0; r < n; ++r) {
        of[c][r] = bits.at(r, c);
        counts[c] += of[c][r];
      }
    }
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = i; j < k; ++j) {
        int32_t both = 0;
        for (int64_t r = 0; r < n; ++r) both += of[i][r] & of[j][r];
        v[i * stride + j] = v[j * stride + i] =
            n * both - static_cast<int64_t>(counts[i]) * counts[j];
      }
    }
  }

  static const Pairs& of(int64_t n, int64_t k) {
    static std::map<std::pair<int64_t, int64_t>, Pairs> made;
    return made.try_emplace({n, k}, n, k).first->second;
  }
};

struct Statistics {
  const Pairs& pairs;
  const Bits& bits;
  int64_t stride;
  Buffer<uint32_t> columns;
  Buffer<int32_t> counts;
  const std::vector<int64_t>& v;

  Statistics(int64_t n, int64_t k)
      : pairs(Pairs::of(n, k)),
        bits(pairs.bits),
        stride(pairs.stride),
        columns(n_words(n) * stride),
        counts(stride),
        v(pairs.v) {
    bits.pack_columns(columns, stride);
    for (int64_t c = 0; c < stride; ++c) counts[c] = pairs.counts[c];
  }
};

void covariance_tile(const Kernels& k, const Statistics& s, const Buffer<uint8_t>& scratch,
                     int64_t i0, int64_t i1, int64_t j0, int64_t j1, bool planes, bool same_rows,
                     bool upper = false) {
  begin(
      "%s covariance_tile: N %lld, K %lld, rows %lld:%lld, columns %lld:%lld, signs %d, "
      "same_rows %d, upper %d",
      k.name, (long long)s.bits.rows, (long long)s.bits.columns, (long long)i0, (long long)i1,
      (long long)j0, (long long)j1, planes, same_rows, upper);
  const int64_t words = (j1 - j0) / 32, stride = words + i0 / 64 % 2;
  Buffer<uint32_t> above(planes ? extent(i1 - i0, stride, words) : 0);
  Buffer<uint32_t> below(above.size());
  const std::vector<uint32_t> above_before = above.copy(), below_before = below.copy();
  CovarianceTile t{};
  t.columns = s.columns.get();
  t.stride = s.stride;
  t.words = n_words(s.bits.rows);
  t.counts = s.counts.get();
  t.n_rows = s.bits.rows;
  t.i0 = i0, t.i1 = i1, t.j0 = j0, t.j1 = j1;
  t.above = planes ? above.get() : nullptr;
  t.below = planes ? below.get() : nullptr;
  t.planes_stride = stride;
  t.scratch = scratch.size() > 0 ? scratch.get() : nullptr;
  t.same_rows = same_rows;
  t.upper = upper;
  const int64_t got = k.covariance_tile(t);
  int64_t want = 0;
  for (int64_t i = i0; i < i1; ++i) {
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t v = s.v[i * s.stride + j], at = (i - i0) * stride + (j - j0) / 32;
      if (upper && j <= i) continue;
      want += v < 0 ? -v : v;
      if (!planes) continue;
      equal("[V > 0]", i, j, above[at] >> (j - j0) % 32 & 1, v > 0);
      equal("[V < 0]", i, j, below[at] >> (j - j0) % 32 & 1, v < 0);
    }
  }
  equal("sum of |V|", i0, j0, got, want);
  for (int64_t i = 0; i < above.size(); ++i) {
    if (i % stride < words) continue;
    equal("word between rows", i / stride, i % stride, above[i], above_before[i]);
    equal("word between rows", i / stride, i % stride, below[i], below_before[i]);
  }
}

void test_covariance(const Kernels& k) {
  const int64_t shapes[][2] = {
      {2, 1},     {2, 65},     {3, 64},     {31, 63},    {32, 64},     {33, 65},  {64, 129},
      {65, 5},    {511, 128},  {512, 65},   {513, 127},  {992, 70},    {993, 70}, {1024, 33},
      {2047, 65}, {2048, 64},  {2049, 65},  {4095, 70},  {4097, 70},   {70, 257}, {70, 513},
      {33, 577},  {2081, 513}, {32767, 66}, {32768, 66}, {32801, 130},
  };
  for (const auto& shape : shapes) {
    const Statistics s(shape[0], shape[1]);
    const Buffer<uint8_t> scratch(k.covariance_scratch, 64);
    for (bool planes : {false, true}) {
      // the triangle by square tiles, as the covariance takes it
      for (int64_t i = 0; i < s.stride; i += 512) {
        for (int64_t j = i; j < s.stride; j += 512) {
          covariance_tile(k, s, scratch, i, std::min(i + 512, s.stride), j,
                          std::min(j + 512, s.stride), planes, j > i, i == j);
        }
      }
      // strips of rows by all columns, as the backward does
      for (int64_t rows = kStrip; rows <= k.strip && rows < s.stride; rows *= 2) {
        const int64_t last = (s.stride - 1) / rows * rows;
        for (int64_t i = last; i < s.stride && i <= last + 32; i += 32) {
          for (int64_t j = 0; j < s.stride; j += 512) {
            covariance_tile(k, s, scratch, i, std::min(i + rows, s.stride), j,
                            std::min(j + 512, s.stride), planes, j > 0);
          }
        }
      }
    }
  }
}

struct Options {
  bool covariance, shift, curvature, window, factor, keep, official;
};

template <typename T>
void backward_strip(const Kernels& k, const char* dtype, void (*kernel)(const BackwardStrip<T>&),
                    int64_t n, int64_t columns, int64_t before, int64_t after, int64_t n_digits,
                    const Options& o) {
  const int64_t K = before + columns + after, words = n_words(K), pad = n % 3;
  begin(
      "%s backward_strip_%s: n %lld, columns %lld:%lld of %lld, digits %lld, covariance %d, "
      "shift %d, curvature %d, window %d, factor %d, keep %d, official %d",
      k.name, dtype, (long long)n, (long long)before, (long long)(before + columns), (long long)K,
      (long long)n_digits, o.covariance, o.shift, o.curvature, o.window, o.factor, o.keep,
      o.official);
  const int64_t stride = columns + pad, row_words = words + pad, plane_words = words + pad;
  const int64_t first = before / 32, strip_words = words - first;
  const double scale = 0.25, n_rows = 50;

  Buffer<T> g(extent(n, stride, columns)), shift(o.shift ? columns : 0);
  Buffer<T> curvature(o.curvature ? columns : 0);
  Buffer<T> factor(o.factor ? extent(n, stride, columns) : 0);
  Buffer<uint32_t> rows(extent(n, row_words, words));
  Buffer<uint32_t> above(o.covariance ? extent(columns, plane_words, words) : 0);
  Buffer<uint32_t> below(above.size());
  Buffer<uint32_t> digits(o.covariance ? n_digits * words : 0);
  Buffer<uint32_t> window(o.window ? extent(n, row_words, strip_words) : 0);
  Buffer<bool> keep(o.keep ? n : 0);
  Buffer<double> column_sum(columns);
  Buffer<uint8_t> scratch(o.covariance ? k.backward_scratch(words) : 0, 64);

  const Bits bits(n, K), inside(n, K - before);
  bits.pack_rows(rows, row_words);
  if (o.window) inside.pack_rows(window, row_words);
  for (int64_t r = 0; r < keep.size(); ++r) keep[r] = random_between(0, 2) > 0;
  for (int64_t j = 0; j < shift.size(); ++j) shift[j] = static_cast<T>(random_between(-4, 4));
  for (int64_t j = 0; j < curvature.size(); ++j) {
    curvature[j] = static_cast<T>(random_between(-4, 4));
  }
  std::vector<double> want(n * columns), sum(columns), size(columns);
  std::vector<int8_t> signs(o.covariance ? columns * K : 0);
  if (o.covariance) {
    Bits plus(columns, K), minus(columns, K), ones(n_digits, K);
    for (int64_t at = 0; at < columns * K; ++at) {
      signs[at] = static_cast<int8_t>(random_between(-1, 1));
      plus.bit[at] = signs[at] > 0;
      minus.bit[at] = signs[at] < 0;
    }
    for (uint8_t& bit : ones.bit) bit = random_between(0, 1) != 0;
    plus.pack_rows(above, plane_words);
    minus.pack_rows(below, plane_words);
    ones.pack_rows(digits, words);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t b = 0; b < n_digits; ++b) {
        for (int64_t i = 0; i < K; ++i) {
          sum[j] += ones.at(b, i) * signs[j * K + i] * static_cast<double>(int64_t{1} << b);
        }
      }
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      const bool dropped = (o.window && inside.at(r, j) == 0) || (o.keep && !keep[r]);
      T& x = g[r * stride + j];
      x = static_cast<T>(random_between(-8, 8));
      if (o.factor) factor[r * stride + j] = static_cast<T>(random_between(0, 4));
      double out = static_cast<double>(x);
      if (o.shift) out += static_cast<double>(shift[j]);
      if (o.curvature) {
        const double c = static_cast<double>(curvature[j]);
        out += bits.at(r, before + j) != 0 ? -c : c;
      }
      if (o.covariance) {
        const uint8_t* const row = &bits.bit[r * K];
        const int8_t* const sign = &signs[j * K];
        int32_t product = 0;
        for (int64_t i = 0; i < K; ++i) product += row[i] * sign[i];
        out += (n_rows * product - sum[j]) * scale;
      }
      if (o.official) out *= 1 - out;
      if (o.factor) out *= static_cast<double>(factor[r * stride + j]);
      want[r * columns + j] = dropped ? 0 : out;
      // what does not count must not turn into NaN
      if (dropped && (r + j) % 3 == 0) x = std::numeric_limits<T>::infinity();
    }
  }
  const std::vector<T> start = g.copy();

  BackwardStrip<T> s{};
  s.g = g.get();
  s.g_stride = stride;
  s.n = n;
  s.columns = columns;
  s.shift = o.shift ? shift.get() : nullptr;
  s.curvature = o.curvature ? curvature.get() : nullptr;
  s.rows = rows.get();
  s.bits = rows.get() + first;
  s.rows_stride = s.bits_stride = row_words;
  if (o.covariance) {
    s.above = above.get();
    s.below = below.get();
    s.planes_stride = plane_words;
    s.sign_words = words;
    s.digits = digits.get();
    s.n_digits = n_digits;
    s.n_rows = n_rows;
    s.scale = scale;
    s.scratch = scratch.get();
  }
  s.window = o.window ? window.get() : nullptr;
  s.window_stride = row_words;
  s.factor = o.factor ? factor.get() : nullptr;
  s.factor_stride = stride;
  s.official = o.official;
  s.keep = o.keep ? keep.get() : nullptr;
  s.column_sum = column_sum.get();
  kernel(s);

  std::fill(sum.begin(), sum.end(), 0);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      const double expected = want[r * columns + j];
      equal("gradient", r, j, g[r * stride + j], expected);
      sum[j] += expected;
      size[j] += std::fabs(expected);
    }
    for (int64_t j = columns; j < stride && r + 1 < n; ++j) {
      if (memcmp(&g[r * stride + j], &start[r * stride + j], sizeof(T)) != 0) {
        wrong("element between rows", r, j, 0, 0);
      }
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    if (sizeof(T) == 4 && size[j] * 4 >= 1 << 24) {
      wrong("case: the sums of this column are not exact", 0, j, size[j], 0);
    }
    equal("column sum", 0, j, column_sum[j], sum[j]);
  }
}

void test_backward(const Kernels& k) {
  //                         cov shift curve window factor keep official
  const Options options[] = {{false, false, false, false, false, false, false},
                             {true, false, false, false, false, false, false},
                             {false, true, true, false, false, false, false},
                             {true, true, false, true, false, true, false},
                             {true, false, true, false, true, true, false},
                             {false, true, false, false, true, false, true},
                             {true, true, true, true, true, true, false}};
  const Options everything = {true, true, true, true, true, true, true};
  const int64_t rows[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130};
  // columns after those of the strip: K ends on and around words, 16 words, and 32 words
  const int64_t after[] = {0, 1, 31, 33, 65, 400, 479, 513, 1000};
  const int64_t n_rows = sizeof(rows) / sizeof(rows[0]), n_after = 9;
  int64_t turn = 0;
  const auto both = [&](int64_t n, int64_t columns, int64_t before, int64_t behind,
                        int64_t n_digits, const Options& o) {
    backward_strip(k, "f32", k.backward_strip_f32, n, columns, before, behind, n_digits, o);
    backward_strip(k, "f64", k.backward_strip_f64, n, columns, before, behind, n_digits, o);
  };
  for (const Options& o : options) {
    for (int64_t columns : kEdges) {
      if (columns > k.strip) break;
      ++turn;
      both(rows[turn % n_rows], columns, turn % 3 * 64, after[turn % n_after], 1 + turn % 6, o);
      both(rows[(turn + 7) % n_rows], columns, 0, 0, 6, o);
    }
    for (int64_t n : rows) {
      ++turn;
      both(n, std::min<int64_t>(k.strip, 33 + turn % 40), 64, after[turn % n_after], 1 + turn % 6,
           o);
    }
  }
  both(700, k.strip, 0, 40, 6, options[6]);  // more rows than are summed at once, whole strips
  for (int64_t columns : {1, 33, 64}) {
    backward_strip(k, "f64", k.backward_strip_f64, 65, columns, 64, 70, 6, everything);
  }
}

template <typename Result>
void product(const Kernels& k, const char* name, Result (*kernel)(const BitsProduct&), int64_t rows,
             int64_t depth, int64_t columns, bool add, bool one_hot) {
  begin("%s %s: rows %lld, depth %lld, columns %lld, add %d, one_hot %d", k.name, name,
        (long long)rows, (long long)depth, (long long)columns, add, one_hot);
  const int64_t words = n_words(depth), pad = columns % 4;
  Bits bits(rows, depth);
  if (one_hot) {
    std::fill(bits.bit.begin(), bits.bit.end(), 0);
    for (int64_t r = 0; r < rows; ++r) bits.at(r, random_between(0, depth - 1)) = 1;
  }
  Buffer<uint32_t> packed(extent(rows, words + pad, words));
  Buffer<float> dense(extent(depth, columns + pad, columns));
  Buffer<float> out(extent(rows, columns + pad, columns));
  bits.pack_rows(packed, words + pad);
  for (int64_t i = 0; i < dense.size(); ++i) {
    // sums below 2^24; all 24 bits of a float where one term is alone, and the whole range of sizes
    // over which a product of common exponents is exact
    dense[i] = one_hot ? static_cast<float>(random_between(-(1 << 24) + 1, (1 << 24) - 1)) *
                             std::ldexp(1.0f, static_cast<int>(random_between(-3, 3)))
                       : static_cast<float>(random_between(-8191, 8191));
  }
  for (int64_t i = 0; i < out.size(); ++i) {
    out[i] = add ? static_cast<float>(random_between(-100, 100))
                 : std::numeric_limits<float>::quiet_NaN();
  }
  const std::vector<float> before = out.copy();
  BitsProduct p{};
  p.bits = packed.get();
  p.bits_stride = words + pad;
  p.dense = dense.get();
  p.dense_stride = columns + pad;
  p.out = out.get();
  p.out_stride = columns + pad;
  p.rows = rows;
  p.depth = depth;
  p.columns = columns;
  p.add = add;
  const Buffer<uint8_t> scratch(k.product_scratch, 64);
  p.scratch = scratch.size() > 0 ? scratch.get() : nullptr;
  kernel(p);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      double want = add ? before[r * (columns + pad) + c] : 0;
      for (int64_t d = 0; d < depth; ++d) {
        if (bits.at(r, d) != 0) want += dense[d * (columns + pad) + c];
      }
      equal("sum", r, c, out[r * (columns + pad) + c], want);
    }
    for (int64_t c = columns; c < columns + pad && r + 1 < rows; ++c) {
      const int64_t at = r * (columns + pad) + c;
      if (memcmp(&out[at], &before[at], sizeof(float)) != 0) {
        wrong("element between rows", r, c, out[at], before[at]);
      }
    }
  }
}

template <typename Result>
void test_product(const Kernels& k, const char* name, Result (*kernel)(const BitsProduct&)) {
  const int64_t columns[] = {1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 97, 127, 128};
  int64_t turn = 0;
  for (int64_t rows : {1, 2, 31, 32, 33, 65}) {
    for (int64_t depth : {1, 2, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1030}) {
      for (int64_t pick = 0; pick < 3; ++pick) {
        ++turn;
        product(k, name, kernel, rows, depth, columns[turn % 17], turn % 2 == 0, false);
      }
    }
    product(k, name, kernel, rows, 600, columns[++turn % 17], false, true);
  }
}

// Rows of integers, of which sums are exact in any order, in fp32 and bf16.
void listed_rows(const Kernels& k, int64_t count, int64_t columns, bool half, bool add) {
  begin("%s add_listed_rows: %lld rows, columns %lld, half %d, add %d", k.name, (long long)count,
        (long long)columns, half, add);
  constexpr int64_t kRows = 40;
  const int64_t stride = columns + count % 3;
  Buffer<float> wide(half ? 0 : extent(kRows, stride, columns));
  Buffer<uint16_t> narrow(half ? extent(kRows, stride, columns) : 0);
  const auto fill = [&](int64_t at, float value) {
    if (!half) {
      wide[at] = value;
      return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    narrow[at] = static_cast<uint16_t>(bits >> 16);
  };
  std::vector<float> values(half ? narrow.size() : wide.size());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(random_between(-255, 255));
    fill(static_cast<int64_t>(i), values[i]);
  }
  Buffer<int32_t> list(count);
  for (int64_t i = 0; i < count; ++i) list[i] = static_cast<int32_t>(random_between(0, kRows - 1));
  Buffer<float> out(columns);
  for (int64_t c = 0; c < columns; ++c) {
    out[c] = add ? static_cast<float>(random_between(-100, 100))
                 : std::numeric_limits<float>::quiet_NaN();
  }
  const std::vector<float> before = out.copy();
  ListedRows s{};
  s.list = list.get();
  s.count = count;
  s.dense = half ? static_cast<const void*>(narrow.get()) : wide.get();
  s.half = half;
  s.dense_stride = stride;
  s.columns = columns;
  s.out = out.get();
  s.add = add;
  k.add_listed_rows(s);
  for (int64_t c = 0; c < columns; ++c) {
    double want = add ? before[c] : 0;
    for (int64_t i = 0; i < count; ++i) want += values[list[i] * stride + c];
    equal("sum", 0, c, out[c], want);
  }
}

void test_listed_rows(const Kernels& k) {
  int64_t turn = 0;
  for (int64_t count = 0; count <= 17; ++count) {
    for (int64_t columns : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100}) {
      ++turn;
      listed_rows(k, count, columns, turn % 2 == 0, turn % 3 == 0);
      listed_rows(k, count, columns, turn % 2 != 0, turn % 3 != 0);
    }
  }
}

// ---- dense products -----------------------------------------------------------------------------

// [rows, columns] of integers as the units read them, either way contiguous.
struct Numbers {
  int64_t rows, columns, stride;
  bool row_major;
  Matrix::Element element;
  Buffer<float> wide;
  Buffer<uint16_t> half;

  Numbers(int64_t rows, int64_t columns, bool row_major, Matrix::Element element, int64_t largest)
      : rows(rows),
        columns(columns),
        stride((row_major ? columns : rows) + rows % 3),
        row_major(row_major),
        element(element),
        wide(element == Matrix::kFloat ? length() : 0),
        half(element == Matrix::kFloat ? 0 : length()) {
    for (int64_t i = 0; i < length(); ++i) {
      const float value = static_cast<float>(random_between(-largest, largest));
      if (element == Matrix::kFloat) {
        wide[i] = value;
      } else {
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        half[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
  int64_t length() const {
    return row_major ? extent(rows, stride, columns) : extent(columns, stride, rows);
  }
  double at(int64_t r, int64_t c) const {
    const int64_t i = row_major ? r * stride + c : c * stride + r;
    if (element == Matrix::kFloat) return wide[i];
    const uint32_t bits = static_cast<uint32_t>(half[i]) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  Matrix matrix() const {
    const void* data = element == Matrix::kFloat ? static_cast<const void*>(wide.get())
                                                 : static_cast<const void*>(half.get());
    return {data, row_major ? stride : 1, row_major ? 1 : stride, element};
  }
};

void unit_product(const Kernels& k, int64_t rows, int64_t depth, int64_t columns, int64_t digits,
                  bool left_major, bool right_major, Matrix::Element element, bool of_bits) {
  begin("%s units: rows %lld, depth %lld, columns %lld, digits %lld, left %s, right %s, %s", k.name,
        (long long)rows, (long long)depth, (long long)columns, (long long)digits,
        of_bits      ? "bits"
        : left_major ? "by rows"
                     : "by columns",
        right_major ? "by rows" : "by columns", element == Matrix::kFloat ? "f32" : "bf16");
  const Units& units = *k.units;
  // 1 digit: integers of 8 bits. 3: of 12 and 11, so that every sum is exact in fp32
  const Numbers left(rows, depth, left_major, element, digits == 3 ? 2047 : 100);
  const Numbers right(depth, columns, right_major, element, digits == 3 ? 15 : 100);
  Bits bits(rows, depth);
  Buffer<uint32_t> packed(extent(rows, n_words(depth) + 1, n_words(depth)));
  bits.pack_rows(packed, n_words(depth) + 1);
  const Matrix from =
      of_bits ? Matrix{packed.get(), n_words(depth) + 1, 1, Matrix::kBits} : left.matrix();
  const Buffer<uint8_t> panel(units.panel_bytes(rows, depth, digits), 64);
  for (int64_t r = 0; r < rows; r += units.rows) {
    if (!units.pack(from, r, rows, depth, digits, panel.get())) wrong("size of left", r, 0, 0, 1);
  }
  const Buffer<uint8_t> scratch(units.scratch, 64);
  const UnitStrip s{panel.get(), right.matrix(), rows, depth, columns, digits, scratch.get(), from};
  const auto want = [&](int64_t r, int64_t c) {
    double sum = 0;
    for (int64_t d = 0; d < depth; ++d) {
      sum += (of_bits ? bits.at(r, d) : left.at(r, d)) * right.at(d, c);
    }
    return sum;
  };
  const int64_t stride = columns + 3;
  for (bool add : {false, true}) {
    Buffer<float> out(extent(rows, stride, columns));
    for (int64_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(random_between(-9, 9));
    const std::vector<float> before = out.copy();
    if (!units.product(s, out.get(), stride, add)) wrong("size of right", 0, 0, 0, 1);
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t r = i / stride, c = i % stride;
      equal("sum", r, c, out[i],
            c < columns ? want(r, c) + (add ? before[i] : 0) : static_cast<double>(before[i]));
    }
  }
  if (of_bits) return;
  const int64_t words = n_words(columns);
  for (bool windowed : {false, true}) {
    Buffer<float> bias(columns);
    Buffer<bool> keep(rows);
    Buffer<uint32_t> out(extent(rows, words + 1, words)), window(windowed ? out.size() : 0);
    for (int64_t c = 0; c < columns; ++c) bias[c] = static_cast<float>(random_between(-40, 40));
    for (int64_t r = 0; r < rows; ++r) keep[r] = random_between(0, 3) > 0;
    const EncodeStrip e{bias.get(), keep.get(), 700,
                        out.get(),  words + 1,  windowed ? window.get() : nullptr,
                        words + 1};
    if (!units.encode(s, e)) wrong("size of right", 0, 0, 0, 1);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < words * 32; ++c) {
        const bool counts = c < columns && keep[r];
        const double pre = counts ? want(r, c) + bias[c] : 0;
        const int64_t at = r * (words + 1) + c / 32;
        equal("bit", r, c, out[at] >> c % 32 & 1, counts && pre > 0);
        if (windowed)
          equal("window", r, c, window[at] >> c % 32 & 1, counts && std::fabs(pre) < 700);
      }
    }
  }
}

void test_units(const Kernels& k) {
  const int64_t columns[] = {1, 15, 16, 17, 31, 32, 33, 64, 65, 255, 256};
  int64_t turn = 0;
  for (int64_t rows : {1, 5, 6, 7, 11, 12, 13, 24, 31, 32, 33, 65, 96, 97, 130}) {
    for (int64_t depth : {1, 16, 17, 31, 33, 96, 97, 127, 128, 129, 255, 256, 257, 385, 500}) {
      for (int64_t digits : {1, 3}) {
        ++turn;
        const Matrix::Element element =
            digits == 3 || turn % 3 == 0 ? Matrix::kFloat : Matrix::kBfloat16;
        unit_product(k, rows, depth, columns[turn % 11], digits, turn % 2 == 0, turn / 2 % 2 == 0,
                     element, k.units->split && digits == 1 && turn % 5 == 0);
      }
    }
  }
  unit_product(k, 1030, 130, 40, 3, true, true, Matrix::kFloat, false);  // rows in two parts
  unit_product(k, 1030, 400, 40, 1, false, false, Matrix::kBfloat16, false);
}

// `kind` of 0 has integers, whose sums are often exactly zero or as wide as the window; 1 has
// numbers of all sizes, which integers of 16 bits do not hold; 2 has rows and columns of zeros
// beside tiny numbers; 3 has rows and columns that are nearly alike, with numbers at every
// sixteenth pair alone, whose integers make the largest sums that there can be. Where a code is
// sparse the bias of a column leaves one of its largest sums nothing but rounding. Whether enough
// bits were decided.
bool screened(const Kernels& k, const Screen& screen, int64_t rows, int64_t depth, int64_t columns,
              bool left_major, bool right_major, Matrix::Element element, int kind, bool sparse) {
  begin("%s screen, %s: rows %lld, depth %lld, columns %lld, left %s, right %s, %s, kind %d",
        k.name, sparse ? "sparse" : "dense", (long long)rows, (long long)depth, (long long)columns,
        left_major ? "by rows" : "by columns", right_major ? "by rows" : "by columns",
        element == Matrix::kFloat ? "f32" : "bf16", kind);
  const Numbers left(rows, depth, left_major, element, 9),
      right(depth, columns, right_major, element, 9);
  const auto change = [&](const Numbers& numbers, bool by_row) {
    for (int64_t i = 0; i < numbers.length(); ++i) {
      const int64_t line = (i / numbers.stride + i % numbers.stride) % 5;
      const float scale = kind == 0   ? 1
                          : kind == 1 ? std::exp(0.5f * static_cast<float>(random_between(-9, 9)))
                          : line == 0 ? 0
                          : line == 1 ? (by_row ? 1e-14f : 1e-13f)
                                      : 0.37f;
      if (kind == 3) {
        const int64_t k = by_row == numbers.row_major ? i % numbers.stride : i / numbers.stride;
        numbers.wide[i] = k / 2 % 16 == 0 ? static_cast<float>(random_between(7, 9)) : 0.0f;
      } else if (element == Matrix::kFloat) {
        numbers.wide[i] *= scale;
      } else if (scale == 0) {
        numbers.half[i] = 0;
      }
    }
  };
  change(left, true);
  change(right, false);
  std::vector<double> sums(rows * columns), sizes(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t d = 0; d < depth; ++d) {
        const double product = left.at(r, d) * right.at(d, c);
        sums[r * columns + c] += product;
        sizes[r * columns + c] += std::fabs(product);
      }
    }
  }
  const Buffer<uint8_t> panel(screen.panel_bytes(rows, depth), 64);
  for (int64_t r = 0; r < rows; r += screen.rows) {
    if (!screen.pack(left.matrix(), r, rows, depth, panel.get())) wrong("size of left", r, 0, 0, 1);
  }
  const Buffer<uint8_t> scratch(screen.scratch_bytes(depth), 64);
  const UnitStrip s{panel.get(), right.matrix(), rows,         depth, columns,
                    3,           scratch.get(),  left.matrix()};
  const int64_t words = n_words(columns);
  for (bool windowed : {false, true}) {
    Buffer<float> bias(columns);
    Buffer<bool> keep(rows);
    Buffer<uint32_t> out(extent(rows, words + 1, words)), window(windowed ? out.size() : 0);
    for (int64_t c = 0; c < columns; ++c) {
      bias[c] = static_cast<float>(random_between(-9, 9));
      if (!sparse) continue;
      std::vector<double> of_column(rows);
      for (int64_t r = 0; r < rows; ++r) of_column[r] = sums[r * columns + c];
      std::sort(of_column.rbegin(), of_column.rend());
      bias[c] = -static_cast<float>(of_column[random_between(0, rows < 9 ? 0 : rows / 50)]);
    }
    for (int64_t r = 0; r < rows; ++r) keep[r] = random_between(0, 3) > 0;
    const float width = windowed ? 16 : 0;
    const EncodeStrip e{bias.get(), keep.get(), width,
                        out.get(),  words + 1,  windowed ? window.get() : nullptr,
                        words + 1};
    if (!screen.encode(s, e)) return false;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < words * 32; ++c) {
        const bool counts = c < columns && keep[r];
        const double of_bias = counts ? static_cast<double>(bias[c]) : 0;
        const double pre = counts ? sums[r * columns + c] + of_bias : 0;
        const double size =
            counts ? sizes[r * columns + c] + std::fabs(of_bias) + width : double{width};
        const double rounding = kind % 3 == 0 ? 0 : 1e-13 * size;
        const int64_t at = r * (words + 1) + c / 32;
        if (std::fabs(pre) > rounding || pre == 0)
          equal("bit", r, c, out[at] >> c % 32 & 1, counts && pre > 0);
        if (windowed && (rounding == 0 || std::fabs(std::fabs(pre) - width) > rounding))
          equal("window", r, c, window[at] >> c % 32 & 1, counts && std::fabs(pre) < width);
      }
    }
  }
  return true;
}

// The screen by bytes decides sparse codes alone, and not each of these small ones.
void test_screen(const Kernels& k, const Screen& screen, bool by_bytes) {
  const int64_t columns[] = {1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128};
  int64_t turn = 0, decided = 0, all = 0;
  const auto one = [&](int64_t rows, int64_t depth, int64_t width, bool by_rows, bool by_columns,
                       Matrix::Element element, int kind) {
    const bool done =
        screened(k, screen, rows, depth, width, by_rows, by_columns, element, kind, by_bytes);
    if (!done && !by_bytes) wrong("decided", 0, 0, 0, 1);
    decided += done;
    ++all;
  };
  for (int64_t rows : {1, 5, 6, 7, 11, 12, 13, 24, 33, 70}) {
    for (int64_t depth : {1, 2, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 300}) {
      ++turn;
      one(rows, depth, columns[turn % 15], turn % 2 == 0, turn / 2 % 2 == 0,
          turn % 5 == 0 ? Matrix::kBfloat16 : Matrix::kFloat, static_cast<int>(turn % 3));
    }
  }
  one(1030, 96, 40, true, true, Matrix::kFloat, 0);  // rows in several blocks
  one(530, 40, 260, true, true, Matrix::kFloat, 1);  // columns in several strips
  one(40, 96, 128, true, true, Matrix::kFloat, 1);
  for (int64_t rows : {1, 2, 4}) one(rows, 320, 15, true, true, Matrix::kFloat, 3);
  if (decided < all * 3 / 4) wrong("cases decided", 0, 0, decided, all);
}

void test_level(const Kernels& k) {
  cases = 0;
  test_transpose(k);
  test_column_counts(k);
  test_set_bits(k);
  test_threshold(k.name, "f32", k.threshold_f32);
  test_threshold(k.name, "f64", k.threshold_f64);
  test_threshold(k.name, "bf16", k.threshold_bf16);
  test_covariance(k);
  test_backward(k);
  test_product(k, "gather_product", k.gather_product);
  test_listed_rows(k);
  if (k.bits_product != nullptr) test_product(k, "bits_product", k.bits_product);
  if (k.units != nullptr) test_units(k);
  for (const Screen* screen : k.screens) {
    if (screen != nullptr) test_screen(k, *screen, screen == k.screens[0]);
  }
  printf("%s: %lld cases\n", k.name, static_cast<long long>(cases));
}

}  // namespace

int main(int argc, char** argv) {
  const char* const names[] = {"heap", "front", "back"};
  std::vector<Place> places;
  for (char* name = argc > 1 ? strtok(argv[1], ",") : nullptr; name; name = strtok(nullptr, ",")) {
    const auto found = std::find_if(names, names + 3, [&](auto one) { return !strcmp(name, one); });
    if (found == names + 3) {
      places.clear();
      break;
    }
    places.push_back(static_cast<Place>(found - names));
  }
  if (places.empty()) {
    fprintf(stderr, "usage: %s heap|front|back[,...] [level ...]\n", argv[0]);
    return 64;
  }
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) signal(number, on_signal);
  int64_t found = 0;
  for (Simd level : {Simd::kScalar, Simd::kAvx2, Simd::kAvx512, Simd::kNeon, Simd::kAmx}) {
    if (!has_simd(level)) continue;
    set_simd(level);
    bool asked = argc == 2;
    for (int i = 2; i < argc; ++i) asked = asked || strcmp(argv[i], kernels().name) == 0;
    if (!asked) continue;
    for (const Place one : places) {
      place = one;
      test_level(kernels());
    }
    ++found;
  }
  if (argc > 2 && found != argc - 2) {
    fprintf(stderr, "this CPU lacks one of the levels asked for\n");
    return 3;
  }
  return 0;
}
