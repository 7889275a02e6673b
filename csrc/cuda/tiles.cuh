// Where everything lies: tiles of the result, operands in shared memory, fragments of the matrix
// instruction, bits of the signs. Integer functions only, for the device, for the emulation and for
// tests on a CPU (tests/backends/csrc/cuda_emulated.cpp).
//
// A product is C[m][n] = popc(A_m & B_n) summed over words, both operands contiguous along the
// summed bits. Rows of operands pass through shared memory in stages of 512 bits, four chunks of
// 128 bits a row. `mma.m16n8k256` takes two chunks at a time; `ldmatrix` hands out 8 rows of one
// chunk, one word to each lane, as for int8 operands of the same number of bytes.
#pragma once

#ifdef __CUDACC__
#define BAE_FAST_BOTH __host__ __device__ __forceinline__
#else
#define BAE_FAST_BOTH inline
#endif

namespace bae_fast {

constexpr int kWordBits = 32;
constexpr int kLanes = 32;
constexpr int kChunkWords = 4;                           // 16 bytes: one asynchronous copy
constexpr int kStageChunks = 4;                          // of one row
constexpr int kStageWords = kStageChunks * kChunkWords;  // of one row
constexpr int kSlices = 2;                               // products of 256 bits in a stage

// A block's tile and how its warps share it: kWarpsM x kWarpsN warps of kFragmentsM x kFragmentsN
// fragments of 16 x 8, kPlanes right operands, kStages stages in flight.
template <int WarpsM, int WarpsN, int FragmentsM, int FragmentsN, int Planes, int Stages>
struct Shape {
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN;
  static constexpr int kFragmentsM = FragmentsM, kFragmentsN = FragmentsN;
  static constexpr int kPlanes = Planes, kStages = Stages;
  static constexpr int kWarps = WarpsM * WarpsN;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kWarpRows = 16 * FragmentsM, kWarpColumns = 8 * FragmentsN;
  static constexpr int kRows = WarpsM * kWarpRows, kColumns = WarpsN * kWarpColumns;
  static constexpr int kStageRows = kRows + Planes * kColumns;  // the left operand's come first
  static constexpr int kSharedBytes = Stages * kStageRows * kStageWords * 4;
  static_assert(FragmentsN % 2 == 0, "right fragments are loaded in pairs");
};

// Pairs: small blocks, two of which share a multiprocessor, so that one's epilogue (half as long as
// its product at 4096 rows) runs beside the other's product; 48 KiB each. Products with the signs
// sum over many more bits: the largest tile. Digits of the counts: few rows, so the block is wide
// and low. They fit every chip from sm_80 to sm_90.
using PairShape = Shape<2, 2, 4, 8, 1, 3>;
using SignShape = Shape<4, 2, 4, 8, 2, 3>;
using DigitShape = Shape<1, 8, 4, 2, 2, 3>;
constexpr int kPairBlocks = 2;  // of one multiprocessor

BAE_FAST_BOTH constexpr int ceil_div(int n, int unit) { return (n + unit - 1) / unit; }

// ---- shared memory
// -------------------------------------------------------------------------------

// Word where a chunk of a row starts. 64 bytes a row: two rows meet all 32 banks once, so the
// chunk's place moves with every second row, and 8 rows of one chunk lie in 8 different places.
BAE_FAST_BOTH constexpr int chunk_at(int row, int chunk) {
  return row * kStageWords + (chunk ^ (row >> 1 & 3)) * kChunkWords;
}

// Row and chunk that lane `lane` names to ldmatrix. Left: registers a0..a3 are rows 0-7 and 8-15 of
// the first chunk, then of the second.
BAE_FAST_BOTH constexpr int left_row(int lane) { return lane & 15; }
BAE_FAST_BOTH constexpr int left_chunk(int slice, int lane) { return 2 * slice + (lane >> 4); }
// Right: b0, b1 of columns 0-7, then of columns 8-15.
BAE_FAST_BOTH constexpr int right_row(int lane) { return (lane >> 4) * 8 + (lane & 7); }
BAE_FAST_BOTH constexpr int right_chunk(int slice, int lane) { return 2 * slice + (lane >> 3 & 1); }

// ---- fragments
// -----------------------------------------------------------------------------------

// Row and column of result register 0..3 of a lane in its 16 x 8 fragment.
BAE_FAST_BOTH constexpr int result_row(int lane, int reg) { return (lane >> 2) + (reg >> 1) * 8; }
BAE_FAST_BOTH constexpr int result_column(int lane, int reg) { return (lane & 3) * 2 + (reg & 1); }

// ---- tiles of the result
// -------------------------------------------------------------------------

struct TileAt {
  int i, j;
};

// Tiles of PairShape that hold anything on or above the diagonal of a [k, k] matrix.
BAE_FAST_BOTH constexpr int triangle_tiles(int k) {
  const int side = ceil_div(k, PairShape::kRows);
  return side * (side + 1) / 2;
}

// Tile of a block: rows i and side - 1 - i of the triangle hold side + 1 tiles together.
BAE_FAST_BOTH constexpr TileAt triangle_tile(int block, int k) {
  static_assert(PairShape::kRows == PairShape::kColumns, "tiles are square");
  const int side = ceil_div(k, PairShape::kRows);
  const int i = block / (side + 1), offset = block % (side + 1), here = side - i;
  if (offset < here) return {i, i + offset};
  return {side - 1 - i, side - 1 - i + offset - here};
}

// The tile that comes next in the order of triangle_tile, for who takes several in turn.
BAE_FAST_BOTH constexpr TileAt next_tile(TileAt tile, int side) {
  if (tile.j + 1 < side) return {tile.i, tile.j + 1};
  const int i = 2 * tile.i + 1 < side ? side - 1 - tile.i : side - tile.i;
  return {i, i};
}

// Tile of a block in a matrix of tiles: groups of 8 rows share their columns in the outer cache.
BAE_FAST_BOTH constexpr TileAt grouped_tile(int block, int rows, int columns) {
  constexpr int kGroup = 8;
  const int first = block / (kGroup * columns) * kGroup;
  const int size = rows - first < kGroup ? rows - first : kGroup;
  const int inside = block % (kGroup * columns);
  return {first + inside % size, inside / size};
}

// ---- signs
// ---------------------------------------------------------------------------------------

constexpr int kTileWords = PairShape::kColumns / kWordBits;  // of one row of a tile
constexpr int kMirrorWords = PairShape::kRows / kWordBits;   // of one column of a tile

// Bit of its word that column fragment `n`, register `reg` of a lane becomes; the word is n / 4.
BAE_FAST_BOTH constexpr int sign_bit(int lane, int n, int reg) {
  return n % 4 * 8 + result_column(lane, reg);
}

// After the four lanes of a row have put their bits together: plane and word of the warp's columns
// that a lane ends with.
BAE_FAST_BOTH constexpr int lane_plane(int lane) { return lane & 1; }
BAE_FAST_BOTH constexpr int lane_word(int lane) { return lane >> 1 & 1; }

// Place of a word of the tile's signs in shared memory.
BAE_FAST_BOTH constexpr int sign_at(int plane, int row, int word) {
  return (plane * PairShape::kRows + row) * kTileWords + word;
}

// ---- what the epilogue keeps where the operands were
// ----------------------------------------------

constexpr int kSignWords = 2 * PairShape::kRows * kTileWords;
constexpr int kCountsAt = kSignWords;  // in words: counts of the tile's rows, then of its columns
constexpr int kSumsAt = kCountsAt + 2 * (PairShape::kRows + PairShape::kColumns);
static_assert((kSumsAt + 2 * PairShape::kWarps) * 4 <= PairShape::kSharedBytes, "");

// ---- operands of asynchronous products (panels.cu)
// ------------------------------------------------

// Feature-packed bits lie in tiles of 128 features x 1024 bits: all tiles of 128 features one after
// the other, in each 128 bytes a feature, whose eight chunks of 16 bytes change places with the
// feature. That is the order in which a product with the swizzle of 128 bytes reads shared memory,
// so that a tile is copied as it lies.
constexpr int kPanelRows = 128;
constexpr int kTileRowWords = 32;                         // 1024 bits of a feature
constexpr int kTileChunks = kTileRowWords / kChunkWords;  // of a feature, 8
constexpr int kFeatureTileWords = kPanelRows * kTileRowWords;
constexpr int kFeatureTileBytes = 4 * kFeatureTileWords;  // 16 KiB

// Word where a chunk of a feature starts in its tile.
BAE_FAST_BOTH constexpr int tile_chunk_at(int row, int chunk) {
  return row * kTileRowWords + (chunk ^ (row & 7)) * kChunkWords;
}

// Shared memory of a block in tiles: its left panel with all bits, the rest stages of right ones.
constexpr int kPanelTiles = 12;
constexpr int kMostStages = 8;
constexpr int kMostPanelTiles = 8;  // 8192 bits, and four stages are left
BAE_FAST_BOTH constexpr int panel_stages(int tiles) {
  return kPanelTiles - tiles < kMostStages ? kPanelTiles - tiles : kMostStages;
}
constexpr int kConsumers = 2;           // warpgroups that multiply, and one that copies
constexpr int kWarpgroup = 4 * kLanes;  // threads
constexpr int kPanelThreads = (kConsumers + 1) * kWarpgroup;

// Behind the tiles, in words: signs of a tile and counts of its columns for each consumer,
// barriers.
constexpr int kPanelSignsAt = kPanelTiles * kFeatureTileWords;
constexpr int kPanelSignWords = 2 * kPanelRows * (kPanelRows / kWordBits);
constexpr int kPanelCountsAt = kPanelSignsAt + kConsumers * kPanelSignWords;
constexpr int kPanelBarriersAt = kPanelCountsAt + kConsumers * kPanelRows;
constexpr int kPanelBarriers = 2 * kMostStages + 2 + kConsumers;
// swizzles go by addresses, and the start of shared memory is promised to 16 bytes alone
constexpr int kPanelSharedBytes = 4 * (kPanelBarriersAt + 2 * kPanelBarriers) + 1024;
static_assert(kPanelSharedBytes <= 227 * 1024, "a block of compute capability 9.0");

// ---- operands of asynchronous products with the signs (sign_panels.cu)
// ------------------------------------------------

// Lines of bits in tiles of 256 lines x 1024 bits, in the order of feature tiles. The lines of a
// left tile are rows of B. Those of a right one are 128 columns of the plane of V > 0, then the
// same columns of the other plane's complement.
constexpr int kLines = 256;
constexpr int kSignColumns = kLines / 2;
constexpr int kLineTileWords = kLines * kTileRowWords;
constexpr int kLineTileBytes = 4 * kLineTileWords;  // 32 KiB
constexpr int kLineWarps = 8;                       // of a block that fills tiles, a line each
static_assert(kLines % kLineWarps == 0, "lines of a block are of one tile");

// Shared memory of a block: stages of one left and one right tile, then barriers.
constexpr int kLineStages = 3;
constexpr int kLineStageBytes = 2 * kLineTileBytes;
constexpr int kLineBarriersAt = kLineStages * kLineStageBytes;  // in bytes
constexpr int kLineSharedBytes = kLineBarriersAt + 8 * 2 * kLineStages + 1024;
static_assert(kLineSharedBytes <= 227 * 1024, "a block of compute capability 9.0");

}  // namespace bae_fast
