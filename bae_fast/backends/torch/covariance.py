"""Covariance of packed bits in integers: sum |V_ij| and the signs of V, by square tiles.

    V_ij = N n_ij - n_i n_j,   n_ij = (B^T B)_ij,   C_ij = V_ij / (N (N - 1))

Tiles on and above the diagonal are computed, the rest follow by symmetry. n_ij are sums of
products of zeros and ones, exact in fp32 up to 2^24 rows; V is exact in fp32 while N^2 <= 2^24
and in float64 beyond. Sums of |V| are integers: a tile of the first kind stays below 2^53 and is
summed in float64, any other in int64, and tiles meet in int64: the same on every device and in any
order. Constant columns need no case of their own: their V is zero.

That is F^2 N products. Rows of few ones take ``pair_lists`` instead, on a CPU, with the same
integers.

Every product here has operands that bf16 and TF32 hold exactly, so that lowering the precision of
fp32 products (torch.set_float32_matmul_precision) changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.torch.pair_lists import ListedSigns, PairLists
from bae_fast.ops.limits import check_numerator
from bae_fast.packing import WORD_BITS, n_words, pack_rows, unpack_rows

TILE = 1024
_DIGITS = (0, 8, 16, 24)  # of a count, 8 bits each
ROW_BLOCK = 16384


def tiles(n_columns: int) -> list[tuple[int, int]]:
    """Column ranges of one tile's side; each starts on a word."""
    return [(start, min(start + TILE, n_columns)) for start in range(0, n_columns, TILE)]


def unpack_tile(words: Tensor, tile: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Bits of the columns of one tile, ``[N, stop - start]``."""
    start, stop = tile
    return unpack_rows(words[:, start // WORD_BITS : n_words(stop)], stop - start, dtype)


def covariance_tile(
    words: Tensor, counts: Tensor, n_rows: Tensor, i: tuple[int, int], j: tuple[int, int]
) -> Tensor:
    """V for columns i x j, exact; the diagonal of the whole matrix is zero."""
    n = words.shape[0]
    wide = torch.float32 if n * n <= 2**24 else torch.float64
    v = torch.zeros(i[1] - i[0], j[1] - j[0], dtype=wide, device=words.device)
    for top in range(0, n, ROW_BLOCK):
        rows = words[top : top + ROW_BLOCK]
        left = unpack_tile(rows, i, torch.float32)
        right = left if i == j else unpack_tile(rows, j, torch.float32)
        v += left.t() @ right
    v *= n_rows.to(wide)
    v -= torch.outer(counts[i[0] : i[1]].to(wide), counts[j[0] : j[1]].to(wide))
    v.diagonal(i[0] - j[0]).zero_()  # the matrix's own diagonal, empty where the tile misses it
    return v


def covariance(
    words: Tensor, counts: Tensor, n_rows: Tensor, keep_signs: bool, keep_lists: bool = False
) -> tuple[Tensor, Tensor]:
    if words.device.type == "cpu":  # reading them back would synchronise a GPU
        check_numerator(words, counts, n_rows)
        lists = PairLists(words, counts, n_rows)
        if lists.serves(all_rows=False):
            numerator = lists.numerator()
            if lists.dense:
                dense = pack_rows(lists.listed().dense_bits())
                numerator += by_tiles(dense, lists.ones[: lists.dense], n_rows, False)[0]
            return numerator, words.new_empty(0)
    return by_tiles(words, counts, n_rows, keep_signs)


def by_tiles(
    words: Tensor, counts: Tensor, n_rows: Tensor, keep_signs: bool
) -> tuple[Tensor, Tensor]:
    """The numerator, and the sign planes where they are asked for, by products of bits."""
    k = counts.shape[0]
    numerator = torch.zeros((), dtype=torch.int64, device=words.device)
    signs = torch.zeros(
        (2, k, n_words(k)) if keep_signs else 0, dtype=torch.int32, device=words.device
    )
    sides = tiles(k)
    for a, i in enumerate(sides):
        for j in sides[a:]:
            v = covariance_tile(words, counts, n_rows, i, j)
            if v.dtype == torch.float32:
                total = torch.linalg.vector_norm(v, 1, dtype=torch.float64).to(torch.int64)
            else:
                total = v.abs().to(torch.int64).sum()
            numerator += total if i == j else 2 * total
            if not keep_signs:
                continue
            for plane, sign in zip(signs, (v > 0, v < 0), strict=True):
                plane[i[0] : i[1], j[0] // WORD_BITS : n_words(j[1])] = pack_rows(sign)
                if i != j:
                    plane[j[0] : j[1], i[0] // WORD_BITS : n_words(i[1])] = pack_rows(sign.t())
    return numerator, signs


class SignProduct:
    """B S and n^T S for one tile of columns at a time, S = sign(V) of the counted rows.

    Both are sums of integers, exact in fp32 within a tile: |B S| <= 1024, and n is split into
    digits of 8 bits, whose sums stay below 2^18. They meet in float64.
    """

    def __init__(
        self,
        words: Tensor,
        signs: Tensor | None,
        stats_words: Tensor | None,
        counts: Tensor,
        n_rows: Tensor,
    ) -> None:
        self.words, self.signs, self.stats_words = words, signs, stats_words
        self.counts, self.n_rows = counts, n_rows
        self.listed: ListedSigns | None = None
        if signs is None and stats_words is not None and words.device.type == "cpu":
            lists = PairLists(stats_words, counts, n_rows)
            if lists.serves(all_rows=True):
                self.listed = ListedSigns(lists, words)

    def sign_tile(self, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        """fp32 {-1, 0, 1} of columns i x j, from the stored planes or computed again."""
        if self.signs is not None:
            above, below = (
                unpack_tile(plane[i[0] : i[1]], j, torch.float32) for plane in self.signs
            )
            return above - below
        assert self.stats_words is not None
        return covariance_tile(self.stats_words, self.counts, self.n_rows, i, j).sign_().float()

    def __call__(self, j: tuple[int, int]) -> Tensor:
        """N (B S) - 1 (n^T S) for the columns of tile j: float64 ``[rows at hand, columns]``."""
        if self.listed is not None:
            return self.listed(j)
        bits_signs = torch.zeros(
            self.words.shape[0], j[1] - j[0], dtype=torch.float32, device=self.words.device
        )
        counts_signs = torch.zeros(j[1] - j[0], dtype=torch.float64, device=self.words.device)
        for i in tiles(self.counts.shape[0]):
            s = self.sign_tile(i, j)
            bits_signs.addmm_(unpack_tile(self.words, i, torch.float32), s)
            counts = self.counts[i[0] : i[1]]
            digits = torch.stack([(counts >> shift) & 0xFF for shift in _DIGITS]).float()
            for shift, part in zip(_DIGITS, (digits @ s).double(), strict=True):
                counts_signs += part * 2**shift
        return bits_signs.double() * self.n_rows - counts_signs
