"""Covariance: sum |V_ij| over i != j and the signs of V, from bits by integer operations.

    V_ij = N n_ij - n_i n_j,   n_ij = popcount of column i & column j

Two forms of the same integers. By bits, F^2 N products of bits, and planes of the signs are kept.
By lists (``csrc/pair_lists.cpp``), sum_r l_r^2 entries are visited for l_r ones in row r; the lists
of ones are kept, 12 bytes a one, and backward counts again. Sparse codes make the second cheap
whatever F is.
"""

from __future__ import annotations

from math import isinf
from typing import NamedTuple

import torch
from torch import Tensor

from bae_fast.backends.cpp.extension import op, simd
from bae_fast.ops.limits import check_numerator
from bae_fast.packing import same_words

# Products of bits in the time of one visited entry, infinite for no lists at all: where both forms
# take the same time for the covariance and its gradient, on one thread (N, F = 512, 2304; 512,
# 8192; 4096, 2304 of `python -m bench crossover`). avx512 is of a processor with AVX-512, avx2 and
# scalar of one with AVX2 alone, on which they are 1,633 and 149; with AVX-512 these two are 1,376
# and 64. neon and amx are estimates, not measured.
LIST_COST = {"scalar": 150.0, "avx2": 1600.0, "avx512": 3600.0, "neon": 500.0, "amx": 4000.0}


def dense_rows(words: Tensor) -> Tensor:
    """Words whose rows are contiguous; kernels take any distance between rows."""
    return words if words.stride(-1) == 1 or words.shape[-1] == 1 else words.contiguous()


class Lists(NamedTuple):
    """Ranks of features, lists of the rows counted and of the rows at hand."""

    ranks: Tensor
    counted: Tensor
    at_hand: Tensor


def pair_lists(
    words: Tensor, counts: Tensor, n_rows: int, at_hand: Tensor, all_rows: bool
) -> Lists | None:
    """Lists where they are the faster form, else None.

    Args:
        words, counts, n_rows: the bits, sums and number of the rows that are counted.
        at_hand: words of the rows that are multiplied with the signs.
        all_rows: whether every row is, in every column.
    """
    cost = LIST_COST[simd()]
    if isinf(cost):
        return None
    words = dense_rows(words)
    ranks, counted = op("pair_lists")(words, counts, n_rows, cost, all_rows)
    if ranks.numel() == 0:
        return None
    return _with_rows_at_hand(ranks, counted, words, at_hand, len(counts))


def _with_rows_at_hand(
    ranks: Tensor, counted: Tensor, words: Tensor | None, at_hand: Tensor, n_features: int
) -> Lists:
    same = words is not None and same_words(at_hand, words)
    here = counted if same else op("list_rows")(dense_rows(at_hand), ranks, n_features)
    return Lists(ranks, counted, here)


# csrc/pair_lists.h: how many ranks there are comes first, then another number
_HEAD = 2


def are_lists(signs: Tensor) -> bool:
    """Whether what a covariance kept are lists, ``[m]``, in place of planes."""
    return signs.dim() == 1 and signs.numel() > 0


def kept_lists(kept: Tensor, words: Tensor | None, at_hand: Tensor, n_features: int) -> Lists:
    """Lists that :func:`covariance` kept of ``words``, and those of the rows at hand."""
    end = _HEAD + n_features + 2 * int(kept[0])
    return _with_rows_at_hand(kept[:end], kept[end:], words, at_hand, n_features)


def covariance(
    words: Tensor, counts: Tensor, n_rows: Tensor, keep_signs: bool, keep_lists: bool = False
) -> tuple[Tensor, Tensor]:
    check_numerator(words, counts, n_rows)
    words, counts, n = dense_rows(words), counts.contiguous(), int(n_rows)
    lists = pair_lists(words, counts, n, words, False)
    if lists is not None:
        numerator = op("listed_covariance")(lists.ranks, lists.counted, len(counts), n)
        kept = torch.cat(lists[:2]) if keep_lists else words.new_empty(0)
        return numerator, kept
    return op("covariance")(words, counts, n, keep_signs)
