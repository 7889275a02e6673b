// Products of packed bits with the signs of V on compute capability 9.0 (sm_90a): the numbers of
// sign_product.cu, by asynchronous products of a warpgroup on tiles that bulk copies bring.
//
//     scale (N (B S)_nj - (n^T S)_j),    B S = popc(b & p) + popc(b & ~m) - popc(b)
//
// row_tiles and sign_tiles put lines of bits into tiles of 256 lines x 1024 bits (tiles.cuh), once:
// rows of B, and columns of S as both planes, the second one complemented, so that one accumulator
// serves both. row_tiles counts the ones of a row as well. In sign_panel_product as many blocks as
// there are multiprocessors take results of 256 rows x 128 columns in turn. One thread copies, and
// it goes on to the next result while the last one is written. Two warpgroups multiply, 128 rows
// each, by all columns of both planes.
#include "signs.cuh"
#include "warpgroup.cuh"

namespace bae_fast {

// Four words of a line of `width` words, zeros behind them. `aligned`: lines start on 16 bytes.
__device__ __forceinline__ int4 read_chunk(const int* line, int word, int width, bool aligned) {
  if (aligned && word + kChunkWords <= width) return *reinterpret_cast<const int4*>(line + word);
  int words[kChunkWords];
#pragma unroll
  for (int w = 0; w < kChunkWords; ++w) words[w] = word + w < width ? line[word + w] : 0;
  return make_int4(words[0], words[1], words[2], words[3]);
}

// A warp puts a line of bits, each word XOR `change`, into all tiles of its panel, which are
// `chunks`; a line that is not `there` is zeros before that. The ones that this lane has read.
__device__ __forceinline__ int fill_line(const int* from, int width, bool aligned, bool there,
                                         int change, int line, int chunks, int* panel) {
  const int lane = thread_index() % kLanes;
  int ones = 0;
#pragma unroll 4
  for (int at = lane; at < chunks * kTileChunks; at += kLanes) {
    int4 words = make_int4(0, 0, 0, 0);
    if (there) words = read_chunk(from, at * kChunkWords, width, aligned);
    ones += count_ones(words.x) + count_ones(words.y) + count_ones(words.z) + count_ones(words.w);
    int* const to = panel + at / kTileChunks * kLineTileWords;
    store4(to + tile_chunk_at(line, at % kTileChunks), words.x ^ change, words.y ^ change,
           words.z ^ change, words.w ^ change);
  }
  return ones;
}

// Barriers of the stages, by their addresses.
struct Ring {
  unsigned first;
  __device__ __forceinline__ unsigned full(int stage) const { return first + 8 * stage; }
  __device__ __forceinline__ unsigned empty(int stage) const { return full(kLineStages + stage); }
};

// The results of a block: every `blocks`th of rows x columns tiles, from its own number on.
struct Share {
  int first, blocks, rows, columns, chunks;
};

__device__ __forceinline__ void copy_stages(const Share& share, const int* bits, const int* signs,
                                            unsigned stages_at, const Ring& ring) {
  const long long panel = static_cast<long long>(share.chunks) * kLineTileWords;
  Place place{0, 0};
  for (int t = share.first; t < share.rows * share.columns; t += share.blocks) {
    const TileAt tile = grouped_tile(t, share.rows, share.columns);
    const int *left = bits + tile.i * panel, *right = signs + tile.j * panel;
    for (int chunk = 0; chunk < share.chunks; ++chunk) {
      const unsigned to = stages_at + place.stage * kLineStageBytes;
      wait_for_phase(ring.empty(place.stage), place.parity ^ 1);
      arrive_expecting(ring.full(place.stage), kLineStageBytes);
      copy_bytes(to, left, kLineTileBytes, ring.full(place.stage));
      copy_bytes(to + kLineTileBytes, right, kLineTileBytes, ring.full(place.stage));
      left += kLineTileWords;
      right += kLineTileWords;
      place.step(kLineStages);
    }
  }
}

__device__ __forceinline__ void multiply_stages(const Share& share, unsigned stages_at,
                                                const Ring& ring, int me, int thread,
                                                const int* ones, int rows, int columns,
                                                StoreScaled store) {
  constexpr int kHalf = kLineTileBytes / 2, kQuarter = kLineTileBytes / 4;  // 128 lines, 64 lines
  const int warp = thread / kLanes, lane = thread % kLanes;
  const auto release = [&](int stage) {
    if (lane == 0) arrive(ring.empty(stage));
  };
  Place place{0, 0};
  for (int t = share.first; t < share.rows * share.columns; t += share.blocks) {
    int sums[2][64];
#pragma unroll
    for (int r = 0; r < 64; ++r) sums[0][r] = sums[1][r] = 0;
    int before = 0;
    for (int chunk = 0; chunk < share.chunks; ++chunk) {
      wait_for_phase(ring.full(place.stage), place.parity);
      const unsigned left = stages_at + place.stage * kLineStageBytes + me * kHalf;
      const unsigned right = stages_at + place.stage * kLineStageBytes + kLineTileBytes;
      fence_products();
#pragma unroll
      for (int slice = 0; slice < 4; ++slice) {  // 256 bits, 32 bytes
#pragma unroll
        for (int plane = 0; plane < 2; ++plane) {
          const unsigned long long b = operand_at(right + plane * kHalf + 32 * slice);
          multiply_later(sums[0], operand_at(left + 32 * slice), b);
          multiply_later(sums[1], operand_at(left + kQuarter + 32 * slice), b);
        }
      }
      commit_products();
      if (chunk > 0) {
        wait_products<1>();
        release(before);
      }
      before = place.stage;
      place.step(kLineStages);
    }
    wait_products<0>();
    release(before);

    const TileAt tile = grouped_tile(t, share.rows, share.columns);
    const int first = tile.i * kLines + me * (kLines / 2) + warp * 16;
    int of_row[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      of_row[r] = ones[first + r / 2 * 64 + result_row(lane, r % 2 * 2)];  // of padding too
    }
#pragma unroll
    for (int f = 0; f < 16; ++f) {
      const int column = tile.j * kSignColumns + 8 * f + result_column(lane, 0);
      if (column < columns) {
        store.column(column, column + 1 < columns);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = first + r / 2 * 64 + result_row(lane, r % 2 * 2);
          const int* const two = sums[r / 2] + 4 * f + r % 2 * 2;
          if (row < rows) store.pair(row, two[0] - of_row[r], two[1] - of_row[r]);
        }
      }
    }
  }
}

}  // namespace bae_fast

// Row-packed bits in tiles, and the ones of every row: a warp a line, rows up to the last panel's
// end. `aligned`: rows start on 16 bytes. Strides and `width` in words.
extern "C" __global__ void __launch_bounds__(bae_fast::kLineWarps* bae_fast::kLanes)
    row_tiles(const int* bits, long long stride, int width, int rows, int chunks, int aligned,
              int* tiles, int* ones, const int* unless) {
  using namespace bae_fast;
  if (unless != nullptr && *unless != 0) return;
  const int row = block_index() * kLineWarps + thread_index() / kLanes;
  int* const panel = tiles + static_cast<long long>(row / kLines) * chunks * kLineTileWords;
  int count = fill_line(bits + row * stride, width, aligned != 0, row < rows, 0, row % kLines,
                        chunks, panel);
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) count += shuffle_xor(count, mask);
  if (thread_index() % kLanes == 0) ones[row] = count;
}

// Rows of both planes in tiles of 128 columns of V > 0 and the complements of V < 0.
extern "C" __global__ void __launch_bounds__(bae_fast::kLineWarps* bae_fast::kLanes)
    sign_tiles(const int* planes, long long plane_stride, long long stride, int width, int columns,
               int chunks, int aligned, int* tiles, const int* unless) {
  using namespace bae_fast;
  if (unless != nullptr && *unless != 0) return;
  const int at = block_index() * kLineWarps + thread_index() / kLanes;
  const int line = at % kLines, plane = line / kSignColumns;
  const int column = at / kLines * kSignColumns + line % kSignColumns;
  int* const panel = tiles + static_cast<long long>(at / kLines) * chunks * kLineTileWords;
  fill_line(planes + plane * plane_stride + column * stride, width, aligned != 0, column < columns,
            -plane, line, chunks, panel);
}

// `bits` with `ones` are of row_tiles, `signs` of sign_tiles, both of `chunks` tiles a panel. Where
// `unless` is given and not zero nothing is made.
extern "C" __global__ void __launch_bounds__(bae_fast::kPanelThreads, 1)
    sign_panel_product(const int* bits, const int* ones, int rows, const int* signs, int columns,
                       int chunks, int blocks, const long long* counts_signs,
                       const long long* n_rows, const float* scale, float* out,
                       long long out_stride, const int* unless) {
  using namespace bae_fast;
  if (unless != nullptr && *unless != 0) return;
  const unsigned raw = shared_address(shared_memory());
  const unsigned at = raw + ((0u - raw) & 1023u);
  const Ring ring{at + kLineBarriersAt};
  const Share share{block_index(), blocks, ceil_div(rows, kLines), ceil_div(columns, kSignColumns),
                    chunks};
  if (thread_index() == 0) {
    for (int stage = 0; stage < kLineStages; ++stage) {
      start_barrier(ring.full(stage), 1);
      start_barrier(ring.empty(stage), 4 * kConsumers);  // warps that multiply
    }
    publish_barriers();
  }
  synchronize();
  const int warpgroup = thread_index() / kWarpgroup, thread = thread_index() % kWarpgroup;
  if (warpgroup == 0) {
    give_registers<40>();
    if (thread == 0) copy_stages(share, bits, signs, at, ring);
    return;
  }
  take_registers<232>();
  multiply_stages(share, at, ring, warpgroup - 1, thread, ones, rows, columns,
                  StoreScaled{out, out_stride, counts_signs, *n_rows, *scale});
}
