// Runs the text of csrc/cuda on a CPU: one block at a time, its threads as fibers of one thread of
// the machine. The functions of csrc/cuda/instructions.cuh are here with the meaning that the PTX
// ISA gives them, fragments included, written without csrc/cuda/tiles.cuh.
//
// What a GPU leaves open is made bad on purpose: fibers run in an order that a seed chooses,
// asynchronous copies arrive at once or as late as a wait allows, and shared memory starts with
// noise. Instructions of a warp need all its lanes at the same one; a deadlock, a misaligned or
// outside address and a bank conflict of ldmatrix end the program with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace bae_fast {
namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 17;

// What all lanes of a warp must reach together: `what` names the instruction.
struct Meeting {
  const char* what = nullptr;
  void* given[kWarp] = {};
  int arrived = 0;
  int64_t generation = 0;
};

struct Copy {
  unsigned* to;
  const int* from;
  int size, bytes;
  int64_t group;
};

struct Fiber {
  ucontext_t start{};
  jmp_buf place;  // where it goes on, once it has started
  bool started = false, done = false;
  const int64_t* watched = nullptr;  // it waits while this number is `before`
  int64_t before = 0;
  std::vector<Copy> copies;
  int64_t group = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<unsigned> shared;
  Meeting all;
  jmp_buf scheduler;
  std::function<void()> body;
  int thread = 0, index = 0;
  bool early = false;
  const char* error = nullptr;
  uint64_t random = 1;

  uint64_t next_random() {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random;
  }
};

inline Block* block = nullptr;

// The stacks of all fibers; they stay for the next kernel.
inline std::vector<std::unique_ptr<char[]>> stacks;

// A context starts a fiber. From then on jumps go to and fro: they leave the mask of signals alone,
// which costs a call of the system at every change of a context. Neither function is ever inlined,
// for it uses setjmp, so what their callers hold in registers is theirs.
inline void leave(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(block->scheduler, 1);
}

inline void enter(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Ends the kernel: this fiber never runs again, nor does any other.
inline void stop(const char* why) {
  block->error = why;
  leave(block->fibers[block->thread]);
}

inline void wait_for(const int64_t& number) {
  Fiber& fiber = block->fibers[block->thread];
  fiber.watched = &number;
  fiber.before = number;
  leave(fiber);
}

// The last of `count` to arrive does the work for all of them.
template <typename Work>
inline void meet(Meeting& meeting, int count, int place, const char* what, void* given, Work work) {
  if (meeting.arrived == 0) meeting.what = what;
  if (strcmp(meeting.what, what) != 0) stop("lanes of a warp are at different instructions");
  if (given != nullptr) meeting.given[place] = given;
  if (++meeting.arrived < count) {
    wait_for(meeting.generation);
    return;
  }
  work(meeting.given);
  meeting.arrived = 0;
  ++meeting.generation;
}

template <typename Work>
inline void together(const char* what, void* given, Work work) {
  const int thread = block->thread;
  meet(block->warps[thread / kWarp], kWarp, thread % kWarp, what, given, work);
}

inline void check_shared(const unsigned* at, int bytes) {
  const unsigned* const begin = block->shared.data();
  if (at < begin || at + bytes / 4 > begin + block->shared.size()) stop("outside of shared memory");
  if ((at - begin) * 4 % bytes != 0) stop("a misaligned address in shared memory");
}

inline void arrive(const Copy& copy) {
  memset(copy.to, 0, copy.size);
  memcpy(copy.to, copy.from, copy.bytes);
}

inline void start_copy(unsigned* to, const int* from, int size, int bytes) {
  check_shared(to, size);
  if (reinterpret_cast<uintptr_t>(from) % size != 0) stop("a misaligned address in global memory");
  if (bytes < 0 || bytes > size) stop("an asynchronous copy of a wrong size");
  Fiber& fiber = block->fibers[block->thread];
  const Copy copy{to, from, size, bytes, fiber.group};
  if (block->early) {
    arrive(copy);
  } else {
    fiber.copies.push_back(copy);
  }
}

inline void start_fiber() {
  block->body();
  Fiber& fiber = block->fibers[block->thread];
  fiber.done = true;
  leave(fiber);
}

// Runs `body` as every thread of every block; what stopped it, or null.
inline const char* run(int blocks, int threads, int shared_bytes, uint64_t seed, bool early,
                       const std::function<void()>& body) {
  Block here;
  block = &here;
  here.body = body;
  here.early = early;
  here.random = seed * 2654435761u + 88172645463325252ull;
  here.fibers.resize(threads);
  while (stacks.size() < here.fibers.size()) stacks.emplace_back(new char[kStack]);
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) order[t] = t;
  for (here.index = 0; here.index < blocks; ++here.index) {
    here.warps.assign(threads / kWarp, {});
    here.all = {};
    here.shared.resize(shared_bytes / 4);
    for (unsigned& word : here.shared) word = static_cast<unsigned>(here.next_random());
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = here.fibers[t];
      fiber.started = fiber.done = false;
      fiber.watched = nullptr;
      fiber.copies.clear();
      fiber.group = 0;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = stacks[t].get();
      fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, start_fiber, 0);
    }
    for (int t = threads - 1; t > 0; --t) {
      std::swap(order[t], order[here.next_random() % (t + 1)]);
    }
    for (int left = threads; left > 0;) {
      bool moved = false;
      for (int t : order) {
        Fiber& fiber = here.fibers[t];
        if (fiber.done || (fiber.watched != nullptr && *fiber.watched == fiber.before)) continue;
        moved = true;
        fiber.watched = nullptr;
        here.thread = t;
        enter(fiber);
        if (here.error != nullptr) return here.error;
        if (fiber.done) --left;
      }
      if (!moved) return "threads wait for others that have ended or wait elsewhere";
    }
  }
  return nullptr;
}

}  // namespace emulated

inline unsigned* shared_memory() { return emulated::block->shared.data(); }
inline int thread_index() { return emulated::block->thread; }
inline int block_index() { return emulated::block->index; }

inline void copy_chunk(unsigned* to, const int* from, int bytes) {
  emulated::start_copy(to, from, 16, bytes);
}
inline void copy_word(unsigned* to, const int* from, int bytes) {
  emulated::start_copy(to, from, 4, bytes);
}
inline void commit_copies() { ++emulated::block->fibers[thread_index()].group; }

template <int Groups>
inline void wait_copies() {
  emulated::Fiber& fiber = emulated::block->fibers[thread_index()];
  size_t done = 0;
  while (done < fiber.copies.size() && fiber.copies[done].group < fiber.group - Groups) {
    emulated::arrive(fiber.copies[done++]);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + done);
}

inline void load_matrices(unsigned (&words)[4], const unsigned* row) {
  emulated::check_shared(row, 16);
  struct Lane {
    unsigned* words;
    const unsigned* row;
  } mine{words, row};
  emulated::together("ldmatrix", &mine, [](void** given) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const unsigned* rows[8];
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        rows[r] = static_cast<Lane*>(given[matrix * 8 + r])->row;
        banks |= 0xfu << (rows[r] - shared_memory()) % 32;
      }
      if (banks != ~0u) emulated::stop("a bank conflict of ldmatrix");
      for (int lane = 0; lane < 32; ++lane) {
        static_cast<Lane*>(given[lane])->words[matrix] = rows[lane / 4][lane % 4];
      }
    }
  });
}

inline void multiply_bits(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Lane {
    int* c;
    const unsigned* a;
    unsigned b[2];
  } mine{c, a, {b0, b1}};
  emulated::together("mma", &mine, [](void** given) {
    unsigned a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& from = *static_cast<Lane*>(given[lane]);
      const int group = lane >> 2, in_group = lane % 4;
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][in_group + r / 2 * 4] = from.a[r];
      for (int r = 0; r < 2; ++r) b[group][in_group + r * 4] = from.b[r];
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int i = (lane >> 2) + r / 2 * 8, j = lane % 4 * 2 + r % 2;
        int sum = 0;
        for (int w = 0; w < 8; ++w) sum += __builtin_popcount(a[i][w] & b[j][w]);
        static_cast<Lane*>(given[lane])->c[r] += sum;
      }
    }
  });
}

inline unsigned shuffle_xor(unsigned value, int mask) {
  struct Lane {
    unsigned value;
    int mask;
  } mine{value, mask};
  emulated::together("shuffle", &mine, [](void** given) {
    unsigned values[32];
    for (int lane = 0; lane < 32; ++lane) values[lane] = static_cast<Lane*>(given[lane])->value;
    for (int lane = 0; lane < 32; ++lane) {
      Lane& to = *static_cast<Lane*>(given[lane]);
      to.value = values[lane ^ to.mask];
    }
  });
  return mine.value;
}

inline int count_ones(unsigned word) { return __builtin_popcount(word); }

inline void synchronize() {
  emulated::Block& here = *emulated::block;
  emulated::meet(here.all, static_cast<int>(here.fibers.size()), 0, "barrier", nullptr,
                 [](void**) {});
}

inline void forget_memory() {}
inline void not_before(int&) {}

inline void store4(int* to, int a, int b, int c, int d) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulated::stop("a misaligned store of 16 bytes");
  to[0] = a, to[1] = b, to[2] = c, to[3] = d;
}
inline void store2(float* to, float a, float b) {
  if (reinterpret_cast<uintptr_t>(to) % 8 != 0) emulated::stop("a misaligned store of 8 bytes");
  to[0] = a, to[1] = b;
}

}  // namespace bae_fast
