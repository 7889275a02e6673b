"""Independent columns in classes of like probability, and how their blocks of rows are coded."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.compression.bits import places_of_ones, set_ones
from bae_fast.compression.gaps import ONE, Gaps, decode_places, encode_places

# p in the file: a share of 2^32; the ends mean always off and always on
ALWAYS = ONE - 1

# widths of a class in log(p / (1-p)) that are tried; finer ones gain less than 1e-4 of the rate
_WIDTHS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, math.inf)


def _h2(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return np.where((p > 0) & (p < 1), found, 0.0)


def choose_classes(
    counts: np.ndarray, n_rows: np.ndarray, n_blocks: int, number_bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The grouping of columns with the shortest file: p of each class x 2^32, uint32, and the class
    of each column, int32.

    Args:
        counts, n_rows: int64 ``[k]``, ones and bits of each column, or of each half of one.
        number_bits: what the number of a class's symbols in a block takes.
    """
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    logit = np.log((counts + 0.5) / (n_rows - counts + 0.5))
    constant = np.where(counts == 0, -1, np.where(counts == n_rows, 1, 0))
    for width in _WIDTHS:
        # an even number of classes about p = 1/2: none has both kinds of prototype
        bins = np.floor(logit / width) if math.isfinite(width) else np.zeros_like(logit)
        for apart in (True, False):
            key = bins + constant * 1e6 if apart else bins
            _, ids = np.unique(key, return_inverse=True)
            columns = np.bincount(ids)
            ones = np.bincount(ids, weights=counts)
            length = np.bincount(ids, weights=n_rows)
            p = ones / np.maximum(length, 1)
            live = int(((p > 0) & (p < 1)).sum())
            bits = float((length * _h2(p)).sum())
            bits += float((columns * np.log2(len(ids) / columns)).sum())
            # the tables, the numbers of symbols
            bits += 64 * len(columns) + number_bits * live * n_blocks
            if best is None or bits < best[0]:
                share = np.rint(p * ONE).clip(1, ALWAYS - 1)
                share = np.where(ones == 0, 0, np.where(p == 1, ALWAYS, share))
                best = bits, share.astype(np.uint32), ids.astype(np.int32)
    assert best is not None
    return best[1:]


class IndependentColumns:
    """Columns that are coded each on its own.

    Attributes:
        shares: uint32 ``[c]``, p of each class.
        ids: ``[k]``, the class of each column.
        n_edges: 0: no column is given another.
    """

    n_edges = 0

    def __init__(self, shares: np.ndarray, ids: np.ndarray) -> None:
        self.shares = shares
        self.ids = ids
        wide = shares.astype(np.int64)
        ones = wide > ONE // 2
        self.prototype = packing.pack_rows(torch.from_numpy(ones[ids]))
        coded = [c for c in range(len(shares)) if 0 < wide[c] < ALWAYS]
        members = np.bincount(ids, minlength=len(shares))
        by_class = np.argsort(ids, kind="stable")
        starts = np.concatenate([[0], np.cumsum(members)])
        parts = [by_class[starts[c] : starts[c + 1]] for c in coded]
        self.order = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))
        self.sizes = [len(part) for part in parts]
        self._flips = [int(ONE - wide[c] if ones[c] else wide[c]) for c in coded]

    @property
    def n_columns(self) -> int:
        return len(self.ids)

    @cached_property
    def gaps(self) -> list[Gaps]:
        return [Gaps(flips) for flips in self._flips]

    def expected(self, n_rows: int) -> list[int]:
        """Differences of each class in a block, as p lets expect."""
        return [
            size * n_rows * flips >> 32 for size, flips in zip(self.sizes, self._flips, strict=True)
        ]

    def encode_rows(self, words: Tensor) -> bytes:
        """A block's bytes."""
        n_rows = len(words)
        columns = packing.rows_to_columns(words ^ self.prototype, self.n_columns)
        places = places_of_ones(columns.t(), self.order, n_rows)
        ends = np.cumsum(self.sizes, dtype=np.int64) * n_rows
        return encode_places(self.gaps, places, ends, self.expected(n_rows))

    def decode_rows(self, data: bytes, n_rows: int) -> Tensor:
        """Inverse of :meth:`encode_rows`; ValueError for data that it did not make."""
        lengths = [size * n_rows for size in self.sizes]
        parts = decode_places(self.gaps, data, self.expected(n_rows), lengths)
        places, start = [np.empty(0, np.int64)], 0
        for size, part in zip(self.sizes, parts, strict=True):
            if len(part) and part[-1] >= size * n_rows:
                raise ValueError("a difference beyond the last row")
            places.append(part + start)
            start += size * n_rows
        columns = torch.zeros(self.n_columns, packing.n_words(n_rows), dtype=torch.int32)
        set_ones(columns, self.order, np.concatenate(places), n_rows)
        return packing.columns_to_rows(columns.t().contiguous(), n_rows) ^ self.prototype
