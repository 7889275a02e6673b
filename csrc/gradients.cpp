// Memory for the gradients of weights.
#include <mutex>
#include <utility>

#include "operators.h"

namespace bae_fast {
namespace {

// Memory of gradients of weights, kept for the next step where it was given back. Above 32 MiB the
// C library returns memory to the system at once, and the first touch of 64 MiB of new pages takes
// as long as a product. At most kKept blocks are kept: what the next step needs anyway.
class GradientPool {
 public:
  static GradientPool& instance() {
    static auto* const pool = new GradientPool;  // outlives every tensor
    return *pool;
  }

  float* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->second != bytes) continue;
      float* const found = it->first;
      kept_.erase(it);
      return found;
    }
    void* const made = std::aligned_alloc(64, round_up(bytes, 64));
    check(made != nullptr, "no memory for a gradient of ", bytes, " bytes");
    prefer_large_pages(made, bytes);
    return static_cast<float*>(made);
  }

  void give_back(float* memory, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.emplace_back(memory, bytes);
    if (kept_.size() <= kKept) return;
    std::free(kept_.front().first);  // the oldest
    kept_.erase(kept_.begin());
  }

 private:
  static constexpr size_t kKept = 2;  // W_enc and W_dec of one layer
  std::mutex mutex_;
  std::vector<std::pair<float*, int64_t>> kept_;
};

}  // namespace

// An fp32 [rows, columns] of whatever the memory held.
Tensor new_gradient(int64_t rows, int64_t columns) {
  const int64_t bytes = rows * columns * 4;
  float* const memory = GradientPool::instance().take(bytes);
  return over_memory(memory, rows, columns, ScalarType::Float, [bytes](void* back) {
    GradientPool::instance().give_back(static_cast<float*>(back), bytes);
  });
}

}  // namespace bae_fast
