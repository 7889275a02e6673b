"""Packed columns and the places of their ones, in NumPy's numbers.

A place is row + n_rows x column, columns in a chosen order: the bits of one column after another.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bae_fast import packing

# bits unpacked at a time
_CHUNK_BITS = 2**26


def places_of_ones(columns: Tensor, order: Tensor, n_rows: int) -> np.ndarray:
    """Places of the ones of chosen columns ``[k, M]``, one column after another, ascending."""
    stride = columns.shape[1] * packing.WORD_BITS
    step = max(_CHUNK_BITS // max(stride, 1), 1)
    found = [np.empty(0, np.int64)]
    for top in range(0, len(order), step):
        words = columns[order[top : top + step]].contiguous().numpy().reshape(-1)
        filled = np.flatnonzero(words)
        bits = np.unpackbits(words[filled].view(np.uint8), bitorder="little")
        word, bit = np.divmod(np.flatnonzero(bits.view(np.bool_)), packing.WORD_BITS)
        places = filled[word] * packing.WORD_BITS + bit + top * stride
        if n_rows != stride:  # tail bits are not part of the sequence
            places -= places // stride * (stride - n_rows)
        found.append(places)
    return np.concatenate(found)


def set_ones(columns: Tensor, order: Tensor, places: np.ndarray, n_rows: int) -> None:
    """Inverse of :func:`places_of_ones`, into zeroed columns."""
    stride = columns.shape[1] * packing.WORD_BITS
    step = max(_CHUNK_BITS // max(stride, 1), 1)
    cuts = np.searchsorted(places, np.arange(0, len(order) + step, step) * n_rows)
    for i, top in enumerate(range(0, len(order), step)):
        chosen = order[top : top + step]
        part = places[cuts[i] : cuts[i + 1]] - top * n_rows
        if n_rows != stride:
            part = part + part // n_rows * (stride - n_rows)
        bits = np.zeros(len(chosen) * stride, dtype=np.uint8)
        bits[part] = 1
        packed = np.packbits(bits, bitorder="little").view(np.int32)
        columns[chosen] = torch.from_numpy(packed.reshape(len(chosen), -1))


def row_bits(n_rows: int) -> Tensor:
    """A packed column that is on in every row: int32 ``[M]``, its tail bits zero."""
    bits = torch.full((packing.n_words(n_rows),), -1, dtype=torch.int32)
    if n_rows % packing.WORD_BITS:
        bits[-1] = (1 << n_rows % packing.WORD_BITS) - 1
    return bits


def ones_before(
    columns: Tensor, counts: Tensor, numbers: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """How often packed columns are on in the rows before given ones: int64, one for each pair.

    Args:
        columns, counts: ``[k, M]``, the bits and the ones of each word.
        numbers, rows: which column, and the row.
    """
    word = torch.from_numpy(rows // packing.WORD_BITS)
    bit = torch.from_numpy(rows % packing.WORD_BITS)
    number = torch.from_numpy(numbers)
    before = (counts.cumsum(1) - counts)[number, word]
    low = columns[number, word] & ((1 << bit) - 1).to(torch.int32)
    return (before + packing.popcount(low)).numpy()


class Ranks:
    """The rows in which packed columns are on, to find a row by its place among them, or among the
    others."""

    def __init__(self, columns: Tensor, n_rows: int) -> None:
        self._n_rows = n_rows
        self._places = places_of_ones(columns, torch.arange(len(columns)), n_rows)
        self.n = packing.popcount(columns).sum(1).numpy()
        self._starts = np.cumsum(self.n) - self.n
        # the number of rows before each in which the column is off, ascending over all columns
        number, row = np.divmod(self._places, n_rows)
        rank = np.arange(len(row)) - self._starts[number]
        self._off_before = row - rank + number * (n_rows + 1)

    def rows(self, numbers: np.ndarray, places: np.ndarray, on: np.ndarray) -> np.ndarray:
        """The row of each place among the rows in which a column is on, or off."""
        start = self._starts[numbers]
        found = np.empty_like(places)
        number = numbers[on]
        found[on] = self._places[start[on] + places[on]] - number * self._n_rows
        number, place = numbers[~on], places[~on]
        keys = number * (self._n_rows + 1) + place
        found[~on] = place + np.searchsorted(self._off_before, keys, side="right") - start[~on]
        return found
