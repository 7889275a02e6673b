// Covariance of packed bits on compute capability 9.0 (sm_90a): the numbers of cooccurrence.cu, by
// asynchronous products of a warpgroup on tiles that bulk copies bring.
//
//     V_ij = N n_ij - n_i n_j,    n_ij = popc(a_i & a_j),    V_ii = 0 here
//
// feature_tiles puts feature-packed bits into tiles of 128 features x 1024 bits (tiles.cuh), once.
// In panel_covariance as many blocks as there are multiprocessors share the tiles of the triangle,
// in the order of triangle_tile, each a run of them. A panel of 128 features stays in shared memory
// with all its bits while right panels stream through stages. One warpgroup copies: a thread for
// the right panels, one of another warp for the left, so that neither waits for the other. Two
// multiply, tile by tile in turn, so that V and signs of one tile are made beside the products of
// the next. Up to 8192 rows, where 128 |V| fit 32 bits.
#include "signs.cuh"
#include "warpgroup.cuh"

namespace bae_fast {

struct Barriers {
  unsigned first;  // address
  __device__ __forceinline__ unsigned full(int stage) const { return first + 8 * stage; }
  __device__ __forceinline__ unsigned empty(int stage) const { return full(kMostStages + stage); }
  __device__ __forceinline__ unsigned panel_full() const { return full(2 * kMostStages); }
  __device__ __forceinline__ unsigned panel_empty() const { return full(2 * kMostStages + 1); }
  __device__ __forceinline__ unsigned turn(int who) const {
    return full(2 * kMostStages + 2 + who);
  }
};

// V of a tile: the thread's sum of |V|; its bits go to `signs` in shared memory where `keep`.
template <bool Diagonal>
__device__ __forceinline__ unsigned take_tile(const int (&sums)[2][64], int n,
                                              const int (&minus_ni)[4], const int* nj,
                                              unsigned* signs, int warp, int lane, bool keep) {
  const int shift = result_column(lane, 0);
  unsigned total = 0;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 64 + warp * 16 + result_row(lane, 2 * half);
      unsigned above[4] = {0, 0, 0, 0}, below[4] = {0, 0, 0, 0};
#pragma unroll
      for (int f = 0; f < 16; ++f) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          int v =
              n * sums[m][4 * f + 2 * half + b] + minus_ni[2 * m + half] * nj[8 * f + shift + b];
          if (Diagonal && row == 8 * f + shift + b) v = 0;
          const unsigned bit = 1u << sign_bit(0, f, b);
          if (v > 0) above[f / 4] |= bit;
          if (v < 0) below[f / 4] |= bit;
          total += static_cast<unsigned>(v < 0 ? -v : v);
        }
      }
      if (keep) {
        // each of a row's four lanes has some bits of eight words; each ends with two whole words
        const bool odd = lane_plane(lane) != 0, high = lane_word(lane) != 0;
        unsigned kept[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          kept[w] = (odd ? below[w] : above[w]) << shift;
          kept[w] |= shuffle_xor((odd ? above[w] : below[w]) << shift, 1);
        }
        unsigned* const to = signs + sign_at(lane_plane(lane), row, 2 * lane_word(lane));
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const unsigned other = shuffle_xor(high ? kept[w] : kept[w + 2], 2);
          to[w] = (high ? kept[w + 2] : kept[w]) | other;
        }
      }
    }
  }
  return total;
}

__device__ __forceinline__ void write_words(int* to, const int (&words)[4], bool aligned, int n) {
  if (aligned && n >= 4) {
    store4(to, words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if (w < n) to[w] = words[w];
  }
}

// Both planes of a tile from shared memory to the result, and above the diagonal their mirror.
__device__ __forceinline__ void write_signs(const Signs& to, const unsigned* signs, TileAt tile,
                                            int k, int thread) {
  static_assert(kTileWords == 4 && kPanelRows == PairShape::kRows, "");
  const bool aligned = to.stride % 4 == 0 && to.plane_stride % 4 == 0;
  const int warp = thread / kLanes, lane = thread % kLanes;
  const int row = tile.i * kPanelRows + thread, column = tile.j * kPanelRows + thread;
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    int words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = static_cast<int>(signs[sign_at(plane, thread, w)]);
    int* const here = to.planes + plane * to.plane_stride;
    const int first = tile.j * kTileWords;
    if (row < k) write_words(here + row * to.stride + first, words, aligned, to.words - first);
    if (tile.i == tile.j) continue;
    // the thread's column, from squares of 32 rows x the warp's 32 columns
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] =
          static_cast<int>(transpose(signs[sign_at(plane, w * kWordBits + lane, warp)], lane));
    }
    if (column < k) {
      write_words(here + column * to.stride + tile.i * kTileWords, words, aligned, 4);
    }
  }
}

struct Run {
  long long first, last;  // tiles of a block, in the order of triangle_tile
  int side, k, chunks, stages;
};

__device__ __forceinline__ void copy_rights(const Run& run, const int* tiles, unsigned stages_at,
                                            const Barriers& barriers) {
  TileAt tile = triangle_tile(static_cast<int>(run.first), run.k);
  Place place{0, 0};
  for (long long t = run.first; t < run.last; ++t, tile = next_tile(tile, run.side)) {
    const int* from = tiles + static_cast<long long>(tile.j) * run.chunks * kFeatureTileWords;
    for (int chunk = 0; chunk < run.chunks; ++chunk, from += kFeatureTileWords) {
      wait_for_phase(barriers.empty(place.stage), place.parity ^ 1);
      arrive_expecting(barriers.full(place.stage), kFeatureTileBytes);
      copy_bytes(stages_at + place.stage * kFeatureTileBytes, from, kFeatureTileBytes,
                 barriers.full(place.stage));
      place.step(run.stages);
    }
  }
}

__device__ __forceinline__ void copy_lefts(const Run& run, const int* tiles, unsigned panel_at,
                                           const Barriers& barriers) {
  TileAt tile = triangle_tile(static_cast<int>(run.first), run.k);
  int panel = -1, parity = 1;
  for (long long t = run.first; t < run.last; ++t, tile = next_tile(tile, run.side)) {
    if (tile.i == panel) continue;
    panel = tile.i;
    wait_for_phase(barriers.panel_empty(), parity);
    parity ^= 1;
    arrive_expecting(barriers.panel_full(), run.chunks * kFeatureTileBytes);
    copy_bytes(panel_at, tiles + static_cast<long long>(panel) * run.chunks * kFeatureTileWords,
               run.chunks * kFeatureTileBytes, barriers.panel_full());
  }
}

__device__ __forceinline__ void consume(const Run& run, unsigned panel_at, unsigned stages_at,
                                        const Barriers& barriers, int me, int thread,
                                        unsigned* signs, int* nj, const long long* counts, int n,
                                        const Signs& to, long long* sums_out) {
  const int warp = thread / kLanes, lane = thread % kLanes;
  const auto release = [&](unsigned barrier) {
    if (lane == 0) arrive(barrier);
  };
  TileAt tile = triangle_tile(static_cast<int>(run.first), run.k);
  int panel = -1, panel_parity = 0, turn_parity = me == 0;
  bool held = false;
  int minus_ni[4] = {0, 0, 0, 0};
  unsigned long long total = 0;
  for (long long t = run.first; t < run.last; ++t, tile = next_tile(tile, run.side)) {
    if (tile.i != panel) {
      if (held) release(barriers.panel_empty());
      wait_for_phase(barriers.panel_full(), panel_parity);
      panel_parity ^= 1;
      panel = tile.i;
      held = true;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = panel * kPanelRows + r / 2 * 64 + warp * 16 + result_row(lane, r % 2 * 2);
        minus_ni[r] = row < run.k ? -static_cast<int>(counts[row]) : 0;
      }
    }
    const int turn = static_cast<int>(t - run.first);
    if (turn % kConsumers != me) continue;
    const int column = tile.j * kPanelRows + thread;
    nj[thread] = column < run.k ? static_cast<int>(counts[column]) : 0;
    const long long copied = static_cast<long long>(turn) * run.chunks;
    Place place{static_cast<int>(copied % run.stages), static_cast<int>(copied / run.stages & 1)};
    int sums[2][64];
#pragma unroll
    for (int r = 0; r < 64; ++r) sums[0][r] = sums[1][r] = 0;
    wait_for_phase(barriers.turn(me), turn_parity);
    turn_parity ^= 1;
    int before = 0;
    for (int chunk = 0; chunk < run.chunks; ++chunk) {
      wait_for_phase(barriers.full(place.stage), place.parity);
      const unsigned left = panel_at + chunk * kFeatureTileBytes;
      const unsigned right = stages_at + place.stage * kFeatureTileBytes;
      fence_products();
#pragma unroll
      for (int slice = 0; slice < 4; ++slice) {  // 256 bits, 32 bytes
        const unsigned long long b = operand_at(right + 32 * slice);
        multiply_later(sums[0], operand_at(left + 32 * slice), b);
        multiply_later(sums[1], operand_at(left + kFeatureTileBytes / 2 + 32 * slice), b);
      }
      commit_products();
      if (chunk > 0) {
        wait_products<1>();
        release(barriers.empty(before));
      }
      before = place.stage;
      place.step(run.stages);
    }
    // all products are started; each warp says so, as a warp that has not yet seen its own turn
    // would wait forever for the one behind it
    release(barriers.turn(me ^ 1));
    wait_products<0>();
    release(barriers.empty(before));
    // whether the consumer's next tile has another left panel
    if (next_tile(next_tile(tile, run.side), run.side).i != panel) {
      release(barriers.panel_empty());
      held = false;
    }
    synchronize_warpgroup(1 + me);  // counts are here, and nobody reads the signs of the last tile
    const bool keep = to.planes != nullptr;
    if (tile.i == tile.j) {
      total += take_tile<true>(sums, n, minus_ni, nj, signs, warp, lane, keep);
    } else {
      total += 2ull * take_tile<false>(sums, n, minus_ni, nj, signs, warp, lane, keep);
    }
    synchronize_warpgroup(1 + me);
    if (keep) write_signs(to, signs, tile, run.k, thread);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const unsigned low = shuffle_xor(static_cast<unsigned>(total), mask);
    const unsigned high = shuffle_xor(static_cast<unsigned>(total >> 32), mask);
    total += static_cast<unsigned long long>(high) << 32 | low;
  }
  if (lane == 0) {
    sums_out[(block_index() * kConsumers + me) * 4 + warp] = static_cast<long long>(total);
  }
}

}  // namespace bae_fast

// One block a tile: feature-packed rows, on 16 bytes, of `width` words, a multiple of four; zeros
// behind the last feature and the last word.
extern "C" __global__ void __launch_bounds__(256)
    feature_tiles(const int* features, long long stride, int width, int k, int chunks, int* tiles,
                  const int* unless) {
  using namespace bae_fast;
  if (unless != nullptr && *unless != 0) return;
  const int panel = block_index() / chunks, part = block_index() % chunks;
  int* const to = tiles + static_cast<long long>(block_index()) * kFeatureTileWords;
#pragma unroll
  for (int at = thread_index(); at < kPanelRows * kTileChunks; at += 256) {
    const int row = at / kTileChunks, chunk = at % kTileChunks;
    const int feature = panel * kPanelRows + row, word = part * kTileRowWords + chunk * kChunkWords;
    int4 words = make_int4(0, 0, 0, 0);
    if (feature < k && word < width) {
      words = *reinterpret_cast<const int4*>(features + feature * stride + word);
    }
    store4(to + tile_chunk_at(row, chunk), words.x, words.y, words.z, words.w);
  }
}

// `chunks` tiles of each panel, at most kMostPanelTiles; `block_sums` has eight numbers a block.
// `planes` may be null, `unless` as well: where it is not zero nothing is made. Strides in words.
extern "C" __global__ void __launch_bounds__(bae_fast::kPanelThreads, 1)
    panel_covariance(const int* tiles, const long long* counts, const long long* n_rows,
                     long long* block_sums, int* planes, long long plane_stride,
                     long long signs_stride, int words, int k, int chunks, int blocks,
                     const int* unless) {
  using namespace bae_fast;
  if (unless != nullptr && *unless != 0) return;
  unsigned* const raw = shared_memory();
  unsigned* const memory = raw + ((0u - shared_address(raw)) & 1023u) / 4;
  const unsigned at = shared_address(memory);
  const Barriers barriers{at + 4 * kPanelBarriersAt};
  const int side = ceil_div(k, kPanelRows);
  const long long all = static_cast<long long>(side) * (side + 1) / 2, block = block_index();
  const Run run{block * all / blocks, (block + 1) * all / blocks, side, k, chunks,
                panel_stages(chunks)};
  if (thread_index() == 0) {
    for (int stage = 0; stage < run.stages; ++stage) {
      start_barrier(barriers.full(stage), 1);
      start_barrier(barriers.empty(stage), 4);  // warps of the consumer
    }
    start_barrier(barriers.panel_full(), 1);
    start_barrier(barriers.panel_empty(), 4 * kConsumers);
    for (int who = 0; who < kConsumers; ++who) start_barrier(barriers.turn(who), 4);
    publish_barriers();
  }
  synchronize();
  const int warpgroup = thread_index() / kWarpgroup, thread = thread_index() % kWarpgroup;
  const unsigned stages_at = at + chunks * kFeatureTileBytes;
  if (warpgroup == 0) {
    give_registers<40>();
    if (thread == 0) copy_rights(run, tiles, stages_at, barriers);
    if (thread == kLanes) copy_lefts(run, tiles, at, barriers);
    return;
  }
  take_registers<232>();
  const int me = warpgroup - 1;
  consume(run, at, stages_at, barriers, me, thread, memory + kPanelSignsAt + me * kPanelSignWords,
          reinterpret_cast<int*>(memory + kPanelCountsAt) + me * kPanelRows, counts,
          static_cast<int>(*n_rows), {planes, plane_stride, signs_stride, words}, block_sums);
}
