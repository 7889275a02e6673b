// A first stage of encode in 8-bit integers, for sparse codes: products of twice as many numbers an
// instruction, with the bound of screened_encode.h. It is some hundredth of |x| |w|, less than a
// standard deviation of pre-activations, and decides all entries but those whose mean is near a
// threshold. These are sums of 16-bit integers, one by one, with their own bound; what they leave
// open goes on as there.
//
// Integers of rows are p + 128, as the instruction wants one side unsigned: 128 times the sum of q
// comes off again. Sums are below 255 * 127 * kMostScreened < 2^31.
//
// One dimension far larger than the others makes a coarse step, and a dense code has much near
// zero: then too much is open, and 16 bits serve the strip from the start.
//
// Written with a struct Quads like Pairs, whose int32 are four integers: unsigned ones of the left
// side, signed ones of the right.
#pragma once

#include "screened_encode.h"

namespace bae_fast {
namespace {

struct ByQuads {
  using Block = Quads;
  using Small = int8_t __attribute__((vector_size(kScreenLanes)));
  static constexpr int64_t kOf = 4, kBits = 8;
  static constexpr float kNorm = __builtin_inff(), kLargest = 127.0f;
  static constexpr int32_t kOffset = 128;
  static constexpr bool kByLane = false;
  static constexpr int64_t kJudged = 96;
  // A dozen products of 16 bits take as long as those of 8 and a sum of its own for one of them.
  // What has been done for many rows is not given up so soon.
  static int64_t most_open(int64_t done) { return done > kJudged ? 6 : 12; }
};
static_assert(Quads::kLanes == kScreenLanes && Quads::kRows == kScreenRows);

// Pairs of a row or a column in one piece, for sums of their own: no lane leaves 32 bits where
// that holds for a class of numbers, which makes steps finer than those of ByPairs.
struct ByLines : ByPairs {
  static constexpr bool kByLane = true;
};

// ---- panels -------------------------------------------------------------------------------------

// int32, whole cache lines; past the depth those of columns are zero
inline int64_t line_of(int64_t depth) { return round_up(held<ByLines>(depth), 16); }

// After the panel of quads: [rows] of ScreenedRow, whole cache lines of them; then [row][line].
struct RowLines {
  ScreenedRow* rows;
  int32_t* lines;

  static int64_t bytes(int64_t total, int64_t depth) {
    return screened_rows_bytes(total) + total * line_of(depth) * 4;
  }
  RowLines(const uint8_t* panel, int64_t total, int64_t depth) {
    uint8_t* const from = const_cast<uint8_t*>(panel) + screen_panel_bytes<ByQuads>(total, depth);
    rows = reinterpret_cast<ScreenedRow*>(from);
    lines = reinterpret_cast<int32_t*>(from + screened_rows_bytes(total));
  }
};

int64_t byte_panel_bytes(int64_t rows, int64_t depth) {
  return screen_panel_bytes<ByQuads>(rows, depth) + RowLines::bytes(rows, depth);
}

bool byte_pack(const Matrix& left, int64_t first, int64_t total, int64_t depth, uint8_t* panel) {
  const RowLines of(panel, total, depth);
  for (int64_t row = first; row < first + kScreenRows; ++row) {
    if (row >= total) {
      screen_pack_nothing<ByQuads>(row, total, depth, panel);
      continue;
    }
    const RowSize size(left, row, depth);
    if (!screen_pack_row<ByQuads>(left, row, total, depth, size, panel)) return false;
    int32_t* const line = of.lines + row * line_of(depth);
    const Scale scale(size.of_class, size.largest, ByLines::kNorm, ByLines::kLargest);
    of.rows[row] = quantise_row<ByLines>(
        left, row, depth, size, scale,
        [&](int64_t k, ByLines::Small integers) { store_vector(line + k / 2, integers); });
  }
  return true;
}

// What bytes need beside their panels: pairs of columns, as blocks of one strip and as lines of
// all, and the open rows of as many columns as a word has.
struct ByteScratch : ScreenScratch<ByQuads> {
  int32_t *pairs, *lines;
  uint16_t* open;

  static int64_t bytes(int64_t depth) {
    return ScreenScratch::bytes(depth) +
           kScreenStrip * (held<ByLines>(depth) + strips_at_once(depth) * line_of(depth)) * 4 +
           kWordBits * kScreenBlock * 2;
  }
  ByteScratch(uint8_t* memory, int64_t depth) : ScreenScratch(memory, depth) {
    lines = reinterpret_cast<int32_t*>(memory + ScreenScratch::bytes(depth));
    pairs = lines + strips_at_once(depth) * kScreenStrip * line_of(depth);
    open = reinterpret_cast<uint16_t*>(pairs + kScreenStrip * held<ByLines>(depth));
  }
};

// [kScreenColumns columns][pair of k][kScreenColumns] to [column][line]
void turn_pairs(const int32_t* pairs, int64_t depth, int64_t columns, int32_t* out) {
  const int64_t deep = held<ByLines>(depth), line = line_of(depth);
  for (int64_t c = 0; c < columns; c += kScreenLanes) {
    const int32_t* const from =
        pairs + c / kScreenColumns * kScreenColumns * deep + c % kScreenColumns;
    for (int64_t k = 0; k < line; k += kScreenLanes) {
      typename Fma::Numbers block[kScreenLanes];
      for (int64_t i = 0; i < kScreenLanes; ++i) {
        const int32_t* const at = from + (k + i) * kScreenColumns;
        block[i] = k + i < deep ? Fma::load(reinterpret_cast<const float*>(at)) : Fma::zero();
      }
      Fma::transpose(block);
      for (int64_t i = 0; i < kScreenLanes; ++i) {
        Fma::store(reinterpret_cast<float*>(out + (c + i) * line + k), block[i]);
      }
    }
  }
}

// ---- sums of single entries ---------------------------------------------------------------------

// Of kRows rows and a column.
template <int kRows>
inline void dots_of_lines(const int32_t* const* x, const int32_t* w, int64_t length, int64_t* out) {
  typename Pairs::Numbers sum[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sum[i] = Pairs::zero();
  for (int64_t k = 0; k < length; k += kScreenLanes) {
    const typename Pairs::Numbers of_column = Pairs::load(w + k);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      sum[i] = Pairs::multiply_add(Pairs::load(x[i] + k), of_column, sum[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    int32_t lanes[kScreenLanes];
    Pairs::store(lanes, sum[i]);
    out[i] = 0;
    for (int l = 0; l < kScreenLanes; ++l) out[i] += lanes[l];
  }
}

struct LineFiner {
  const ByteScratch& scratch;
  RowLines of;
  ScreenedColumns columns[kMostStrips];

  LineFiner(const UnitStrip& s, const ByteScratch& memory)
      : scratch(memory), of(s.left, s.rows, s.depth), columns{} {}

  const int32_t* line(int64_t index, const Strip& strip, int64_t column) const {
    return scratch.lines + (index * kScreenStrip + column) * line_of(strip.s.depth);
  }

  void prepare(int64_t index, const Strip& strip) {
    columns[index].begin(strip.e, strip.s.columns);
    screen_columns<ByLines>(strip.numbers, scratch.pairs, columns[index]);
    turn_pairs(scratch.pairs, strip.s.depth, strip.s.columns,
               scratch.lines + index * kScreenStrip * line_of(strip.s.depth));
  }

  // Entries of a column and the first `used` of kRows rows.
  template <int kRows>
  void decide_rows(int64_t index, const Strip& strip, int64_t c, const uint16_t* rows,
                   int64_t used) const {
    const int64_t length = line_of(strip.s.depth);
    const ScreenedColumns& column = columns[index];
    const int32_t* x[kRows];
    int64_t sum[kRows];
    for (int i = 0; i < kRows; ++i) x[i] = of.lines + rows[i < used ? i : 0] * length;
    dots_of_lines<kRows>(x, line(index, strip, c), length, sum);
    for (int i = 0; i < used; ++i) {
      const ScreenedRow& row = of.rows[rows[i]];
      const float pre = static_cast<float>(sum[i]) * column.step[c] * row.step + column.bias[c];
      const float bound =
          row.whole * column.error[c] + row.error * column.whole[c] + column.slack[c];
      if (!decide_entry(strip, rows[i], c, pre, bound)) continue;
      set_bit(strip.doubts[rows[i] * kWideWords + c / kWordBits], c % kWordBits, false);
    }
  }

  // Column by column: one stays in the innermost cache, and enough rows are at hand to be taken
  // together.
  void decide(int64_t index, const Strip& strip, int64_t first, int64_t last) const {
    for (int64_t c = 0; c < strip.s.columns; c += kWordBits) {
      int64_t count[kWordBits] = {};
      for (int64_t row = first; row < last; ++row) {
        uint32_t open = strip.doubts[row * kWideWords + c / kWordBits];
        for (; open != 0; open &= open - 1) {
          const int64_t i = __builtin_ctz(open);
          scratch.open[i * kScreenBlock + count[i]++] = static_cast<uint16_t>(row);
        }
      }
      for (int64_t i = 0; i < kWordBits; ++i) {
        const uint16_t* rows = scratch.open + i * kScreenBlock;
        for (int64_t rest = count[i]; rest > 0; rest -= 8, rows += 8) {
          if (rest > 4) {
            decide_rows<8>(index, strip, c + i, rows, rest < 8 ? rest : 8);
          } else {
            decide_rows<4>(index, strip, c + i, rows, rest);
          }
        }
      }
    }
  }
};

bool byte_encode(const UnitStrip& s, const EncodeStrip& e) {
  const ByteScratch scratch(s.scratch, s.depth);
  return encode_strips<ByQuads>(s, e, scratch, LineFiner(s, scratch));
}

// Of fewer rows, columns take longer to prepare than products become faster. Measured with trained
// codes: at 512 rows 0.83 to 0.90 of the time of 16 bits, at 256 rows 0.8 to 1.3.
constexpr int64_t kLeastScreened = 512;

constexpr Screen kByteScreen = {
    kScreenRows,      kLeastScreened,     ByQuads::kJudged, kMostScreened, screen_columns_at_once,
    byte_panel_bytes, ByteScratch::bytes, byte_pack,        byte_encode};

}  // namespace
}  // namespace bae_fast
