// What the operators share: views of tensors, memory, the sharing out of columns.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "layout.h"
#include "torch_abi.h"

namespace bae_fast {

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

inline int64_t row_stride(const Tensor& tensor) { return tensor.stride(0); }

constexpr int64_t kLargePage = int64_t{1} << 21;

// A hint, for new memory about to be written whole: a page fault every 4 KiB of 64 MiB takes as
// long as a product.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t begin = round_up(reinterpret_cast<intptr_t>(memory), kLargePage);
  const int64_t end = (reinterpret_cast<intptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void prefer_large_pages(const Tensor& fresh) {
  prefer_large_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size());
}

// Memory on a cache line, not set to anything; from half a large page on, whole ones: packed panels
// are read again and again, and the processor has few places for the addresses of small pages.
//
// The system clears a large page before it gives it, which takes as long as the products of a small
// step: a thread keeps a block of a few for the next that asks for no more.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= 0) return;
    const int64_t unit = bytes < kLargePage / 2 ? 64 : kLargePage;
    bytes_ = round_up(bytes, unit);
    if (unit == kLargePage && kept().bytes >= bytes_) {
      std::swap(memory_, kept().memory);
      bytes_ = std::exchange(kept().bytes, 0);
      return;
    }
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(unit, bytes_));
    check(memory_ != nullptr, "no memory for ", bytes, " bytes of scratch");
    if (unit == kLargePage) prefer_large_pages(memory_, bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (bytes_ >= kLargePage && bytes_ <= kMostKept && bytes_ > kept().bytes) {
      std::swap(memory_, kept().memory);
      kept().bytes = bytes_;
    }
    std::free(memory_);
  }
  uint8_t* get() const { return memory_; }

 private:
  static constexpr int64_t kMostKept = 2 * kLargePage;

  struct Kept {
    uint8_t* memory = nullptr;
    int64_t bytes = 0;
    ~Kept() { std::free(memory); }
  };
  static Kept& kept() {
    static thread_local Kept of_thread;
    return of_thread;
  }

  uint8_t* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// work(own, g) for every g below `groups`, with what make() gives each thread as its own: a thread
// takes the next group that nobody has, as some take longer than others.
template <typename Make, typename Work>
void by_turns(int64_t groups, const Make& make, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel_for(0, get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    auto own = make();
    for (; begin < end; ++begin) {
      for (int64_t g = next++; g < groups; g = next++) work(own, g);
    }
  });
}

// The set bits of rows by their names, one row after the other, by blocks of rows.
struct FoundBits {
  static constexpr int64_t kRows = 64;
  std::vector<std::vector<int32_t>> blocks;
  std::vector<int32_t> length;  // of each row
  int64_t total = 0;
};

// name(j) of every set bit j, where it is not negative, of `n` words a row. Rows with `keep` false
// have none. Where there are more than `most`, what was found is not complete.
template <typename Name>
FoundBits find_bits(const Tensor& words, int64_t n, const bool* keep, int64_t most, Name name) {
  constexpr int64_t kRows = FoundBits::kRows, kWords = 1024;
  const int64_t rows = words.size(0), stride = row_stride(words);
  const uint32_t* const in = data<uint32_t>(words);
  FoundBits out;
  out.blocks.resize((rows + kRows - 1) / kRows);
  out.length.assign(rows, 0);
  std::atomic<int64_t> total{0};
  parallel_for(0, static_cast<int64_t>(out.blocks.size()), 1, [&](int64_t from, int64_t to) {
    std::vector<int32_t> bits(std::min(n, kWords) * kWordBits);
    for (int64_t b = from; b < to && total <= most; ++b) {
      std::vector<int32_t>& found = out.blocks[b];
      for (int64_t r = b * kRows; r < std::min(rows, (b + 1) * kRows); ++r) {
        if (keep != nullptr && !keep[r]) continue;
        const size_t before = found.size();
        for (int64_t w = 0; w < n; w += kWords) {
          const int64_t ones =
              kernels().set_bits(in + r * stride + w, std::min(n - w, kWords), bits.data());
          size_t used = found.size();
          found.resize(used + ones);
          for (int64_t i = 0; i < ones; ++i) {
            const int32_t named = name(w * kWordBits + bits[i]);
            found[used] = named;
            used += named >= 0;
          }
          found.resize(used);
        }
        out.length[r] = static_cast<int32_t>(found.size() - before);
      }
      total += static_cast<int64_t>(found.size());
    }
  });
  out.total = total;
  return out;
}

// The width of strips, a multiple of kStrip up to `widest`, that leaves threads the least idle.
inline int64_t strip_width(int64_t columns, int64_t widest) {
  const int64_t threads = get_num_threads();
  int64_t best = kStrip, least = INT64_MAX;
  for (int64_t width = std::min(widest, round_up(columns, kStrip)); width > 0; width -= kStrip) {
    const int64_t strips = (columns + width - 1) / width;
    const int64_t time = (strips + threads - 1) / threads * std::min(width, columns);
    if (time < least) best = width, least = time;
  }
  return best;
}

}  // namespace bae_fast
