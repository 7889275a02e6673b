// Checks of csrc/cuda/tiles.cuh without a device: every place is met once, no two rows of an
// ldmatrix meet in a bank. Prints the sizes that launchers repeat; the first thing wrong ends it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <tuple>
#include <vector>

#include "tiles.cuh"

using namespace bae_fast;

static void check(bool right, const char* what, int a = 0, int b = 0) {
  if (right) return;
  fprintf(stderr, "%s: %d %d\n", what, a, b);
  exit(1);
}

template <typename S>
static void operands(const char* name) {
  // every chunk of a stage has a place of its own, and copies fill them all
  std::set<int> places;
  for (int row = 0; row < S::kStageRows; ++row) {
    for (int chunk = 0; chunk < kStageChunks; ++chunk) {
      const int at = chunk_at(row, chunk);
      check(at % kChunkWords == 0 && at < S::kStageRows * kStageWords, "place", row, chunk);
      check(places.insert(at).second, "two chunks in one place", row, chunk);
    }
  }
  check(S::kRows % 8 == 0 && S::kColumns % 8 == 0, "a plane must keep the order of chunks");
  // 8 rows of one matrix of an ldmatrix touch all 32 banks once, wherever its fragment lies
  for (int first = 0; first < S::kStageRows; first += 16) {
    for (int slice = 0; slice < kSlices; ++slice) {
      for (int side = 0; side < 2; ++side) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          std::set<int> banks;
          for (int lane = matrix * 8; lane < matrix * 8 + 8; ++lane) {
            const int row = first + (side == 0 ? left_row(lane) : right_row(lane));
            const int chunk = side == 0 ? left_chunk(slice, lane) : right_chunk(slice, lane);
            for (int w = 0; w < 4; ++w) banks.insert((chunk_at(row, chunk) + w) % 32);
          }
          check(banks.size() == 32, "bank conflict", first, matrix);
        }
      }
    }
  }
  // each lane's matrices are a fragment: 16 rows x 2 chunks on the left, on the right two of 8 x 2
  std::set<std::tuple<int, int>> left, right;
  for (int slice = 0; slice < kSlices; ++slice) {
    for (int lane = 0; lane < kLanes; ++lane) {
      left.insert({left_row(lane), left_chunk(slice, lane)});
      right.insert({right_row(lane), right_chunk(slice, lane)});
    }
  }
  check(left.size() == 64 && right.size() == 64, "fragments of operands");
  // every element of the tile is in one register of one lane
  std::vector<int> met(S::kRows * S::kColumns, 0);
  for (int warp = 0; warp < S::kWarps; ++warp) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int m = 0; m < S::kFragmentsM; ++m) {
        for (int n = 0; n < S::kFragmentsN; ++n) {
          for (int reg = 0; reg < 4; ++reg) {
            const int i = warp / S::kWarpsN * S::kWarpRows + m * 16 + result_row(lane, reg);
            const int j = warp % S::kWarpsN * S::kWarpColumns + n * 8 + result_column(lane, reg);
            ++met[i * S::kColumns + j];
          }
        }
      }
    }
  }
  for (int at = 0; at < S::kRows * S::kColumns; ++at) {
    check(met[at] == 1, "element", at / S::kColumns, at % S::kColumns);
  }
  printf("%s %d %d %d %d\n", name, S::kRows, S::kColumns, S::kSharedBytes, S::kThreads);
}

static void signs() {
  // bits of a row of a warp's part: 64 columns are the bits of two words, in order
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int n = 0; n < PairShape::kFragmentsN; ++n) {
      for (int reg = 0; reg < 4; ++reg) {
        const int column = n * 8 + result_column(lane, reg);
        check(n / 4 == column / kWordBits, "word of a sign", lane, n);
        check(sign_bit(lane, n, reg) == column % kWordBits, "bit of a sign", lane, n);
      }
    }
  }
  // the four lanes of a row end with four different words
  for (int group = 0; group < 8; ++group) {
    std::set<std::tuple<int, int>> words;
    for (int lane = group * 4; lane < group * 4 + 4; ++lane) {
      words.insert({lane_plane(lane), lane_word(lane)});
    }
    check(words.size() == 4, "words of a row", group);
  }
  std::set<int> places;
  for (int plane = 0; plane < 2; ++plane) {
    for (int row = 0; row < PairShape::kRows; ++row) {
      for (int word = 0; word < kTileWords; ++word) {
        const int at = sign_at(plane, row, word);
        check(0 <= at && at < kSignWords && places.insert(at).second, "place of signs", row, word);
      }
    }
  }
}

static void triangles(int k) {
  const int side = ceil_div(k, PairShape::kRows);
  std::vector<int> met(side * side, 0);
  for (int block = 0; block < triangle_tiles(k); ++block) {
    const TileAt tile = triangle_tile(block, k);
    if (block > 0) {
      const TileAt same = next_tile(triangle_tile(block - 1, k), side);
      check(same.i == tile.i && same.j == tile.j, "the next tile", k, block);
    }
    check(tile.i >= 0 && tile.i <= tile.j && tile.j < side, "tile", k, block);
    ++met[tile.i * side + tile.j];
  }
  for (int i = 0; i < side; ++i) {
    for (int j = 0; j < side; ++j)
      check(met[i * side + j] == (i <= j), "tile met", k, i * side + j);
  }
}

static void panels() {
  // every chunk of a tile has a place of its own, in the feature's 128 bytes; 8 rows of one chunk,
  // which a product reads at once, meet all banks
  for (int row = 0; row < kLines; ++row) {
    std::set<int> places;
    for (int chunk = 0; chunk < kTileChunks; ++chunk) {
      const int at = tile_chunk_at(row, chunk);
      check(at % kChunkWords == 0 && at / kTileRowWords == row, "row of a chunk", row, chunk);
      check(places.insert(at).second, "two chunks in one place", row, chunk);
      // bits 7 to 9 of the address in bytes change bits 4 to 6
      const int plain = 4 * (row * kTileRowWords + chunk * kChunkWords);
      check(4 * at == (plain ^ (plain >> 7 & 7) << 4), "swizzle of 128 bytes", row, chunk);
    }
  }
  for (int tiles = 1; tiles <= kMostPanelTiles; ++tiles) {
    const int stages = panel_stages(tiles);
    check(stages >= 4 && stages <= kMostStages && tiles + stages <= kPanelTiles, "stages", tiles);
  }
  printf("panels %d %d %d %d\n", kPanelRows, kTileRowWords, kPanelSharedBytes, kPanelThreads);
  // halves and quarters of a tile of lines start where a swizzle does
  check(kLineTileBytes / 4 % 1024 == 0, "lines of a warpgroup");
  printf("lines %d %d %d %d\n", kLines, kTileRowWords, kLineSharedBytes, kPanelThreads);
}

static void groups(int rows, int columns) {
  std::set<std::tuple<int, int>> met;
  for (int block = 0; block < rows * columns; ++block) {
    const TileAt tile = grouped_tile(block, rows, columns);
    check(tile.i >= 0 && tile.i < rows && tile.j >= 0 && tile.j < columns, "tile", rows, block);
    check(met.insert({tile.i, tile.j}).second, "a tile twice", rows, block);
  }
}

int main() {
  operands<PairShape>("pairs");
  operands<SignShape>("signs");
  operands<DigitShape>("digits");
  signs();
  panels();
  for (int k = 1; k < 4000; k += 37) triangles(k);
  for (int k : {128, 129, 256, 257, 384, 512, 768, 1024, 65536}) triangles(k);
  for (int rows = 1; rows < 20; ++rows) {
    for (int columns = 1; columns < 12; ++columns) groups(rows, columns);
  }
  return 0;
}
