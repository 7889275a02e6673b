"""The covariance of sparse codes from lists of their ones: sum_r l_r^2 steps for l_r ones in row r.

    sum_{i != j} |V_ij| = M^2 - sum_j n_j^2 + sum over ordered pairs with n_ij > 0 of
                          (|V_ij| - n_i n_j),   M = sum_j n_j
    S_ij = -1 where n_ij = 0;   (B S)_ri = -(l_r - B_ri) + (B Q)_ri with Q = S + 1 where n_ij > 0

over features that are not constant, ranked by falling counts. The first ranks are dense: their
pairs with each other come from products of bits. Pairs are counted by sorting them, a block of
features at a time. On a CPU only: how many there are would have to be read back from a GPU.
"""

from __future__ import annotations

from math import isinf

import torch
from torch import Tensor

from bae_fast.packing import WORD_BITS

# products of bits (fp32) in the time of one listed pair, infinite for no lists at all; estimated
# from one thread's rates, not measured at the crossover
LIST_COST = 2500.0
# products of bits in the time of one number added by embedding_bag: an estimate, not measured
GATHER_COST = 8.0
# lists keep no signs for backward: they must take half of the time
_GAIN = 0.5
_PAIRS = 2**22  # sorted at a time
_TILE_NUMBERS = 2**23  # of Q at a time
_ROW_BLOCK = 4096


def _ones(words: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the set bits, by rows; only words that are not zero are unpacked."""
    rows, columns = [], []
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    for top in range(0, len(words), _ROW_BLOCK):
        part = words[top : top + _ROW_BLOCK]
        row, word = part.nonzero(as_tuple=True)
        at, bit = ((part[row, word][:, None] >> shifts) & 1).nonzero(as_tuple=True)
        rows.append(row[at] + top)
        columns.append(word[at] * WORD_BITS + bit)
    return torch.cat(rows), torch.cat(columns)


def _begins(numbers: Tensor, n: int) -> Tensor:
    """Where each of the groups 0 .. n begins among sorted numbers: ``[n + 1]``."""
    return torch.searchsorted(numbers, torch.arange(n + 1, device=numbers.device))


def _expand(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The group of each item, and its place within it, for groups that lie one after the other."""
    group = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    begin = lengths.cumsum(0) - lengths
    return group, torch.arange(len(group), device=lengths.device) - begin[group]


class Rows:
    """Rows as rising lists of ranks: ``entries[begin[r] : begin[r + 1]]``."""

    def __init__(self, words: Tensor, rank_of: Tensor, dense: int) -> None:
        row, column = _ones(words)
        rank = rank_of[column]
        row, rank = row[rank >= 0], rank[rank >= 0]
        order = torch.argsort(row * max(len(rank_of), 1) + rank)
        self.row, self.entries = row[order], rank[order]
        self.n = len(words)
        self.begin = _begins(self.row, self.n)
        self.rare = self.entries >= dense
        self.dense = dense

    def dense_bits(self) -> Tensor:
        """fp32 ``[N, dense]``."""
        bits = torch.zeros(self.n, self.dense, device=self.entries.device)
        bits[self.row[~self.rare], self.entries[~self.rare]] = 1
        return bits

    def rare_lengths(self) -> Tensor:
        return torch.bincount(self.row[self.rare], minlength=self.n)


class PairLists:
    """Lists of the counted rows, where they are the faster form (``serves``)."""

    def __init__(self, words: Tensor, counts: Tensor, n_rows: Tensor) -> None:
        self.n_rows = int(n_rows)
        varying = (counts > 0) & (counts < self.n_rows)
        order = torch.argsort(counts, descending=True, stable=True)
        self.feature = order[varying[order]]
        self.active, self.k = len(self.feature), len(counts)
        self.rank_of = torch.full_like(counts, -1)
        self.rank_of[self.feature] = torch.arange(self.active, device=counts.device)
        self.ones = counts[self.feature]
        self.dense = int((self.ones.double().square() * LIST_COST > self.n_rows**2).sum())
        self.words = words
        self.rows: Rows | None = None

    def serves(self, all_rows: bool) -> bool:
        """Whether lists are the faster form: for the signs, or for their product with all rows."""
        if isinf(LIST_COST):
            return False
        rare = float(self.ones[self.dense :].sum())
        n, bits = float(self.n_rows), float(self.k) ** 2
        work = LIST_COST * rare**2 / n + n * self.dense**2
        if work >= _GAIN * n * bits:
            return False
        lists = self.listed()
        lengths = lists.begin.diff().double()
        visited = float((lengths.square() - (lengths - lists.rare_lengths()).square()).sum())
        work = LIST_COST * visited + n * self.dense**2
        if all_rows:
            bits *= 2  # signs that were not kept, and their product
            work += (GATHER_COST * float(lists.rare.sum()) + n * self.dense) * self.active
        return work < _GAIN * n * bits

    def listed(self) -> Rows:
        if self.rows is None:
            self.rows = Rows(self.words, self.rank_of, self.dense)
            entries = self.rows.entries
            self.by_rank = torch.argsort(entries, stable=True)  # places, by feature and row
            self.of_rank = _begins(entries[self.by_rank], self.active)
        return self.rows

    def pairs(self, ranks: Tensor, before: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The places in ``ranks`` of i and j with n_ij > 0; ``before``: only for j < i.

        Entries i that are dense have no dense j.
        """
        lists = self.listed()
        at, inner = _expand(self.of_rank[ranks + 1] - self.of_rank[ranks])
        place = self.by_rank[self.of_rank[ranks][at] + inner]
        begin = lists.begin[lists.row[place]]
        end = place if before else lists.begin[lists.row[place] + 1]
        entry, inner = _expand(end - begin)
        j, at = lists.entries[begin[entry] + inner], at[entry]
        wanted = (ranks[at] >= self.dense) | (j >= self.dense)
        key = (at * self.active + j)[wanted].sort().values
        key, joint = torch.unique_consecutive(key, return_counts=True)
        return key // max(self.active, 1), key % max(self.active, 1), joint

    def blocks(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of ranks with at most about ``_PAIRS`` pairs, or of one rank."""
        lists = self.listed()
        length = lists.begin.diff()[lists.row[self.by_rank]]
        total = torch.cat([length.new_zeros(1), length.cumsum(0)])[self.of_rank]
        ranges = []
        while first < last:
            end = int(torch.searchsorted(total, total[first] + _PAIRS, right=True)) - 1
            end = min(max(end, first + 1), last)
            ranges.append((first, end))
            first = end
        return ranges

    def numerator(self) -> Tensor:
        """sum |V| without pairs of two dense features; int64 ``[]``, exact where that fits."""

        def without_pairs(ones: Tensor) -> Tensor:
            return ones.sum() ** 2 - ones.square().sum()

        total = without_pairs(self.ones) - without_pairs(self.ones[: self.dense])
        for first, last in self.blocks(self.dense, self.active):
            ranks = torch.arange(first, last, device=self.ones.device)
            i, j, joint = self.pairs(ranks, before=True)
            expected = self.ones[ranks[i]] * self.ones[j]
            total = total + 2 * ((self.n_rows * joint - expected).abs() - expected).sum()
        return total


class ListedSigns:
    """B S and n^T S for columns at a time, from lists: ``SignProduct`` for sparse codes.

    Sums are of integers, exact in fp32: |B S| is at most the ones of a row.
    """

    def __init__(self, lists: PairLists, words: Tensor) -> None:
        self.lists = lists
        self.at_hand = Rows(words, lists.rank_of, lists.dense)
        self.rare_lengths = self.at_hand.rare_lengths()
        self.rare_entries = self.at_hand.entries[self.at_hand.rare]
        self.offsets = torch.cat([self.rare_lengths.new_zeros(1), self.rare_lengths.cumsum(0)])
        self.bits, self.counted = self.at_hand.dense_bits(), lists.listed().dense_bits()

    def __call__(self, j: tuple[int, int]) -> Tensor:
        """N (B S) - 1 (n^T S) for columns j[0] .. j[1]: float64 ``[rows at hand, columns]``."""
        lists = self.lists
        out = torch.zeros(
            self.at_hand.n, j[1] - j[0], dtype=torch.float64, device=lists.ones.device
        )
        ranks, columns = lists.rank_of[j[0] : j[1]].sort()
        most = max(_TILE_NUMBERS // max(lists.active, 1), 1)
        columns, ranks = columns[ranks >= 0], ranks[ranks >= 0]
        for start in range(0, len(ranks), most):
            part = slice(start, start + most)
            out[:, columns[part]] = self._columns(ranks[part])
        return out

    def _columns(self, ranks: Tensor) -> Tensor:
        lists, n, dense = self.lists, self.lists.n_rows, self.lists.dense
        above = torch.zeros(lists.active, len(ranks), device=ranks.device)  # S + 1, rare rows
        joint = torch.zeros(dense, len(ranks), dtype=torch.float64, device=ranks.device)
        c, i, n_ij = lists.pairs(ranks, before=False)
        above[i, c] = ((n * n_ij - lists.ones[ranks[c]] * lists.ones[i]).sign() + 1).float()
        joint[i[i < dense], c[i < dense]] = n_ij[i < dense].double()
        ones = lists.ones.double()
        at = torch.arange(len(ranks), device=ranks.device)
        is_rare = ranks >= dense
        above[ranks[is_rare], at[is_rare]] = 1  # S is zero on the diagonal
        above[:dense] = 0
        rare_ones = ones.clone()
        rare_ones[:dense] = 0
        counts_signs = rare_ones @ above.double() - rare_ones.sum()
        products = torch.zeros(self.at_hand.n, len(ranks), device=ranks.device)
        if len(self.rare_entries):
            products = torch.nn.functional.embedding_bag(
                self.rare_entries, above, self.offsets, mode="sum", include_last_offset=True
            )
        products -= self.rare_lengths[:, None]
        if dense:
            both = at[~is_rare]
            joint[:, both] = (self.counted.t() @ self.counted[:, ranks[both]]).double()
            signs = (n * joint - torch.outer(ones[:dense], ones[ranks])).sign()
            signs[ranks[both], both] = 0
            counts_signs += ones[:dense] @ signs
            products += self.bits @ signs.float()
        return products.double() * n - counts_signs
