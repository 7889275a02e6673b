"""Codes on disk near the entropy of their columns, or of their tree; exact in the bits.

Prototype and differences (arXiv 2509.20997, Compression): a column whose share of ones p is above
1/2 is kept inverted, so a row is the list of columns where it differs from the rounded mean code.
Columns of like p form a class; each class stores one p, each column the number of its class. The
differences of a class, column after column, are one sequence of independent bits: its gaps are
geometric and are coded by a range coder (library ``constriction``). Symbols are as many as there
are differences, not as many as there are bits, and constant columns cost nothing.

A gap g is two symbols, g >> s and g mod 2^s, which are independent where g is geometric; the last
symbol of the first alphabet means "that many more, and go on". Nothing of the rate is lost to
either. Classes are as fine as pays: their number is chosen by the length of the file.

Along the tree (``coder="tree"``): the columns of most mutual information are joined in a tree
(Chow and Liu 1968), and a column has two probabilities, one for the rows in which its parent is
off and one for those in which it is on. Each of the two is a half of the column that has its own
class; the bits of a class are again one sequence, so all its gaps are decoded in one call, and
only then are the columns put together, a level of the tree at a time. An edge that saves less
than it takes to describe is left out: without any the file is that of independent columns.

Both sides build their tables in integers from the integers in the file: no rounding of one
machine's mathematics library decides what another reads.

File, little-endian::

    magic, version (1: independent columns, 2: tree), header's length
    header      shape, bits a feature, rows a block, classes: p (32 bits) and columns,
                class of each column (range coded), metadata (JSON)
                tree: the number of edges; range coded are whether each column has a parent, the
                parents, and the class of each half, that of an off parent first
    index       for each block of rows: bytes, digest of the bytes, checksum of the bits
    digest      of all the above
    blocks      number of symbols of each class, less what p lets expect (tree: as it is); then
                the range coder's words

A row mask is one column more. Blocks are read one by one: see :class:`CompressedCode`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import struct
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.codes import BinaryCode
from bae_fast.files import replacing
from bae_fast.pairs import (
    SAMPLE_PIECE,
    counts_with_parents,
    edges_that_pay,
    sample_starts,
    tree_parents,
)
from bae_fast.progress import tracked
from bae_fast.statistics import entropy_bits

MAGIC = b"\x89BAEbits"
# of independent columns, and along a tree
FORMAT_VERSION = 1
TREE_VERSION = 2

CODERS = ("tree", "columns")

# rows that are coded, and read, together
BLOCK_ROWS = 4096

_PREFIX = struct.Struct("<8sII")
_FIXED = struct.Struct("<IHBBIIII")
_ENTRY = struct.Struct("<I8sI")
_DIGEST = 8

# p in the file: a share of 2^32; the ends mean always off and always on
_ONE = 1 << 32
_ALWAYS = _ONE - 1

# symbols of the first alphabet; at most 2^12 of the second
_HIGH = 1024
_MOST_SHIFT = 12

# widths of a class in log(p / (1-p)) that are tried; finer ones gain less than 1e-4 of the rate
_WIDTHS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, math.inf)

# bits unpacked at a time
_CHUNK_BITS = 2**26

# what a file may ask of its reader before a row is seen, that a few bytes may not fill the memory;
# of columns the coder of trees can number no more
_MOST_COLUMNS = 1 << 24
_MOST_BLOCK_BITS = 1 << 32
# log(p / (1-p)) in steps of 1/16 are 712, of columns that vary, are never on and always on
_MOST_CLASSES = 4096


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            f"compression needs constriction: pip install 'bae-fast[compress]' ({error})"
        ) from error
    return constriction.stream


@dataclasses.dataclass(frozen=True)
class CompressedSize:
    """Bytes of a file beside the bound and beside plainer forms.

    Attributes:
        n_rows, n_columns: N (masked rows included) and K.
        file_bytes: the whole file.
        header_bytes: the bytes among them of header, index and digests.
        entropy_bits: N sum_j H2(p_j), the bound for independent columns; rows kept by the mask.
            A file along the tree may lie below it.
        differences: bits that differ from the prototype.
        packed_bytes: one bit a feature.
        edges: columns that are coded given another; 0 where all are independent.
        listed_bytes: for each row the number of differences and their columns, in fields of a
            fixed width (the form of arXiv 2509.20997), and the prototype.
    """

    n_rows: int
    n_columns: int
    file_bytes: int
    header_bytes: int
    entropy_bits: float
    differences: int
    packed_bytes: int
    listed_bytes: int
    edges: int = 0

    @property
    def bits_a_row(self) -> float:
        """8 x file_bytes / N."""
        return 8 * self.file_bytes / max(self.n_rows, 1)

    @property
    def overhead(self) -> float:
        """Share by which the file exceeds the bound of independent columns, negative below it;
        infinite where the bound is zero."""
        return 8 * self.file_bytes / self.entropy_bits - 1 if self.entropy_bits else math.inf

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        overhead = self.overhead if self.entropy_bits else None
        return {**dataclasses.asdict(self), "bits_a_row": self.bits_a_row, "overhead": overhead}


# -- the model ---------------------------------------------------------------------------------


class _Gaps:
    """Gaps between ones of independent bits, each a one with probability flips / 2^32."""

    def __init__(self, flips: int) -> None:
        self.flips = flips
        self.shift = min(max((_ONE // flips).bit_length() - 7, 0), _MOST_SHIFT)
        # powers of the probability of a zero, 96 bits after the point, each product cut
        unit = 1 << 96
        zero = (_ONE - flips) << 64
        run = zero
        low = [unit]
        for _ in range(1, 1 << self.shift):
            low.append(low[-1] * zero >> 96)
        for _ in range(self.shift):
            run = run * run >> 96
        tail = [unit]
        for _ in range(_HIGH - 1):
            tail.append(tail[-1] * run >> 96)
        high = [left - right for left, right in itertools.pairwise(tail)]
        self.high = self._categorical([*high, tail[-1]])
        self.low = self._categorical(low) if self.shift else None

    @staticmethod
    def _categorical(weights: list[int]) -> Any:
        # whole numbers below 2^53: float64 holds them as they are
        return _categorical(np.array([weight >> 44 for weight in weights], dtype=np.float64))

    def most_symbols(self, n_bits: int) -> int:
        """Symbols "go on" that a sequence of so many bits can have."""
        return n_bits // (_HIGH - 1 << self.shift)

    def encode(self, encoder: Any, gaps: np.ndarray) -> int:
        """Feed int64 gaps; returns the symbols of the first alphabet."""
        high = gaps >> self.shift
        if len(high) and int(high.max()) >= _HIGH - 1:
            more = high // (_HIGH - 1)
            ends = np.cumsum(more + 1) - 1
            symbols = np.full(int(ends[-1]) + 1, _HIGH - 1, dtype=np.int32)
            symbols[ends] = high - more * (_HIGH - 1)
        else:
            symbols = high.astype(np.int32)
        encoder.encode(symbols, self.high)
        if self.low is not None:
            encoder.encode((gaps & ((1 << self.shift) - 1)).astype(np.int32), self.low)
        return len(symbols)

    def decode(self, decoder: Any, n_symbols: int) -> np.ndarray:
        """Inverse of :meth:`encode`; ValueError where the symbols end on "go on"."""
        symbols = decoder.decode(self.high, n_symbols)
        gaps = symbols.astype(np.int64)
        if n_symbols and int(symbols.max()) == _HIGH - 1:
            ends = np.flatnonzero(symbols != _HIGH - 1)
            if not len(ends) or ends[-1] != n_symbols - 1:
                raise ValueError("a gap has no end")
            gaps = gaps[ends] + (np.diff(ends, prepend=-1) - 1) * (_HIGH - 1)
        gaps <<= self.shift
        if self.low is not None:
            gaps += decoder.decode(self.low, len(gaps))
        return gaps


def _categorical(weights: np.ndarray) -> Any:
    return _constriction().model.Categorical(weights, perfect=False, lazy=False)


def _h2(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return np.where((p > 0) & (p < 1), found, 0.0)


def _choose_classes(
    counts: np.ndarray, n_rows: np.ndarray, n_blocks: int, number_bits: int
) -> tuple[np.ndarray, ...]:
    """The grouping of columns with the shortest file: (p of classes x 2^32, class of columns).

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
                share = np.rint(p * _ONE).clip(1, _ALWAYS - 1)
                share = np.where(ones == 0, 0, np.where(p == 1, _ALWAYS, share))
                best = bits, share.astype(np.uint32), ids.astype(np.int32)
    assert best is not None
    return best[1:]


class _Model:
    """Classes, the class of each column, and what follows from them."""

    def __init__(self, shares: np.ndarray, ids: np.ndarray) -> None:
        self.shares = shares
        self.ids = ids
        wide = shares.astype(np.int64)
        ones = wide > _ONE // 2
        self.prototype = packing.pack_rows(torch.from_numpy(ones[ids]))
        coded = [c for c in range(len(shares)) if 0 < wide[c] < _ALWAYS]
        members = np.bincount(ids, minlength=len(shares))
        by_class = np.argsort(ids, kind="stable")
        starts = np.concatenate([[0], np.cumsum(members)])
        parts = [by_class[starts[c] : starts[c + 1]] for c in coded]
        self.order = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))
        self.sizes = [len(part) for part in parts]
        self._flips = [int(_ONE - wide[c] if ones[c] else wide[c]) for c in coded]

    @property
    def n_columns(self) -> int:
        return len(self.ids)

    @cached_property
    def gaps(self) -> list[_Gaps]:
        return [_Gaps(flips) for flips in self._flips]

    def expected(self, n_rows: int) -> list[int]:
        """Differences of each class in a block, as p lets expect."""
        return [
            size * n_rows * flips >> 32 for size, flips in zip(self.sizes, self._flips, strict=True)
        ]

    def encode_rows(self, words: Tensor) -> bytes:
        """A block's bytes."""
        n_rows = len(words)
        columns = packing.rows_to_columns(words ^ self.prototype, self.n_columns)
        places = _ones(columns.t(), self.order, n_rows)
        ends = np.cumsum(self.sizes, dtype=np.int64) * n_rows
        return _encode_places(self.gaps, places, ends, self.expected(n_rows))

    def decode_rows(self, data: bytes, n_rows: int) -> Tensor:
        """Inverse of :meth:`encode_rows`; ValueError for data that it did not make."""
        lengths = [size * n_rows for size in self.sizes]
        parts = _decode_places(self.gaps, data, self.expected(n_rows), lengths)
        places, start = [np.empty(0, np.int64)], 0
        for size, part in zip(self.sizes, parts, strict=True):
            if len(part) and part[-1] >= size * n_rows:
                raise ValueError("a difference beyond the last row")
            places.append(part + start)
            start += size * n_rows
        columns = torch.zeros(self.n_columns, packing.n_words(n_rows), dtype=torch.int32)
        _set_ones(columns, self.order, np.concatenate(places), n_rows)
        return packing.columns_to_rows(columns.t().contiguous(), n_rows) ^ self.prototype


class _Halves:
    """Columns in the order of a tree, and their halves: rows in which the parent is off, and on.

    A column without a parent has one half, all rows.
    """

    def __init__(self, parents: np.ndarray) -> None:
        self.parents = parents
        has_parent = parents >= 0
        self.n_halves = len(parents) + int(has_parent.sum())
        # of the first half of each column
        self.first = np.concatenate([[0], np.cumsum(1 + has_parent)])[:-1]
        # the order of the file, parents before their children and children of one parent together:
        # first the columns without a parent, then their children, then the children of those
        children = np.argsort(parents, kind="stable")
        begins = np.searchsorted(parents[children], np.arange(len(parents)))
        n_children = np.bincount(parents[has_parent], minlength=len(parents))
        self.levels: list[np.ndarray] = []
        level = np.flatnonzero(~has_parent)
        while len(level):
            self.levels.append(level)
            level = children[_ranges(begins[level], n_children[level])]
        if sum(map(len, self.levels)) != len(parents):
            raise ValueError("the tree has a circle")

    def counts(self, ones: Tensor, both: Tensor, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Ones and rows of each half, from those of columns and of columns with their parents."""
        found, length = np.empty(self.n_halves, np.int64), np.empty(self.n_halves, np.int64)
        own, joint = ones.numpy(), both.numpy()
        found[self.first], length[self.first] = own, n_rows
        given = self.parents >= 0
        off, parent_ones = self.first[given], own[self.parents[given]]
        found[off], length[off] = own[given] - joint[given], n_rows - parent_ones
        found[off + 1], length[off + 1] = joint[given], parent_ones
        return found, length

    def encode(self, encoder: Any) -> None:
        """Feed the tree."""
        given = self.parents >= 0
        encoder.encode(given.astype(np.int32), self._flags(int(given.sum())))
        encoder.encode(self.parents[given].astype(np.int32), self._numbers())

    @classmethod
    def decode(cls, decoder: Any, n_columns: int, n_edges: int) -> _Halves:
        """Inverse of :meth:`encode`; ValueError for numbers that it did not write."""
        if not 0 < n_edges < n_columns:
            raise ValueError("the number of edges is out of range")
        made = cls(np.full(n_columns, -1, dtype=np.int64))
        given = decoder.decode(made._flags(n_edges), n_columns) == 1
        if int(given.sum()) != n_edges:
            raise ValueError("the number of edges does not agree")
        parents = np.full(n_columns, -1, dtype=np.int64)
        parents[given] = decoder.decode(made._numbers(), n_edges)
        return cls(parents)

    def _flags(self, n_edges: int) -> Any:
        return _categorical(np.array([len(self.parents) - n_edges, n_edges], dtype=np.float64))

    def _numbers(self) -> Any:
        return _constriction().model.Uniform(len(self.parents))


class _Part:
    """Halves of columns that stand together in the file, those of a class after one another.

    The half of a column without a parent is that of an off parent, a column that is never on.

    Attributes:
        columns: int64 ``[k]``, the columns.
        halves: int64 ``[h]``, which of the tree's halves.
        own, parents: int64 ``[h]``, where in ``columns`` the column of a half is, and its parent.
        on: bool ``[h]``, whether it is the half of the rows in which the parent is on.
        classes: int64 ``[h]``, ascending: which of the coded classes.
        starts: int64 ``[c]``, where the halves of each class begin.
    """

    def __init__(
        self, tree: _Halves, columns: np.ndarray, class_of: np.ndarray, n_classes: int
    ) -> None:
        given = tree.parents[columns] >= 0
        own = np.repeat(np.arange(len(columns)), 1 + given)
        on = np.zeros(len(own), dtype=np.bool_)
        on[1:] = own[1:] == own[:-1]
        halves = tree.first[columns][own] + on
        classes = class_of[halves]
        # those that are always alike are not in the file
        order = np.argsort(classes, kind="stable")[int((classes < 0).sum()) :]
        self.columns = columns
        self.halves, self.own, self.on = halves[order], own[order], on[order]
        self.classes = classes[order]
        parents = tree.parents[columns]
        self.parents = np.where(given, parents, len(tree.parents))[self.own]
        self.starts = np.searchsorted(self.classes, np.arange(n_classes))

    def places(self, length: np.ndarray) -> np.ndarray:
        """Where each half begins in the sequence of its class, from the bits of each half."""
        before = np.cumsum(length) - length
        first = np.append(before, 0)[np.minimum(self.starts, len(before))]
        return before - first[self.classes]


class _TreeModel:
    """Classes, the class of each half of a column, and what follows from them.

    A half is a sequence of the bits of one column in the rows in which its parent is off, or on.
    Columns are coded and decoded a level of the tree at a time: the parents of a level are all
    known when it is read, so the number of calls grows with the depth and not with the columns.
    """

    def __init__(self, shares: np.ndarray, ids: np.ndarray, halves: _Halves) -> None:
        self.halves = halves
        wide = shares.astype(np.int64)
        inverted = wide > _ONE // 2
        # classes that have any bit to code
        coded = np.flatnonzero((wide > 0) & (wide < _ALWAYS))
        self._flips = np.where(inverted, _ONE - wide, wide)[coded].tolist()
        number = np.full(len(shares), -1)
        number[coded] = np.arange(len(coded))
        self._class_of = number[ids]
        # whether the halves of an off parent and of an on one are kept inverted
        first = halves.first
        self._off = inverted[ids[first]]
        self._on = np.where(
            halves.parents >= 0, inverted[ids[np.minimum(first + 1, len(ids) - 1)]], False
        )

    @property
    def n_columns(self) -> int:
        return len(self.halves.parents)

    @cached_property
    def gaps(self) -> list[_Gaps]:
        return [_Gaps(flips) for flips in self._flips]

    def _part(self, columns: np.ndarray) -> _Part:
        return _Part(self.halves, columns, self._class_of, len(self._flips))

    @cached_property
    def _whole(self) -> _Part:
        return self._part(np.concatenate(self.halves.levels))

    @cached_property
    def _levels(self) -> list[_Part]:
        return [self._part(level) for level in self.halves.levels]

    def _prototype(self, columns: np.ndarray, parents: Tensor) -> Tensor:
        """What columns would be without differences, from the packed bits of their parents."""
        off, on = (torch.from_numpy(side[columns])[:, None] for side in (self._off, self._on))
        return torch.where(off, ~parents, 0) | torch.where(on, parents, 0)

    def encode_rows(self, words: Tensor) -> bytes:
        """A block's bytes."""
        n_rows, part = len(words), self._whole
        columns = _with_none(packing.rows_to_columns(words, self.n_columns).t(), self.n_columns)
        parents = columns[np.where(self.halves.parents < 0, self.n_columns, self.halves.parents)]
        differing = columns[:-1] ^ self._prototype(np.arange(self.n_columns), parents)
        given = columns[part.parents]
        on = torch.from_numpy(part.on)[:, None]
        differing = differing[part.columns[part.own]] & torch.where(on, given, ~given)
        found = _ones(differing & _row_bits(n_rows), torch.arange(len(on)), n_rows)
        half, row = np.divmod(found, n_rows)
        # of the rows before: those in which the parent is on, and those in which it is off
        counts = packing.popcount(columns)
        before = _ones_before(columns, counts, part.parents[half], row)
        place = np.where(part.on[half], before, row - before)
        n_on = counts.sum(1).numpy()[part.parents]
        length = np.where(part.on, n_on, n_rows - n_on)
        ends = np.cumsum(length)
        by_class = np.append(ends, 0)[np.append(part.starts, len(ends))[1:] - 1]
        return _encode_places(
            self.gaps, place + (ends - length)[half], by_class, [0] * len(self.gaps)
        )

    def decode_rows(self, data: bytes, n_rows: int) -> Tensor:
        """Inverse of :meth:`encode_rows`; ValueError for data that it did not make."""
        most = n_rows * self.n_columns
        lengths = [most] * len(self.gaps)
        found = _decode_places(self.gaps, data, [0] * len(self.gaps), lengths)
        if any(len(part) and part[-1] >= most for part in found):
            raise ValueError("a difference beyond the last row")
        # ascending over all classes
        places = [np.empty(0, np.int64), *(part + c * most for c, part in enumerate(found))]
        differences = np.concatenate(places)
        used = np.arange(len(self.gaps)) * most
        n_taken = 0
        columns = torch.zeros(self.n_columns + 1, packing.n_words(n_rows), dtype=torch.int32)
        every = _row_bits(n_rows)
        for part in self._levels:
            parents, which = np.unique(part.parents, return_inverse=True)
            ones = _Ones(columns[parents], n_rows)
            length = np.where(part.on, ones.n[which], n_rows - ones.n[which])
            begin = part.places(length) + used[part.classes]
            used += np.bincount(part.classes, length, minlength=len(used)).astype(np.int64)
            low, high = np.searchsorted(differences, [begin, begin + length])
            half = np.repeat(np.arange(len(low)), high - low)
            own = _ranges(low, high - low)
            n_taken += len(own)
            place = differences[own] - begin[half]
            row = ones.rows(which[half], place, part.on[half])
            tops = self.halves.parents[part.columns]
            made = self._prototype(part.columns, columns[np.where(tops < 0, self.n_columns, tops)])
            flips = torch.zeros_like(made)
            _set_ones(
                flips, torch.arange(len(flips)), np.sort(part.own[half] * n_rows + row), n_rows
            )
            columns[part.columns] = (made ^ flips) & every
        if n_taken != len(differences):
            raise ValueError("a difference beyond the last row")
        return packing.columns_to_rows(columns[:-1].t().contiguous(), n_rows)


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each begin on, as many as its length says, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(begins - before, lengths)


def _with_none(columns: Tensor, n_columns: int) -> Tensor:
    """Packed columns, and after them one that is never on."""
    wide = torch.zeros(n_columns + 1, columns.shape[1], dtype=torch.int32)
    wide[:-1] = columns
    return wide


def _row_bits(n_rows: int) -> Tensor:
    """A packed column that is on in every row: int32 ``[M]``, its tail bits zero."""
    bits = torch.full((packing.n_words(n_rows),), -1, dtype=torch.int32)
    if n_rows % packing.WORD_BITS:
        bits[-1] = (1 << n_rows % packing.WORD_BITS) - 1
    return bits


def _ones_before(
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


class _Ones:
    """The rows in which packed columns are on, to find a row by its place among them, or among the
    others."""

    def __init__(self, columns: Tensor, n_rows: int) -> None:
        self._n_rows = n_rows
        self._places = _ones(columns, torch.arange(len(columns)), n_rows)
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


def _encode_places(
    gaps: list[_Gaps], places: np.ndarray, ends: np.ndarray, expected: list[int]
) -> bytes:
    """Numbers of symbols and the coder's words of ascending places, classes after one another.

    Args:
        places: int64, the places of differences.
        ends: where each class ends.
        expected: what is taken off each class's number of symbols.
    """
    cuts = np.concatenate([[0], np.searchsorted(places, ends)])
    between = np.diff(places, prepend=-1) - 1
    encoder = _constriction().queue.RangeEncoder()
    numbers = bytearray()
    for c, less in enumerate(expected):
        part = between[cuts[c] : cuts[c + 1]]
        if c and len(part):  # its first gap begins with the class
            part[0] = places[cuts[c]] - ends[c - 1]
        _append_number(numbers, gaps[c].encode(encoder, part) - less)
    return bytes(numbers) + encoder.get_compressed().astype("<u4").tobytes()


def _decode_places(
    gaps: list[_Gaps], data: bytes, expected: list[int], lengths: list[int]
) -> list[np.ndarray]:
    """Inverse of :func:`_encode_places`: the places of each class, counted from its begin.

    Args:
        lengths: the most bits that each class can have.

    Raises:
        ValueError: data that it did not make.
    """
    numbers, at = [], 0
    for less in expected:
        number, at = _read_number(data, at)
        numbers.append(number + less)
    # a symbol takes a bit or more, as p is at most 1/2, but for those that go on
    most = 10 * (len(data) - at)
    goes_on = [one.most_symbols(length) for one, length in zip(gaps, lengths, strict=True)]
    fits = all(0 <= n <= length for n, length in zip(numbers, lengths, strict=True))
    if (len(data) - at) % 4 or not fits or sum(numbers) > most + sum(goes_on):
        raise ValueError("numbers of symbols out of range")
    stream = np.frombuffer(data, dtype="<u4", offset=at).astype(np.uint32)
    decoder = _constriction().queue.RangeDecoder(stream)
    return [
        np.cumsum(one.decode(decoder, number) + 1) - 1
        for one, number in zip(gaps, numbers, strict=True)
    ]


def _ones(columns: Tensor, order: Tensor, n_rows: int) -> np.ndarray:
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


def _set_ones(columns: Tensor, order: Tensor, places: np.ndarray, n_rows: int) -> None:
    """Inverse of :func:`_ones`, into zeroed columns."""
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


def _append_number(out: bytearray, value: int) -> None:
    """A signed number, small ones short: zigzag, seven bits a byte."""
    value = value << 1 if value >= 0 else (-value << 1) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("numbers of symbols are cut off")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return (value >> 1) ^ -(value & 1), at


# -- the file ----------------------------------------------------------------------------------


def _machine_bytes() -> int:
    """The memory of the machine; where the system does not say, more than any has."""
    if not hasattr(os, "sysconf"):  # Windows
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _digest(*parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        state.update(part)
    return state.digest()


def _checksum(words: Tensor) -> int:
    return zlib.crc32(words.contiguous().numpy().tobytes())


def _block(code: BinaryCode, top: int, rows: int) -> Tensor:
    """Rows of a flat code on the CPU, its mask as one column more."""
    words = code.words[top : top + rows].cpu()
    if code.row_mask is None:
        return words.contiguous()
    kept = code.row_mask[top : top + rows].cpu().to(torch.int32)
    word, bit = divmod(code.n_columns, packing.WORD_BITS)
    wide = torch.zeros(len(words), packing.n_words(code.n_columns + 1), dtype=torch.int32)
    wide[:, : words.shape[1]] = words
    wide[:, word] |= kept << bit
    return wide


def compress(
    code: BinaryCode,
    path: str | os.PathLike[str],
    *,
    block_rows: int = BLOCK_ROWS,
    coder: str = "columns",
    metadata: dict[str, Any] | None = None,
) -> CompressedSize:
    """Write a code; :func:`decompress` gives back every bit, shape, mask and bits a feature.

    The file appears whole or not at all. Needs ``constriction``. Scratch memory: about
    40 bytes for each difference of a block and 64 MiB; to find the tree 4 K'^2 bytes for K'
    columns that vary, at most 1 GiB.

    Args:
        code: ``[..., K]`` on any device, fewer than 2^31 rows and at most 2^24 columns, the mask's
            included; read block by block.
        block_rows: rows coded together: fewer are read faster on their own, and cost a byte or
            two more for each class of columns.
        coder: "columns" codes each column on its own; "tree" codes it given the one it shares most
            with, where that pays: a smaller file, some times slower to write and to read.
        metadata: JSON values, kept in the header; see :class:`CompressedCode`.

    Raises:
        ImportError: no ``constriction``.
        TypeError: metadata is no dict of JSON values.
        ValueError: a code that is too large, block_rows below 1 or of more than 2^32 bits in a
            block, another coder, or bits past the last column.
    """
    if not isinstance(block_rows, int) or not 1 <= block_rows < 2**31:
        raise ValueError(f"block_rows must be an int of 1 to 2^31 - 1; got {block_rows!r}")
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {', '.join(CODERS)}; got {coder!r}")
    if not isinstance(metadata or {}, dict):
        raise TypeError(f"metadata must be a dict; got {type(metadata).__name__}")
    note = json.dumps(metadata or {}, allow_nan=False).encode()
    flat = code.flatten()
    n_rows, masked = len(flat), flat.row_mask is not None
    if n_rows >= 2**31 or code.n_bits >= 2**16:
        raise ValueError(f"code must have fewer than 2^31 rows and 2^16 bits; got {code!r}")
    n_columns = code.n_columns + masked
    if n_columns > _MOST_COLUMNS:
        raise ValueError(f"code must have at most 2^24 columns, the mask's included; got {code!r}")
    if min(block_rows, n_rows) * n_columns > _MOST_BLOCK_BITS:
        raise ValueError(
            f"block_rows must be at most {_MOST_BLOCK_BITS // n_columns:,} for {n_columns:,} "
            f"columns, 2^32 bits a block; got {block_rows}"
        )
    tops = range(0, n_rows, block_rows)
    counts = torch.zeros(n_columns, dtype=torch.int64)
    for top in tops:
        block = _block(flat, top, block_rows)
        if not packing.tail_is_zero(block, n_columns):
            raise ValueError(f"code has bits past column {n_columns}")
        counts += packing.column_counts(block, n_columns)
    model, shares, ids, n_edges, id_words = _choose_model(flat, n_columns, counts, coder, len(tops))
    lead = code.shape[:-1]
    header = b"".join(
        [
            _FIXED.pack(
                code.n_columns, code.n_bits, len(lead), masked, block_rows, len(shares),
                len(id_words), len(note),
            ),
            np.array(lead, dtype="<u8").tobytes(),
            shares.astype("<u4").tobytes(),
            np.bincount(ids, minlength=len(shares)).astype("<u4").tobytes(),
            struct.pack("<I", n_edges) if n_edges else b"",
            id_words.tobytes(),
            note,
        ]
    )  # fmt: skip
    prefix = _PREFIX.pack(MAGIC, TREE_VERSION if n_edges else FORMAT_VERSION, len(header))
    index = []
    with replacing(path) as temporary, open(temporary, "wb") as file:
        start = len(prefix) + len(header) + len(tops) * _ENTRY.size + _DIGEST
        file.seek(start)
        for top in tracked(tops, n_rows, "rows", by=block_rows):
            block = _block(flat, top, block_rows)
            data = model.encode_rows(block)
            index.append(_ENTRY.pack(len(data), _digest(data), _checksum(block)))
            file.write(data)
        size = file.tell()
        head = b"".join([prefix, header, *index])
        file.seek(0)
        file.write(head + _digest(head))
    return _size(flat, counts[: code.n_columns], size, start, n_edges)


def _choose_model(
    flat: BinaryCode, n_columns: int, counts: Tensor, coder: str, n_blocks: int
) -> tuple[_Model | _TreeModel, np.ndarray, np.ndarray, int, np.ndarray]:
    """(what codes the blocks, p of classes, class of columns or halves, edges, their words)."""
    encoder = _constriction().queue.RangeEncoder()
    parents, both = _choose_parents(flat, n_columns, counts, coder)
    n_edges = int((parents >= 0).sum())
    if n_edges:
        halves = _Halves(parents.numpy())
        ones, length = halves.counts(counts, both, len(flat))
        shares, ids = _choose_classes(ones, length, n_blocks, number_bits=20)
        halves.encode(encoder)
        model: _Model | _TreeModel = _TreeModel(shares, ids, halves)
    else:
        length = np.full(n_columns, len(flat))
        shares, ids = _choose_classes(counts.numpy(), length, n_blocks, number_bits=12)
        model = _Model(shares, ids)
    if len(shares) > 1:
        encoder.encode(ids, _categorical(np.bincount(ids).astype(np.float64)))
    return model, shares, ids, n_edges, encoder.get_compressed().astype("<u4")


def _size(
    code: BinaryCode, own: Tensor, file_bytes: int, header_bytes: int, edges: int
) -> CompressedSize:
    """The file's bytes beside the bound and plainer forms, from the ones of each column."""
    n_rows, kept = len(code), int(code.n_rows())
    differences = int(torch.minimum(own, n_rows - own).sum())
    field = math.ceil(math.log2(code.n_columns)) if code.n_columns > 1 else 1
    listed = n_rows * code.n_columns.bit_length() + differences * field + code.n_columns
    bound = 0.0
    if kept:
        bound = max(float(entropy_bits(own, torch.tensor(kept))) * kept, 0.0)
    return CompressedSize(
        n_rows=n_rows,
        n_columns=code.n_columns,
        file_bytes=file_bytes,
        header_bytes=header_bytes,
        entropy_bits=bound,
        differences=differences,
        packed_bytes=n_rows * -(-code.n_columns // 8),
        listed_bytes=-(-listed // 8),
        edges=edges,
    )


def _choose_parents(
    flat: BinaryCode, n_columns: int, counts: Tensor, coder: str
) -> tuple[Tensor, Tensor]:
    """The parent of each column, the mask's included, and the rows in which both are on.

    Int64 ``[K]`` each; without a parent -1, and the column's own ones.
    """
    n_rows = len(flat)
    none = torch.full((n_columns,), -1, dtype=torch.int64)
    if coder == "columns" or n_rows < 2:
        return none, counts
    live = int(((counts > 0) & (counts < n_rows)).sum())
    starts = sample_starts(n_rows, live)
    words = torch.cat([_block(flat, start, SAMPLE_PIECE) for start in starts])
    parents = tree_parents(BinaryCode(words, n_columns))
    both = _joint_counts(flat, parents)
    parents = edges_that_pay(parents, counts, both, n_rows)
    return parents, torch.where(parents >= 0, both, counts)


def _joint_counts(flat: BinaryCode, parents: Tensor) -> Tensor:
    """Rows in which a column and its parent are on: int64 ``[K]``; of a root, its own ones."""
    both = torch.zeros(len(parents), dtype=torch.int64)
    for top in range(0, len(flat), BLOCK_ROWS):
        block = BinaryCode(_block(flat, top, BLOCK_ROWS), len(parents))
        both += counts_with_parents(block, parents)
    return both


def decompress(path: str | os.PathLike[str]) -> BinaryCode:
    """Read the whole of a file written by :func:`compress`.

    Raises:
        FileNotFoundError: no such file.
        ImportError: no ``constriction``.
        MemoryError: a code of more words than this machine has memory.
        ValueError: a foreign, truncated or corrupt file, or another version.
    """
    return CompressedCode.open(path).code()


class CompressedCode:
    """A compressed file, read by blocks of rows.

    ``compressed[rows]`` takes what :class:`bae_fast.BinaryCode` takes as rows, decodes the blocks
    that they lie in and gives a BinaryCode. Only the header is kept in memory.

    Attributes:
        path: the file.
        shape: the shape of the dense bits, ``[..., K]``.
        n_bits: bits a feature.
        block_rows: rows decoded together, leading dimensions flattened.
        metadata: what :func:`compress` was given.
    """

    def __init__(self, path: str | os.PathLike[str], head: bytes, size: int) -> None:
        """Use :meth:`open`."""
        self.path = Path(path)
        _, version, _ = _PREFIX.unpack_from(head)
        at = _PREFIX.size
        (
            self._columns, self.n_bits, n_lead, masked, self.block_rows, n_classes, n_id_words,
            n_note,
        ) = _FIXED.unpack_from(head, at)  # fmt: skip
        at += _FIXED.size

        def numbers(dtype: str, count: int) -> np.ndarray:
            nonlocal at
            found = np.frombuffer(head, dtype=dtype, count=count, offset=at)
            at += found.nbytes
            return found

        lead = [int(n) for n in numbers("<u8", n_lead)]
        n_rows, n_coded = math.prod(lead), self._columns + masked
        if not (
            self._columns >= 1
            and self.n_bits >= 1
            and self._columns % self.n_bits == 0
            and masked <= 1
            and self.block_rows >= 1
            and n_rows < 2**31
            and math.prod(max(n, 1) for n in lead) < 2**48
            and n_classes <= _MOST_CLASSES
        ):
            raise ValueError("sizes are out of range")
        if n_coded > _MOST_COLUMNS or min(self.block_rows, n_rows) * n_coded > _MOST_BLOCK_BITS:
            raise ValueError(
                f"{n_coded:,} columns in blocks of {self.block_rows:,} rows are more than a file "
                "may have"
            )
        self.shape = torch.Size((*lead, self._columns))
        self._masked = bool(masked)
        shares = numbers("<u4", n_classes).astype(np.uint32)
        members = numbers("<u4", n_classes).astype(np.int64)
        n_edges = int(numbers("<u4", 1)[0]) if version == TREE_VERSION else 0
        id_words = numbers("<u4", n_id_words).astype(np.uint32)
        self.metadata: dict[str, Any] = json.loads(head[at : at + n_note])
        at += n_note
        n_parts = n_coded + n_edges
        if int(members.sum()) != n_parts or not isinstance(self.metadata, dict):
            raise ValueError("sizes do not agree")
        n_blocks = -(-n_rows // self.block_rows)
        entries = [_ENTRY.unpack_from(head, at + i * _ENTRY.size) for i in range(n_blocks)]
        at += n_blocks * _ENTRY.size + _DIGEST
        self._starts = [at]
        for length, _, _ in entries:
            self._starts.append(self._starts[-1] + length)
        if self._starts[-1] != size:
            raise ValueError(f"it must be {self._starts[-1]} bytes long; it is {size}")
        self._entries = entries
        decoder = _constriction().queue.RangeDecoder(id_words)
        halves = _Halves.decode(decoder, n_coded, n_edges) if version == TREE_VERSION else None
        ids = np.zeros(n_parts, dtype=np.int64)
        if n_classes > 1:
            ids = decoder.decode(_categorical(members.astype(np.float64)), n_parts).astype(np.int64)
        if not np.array_equal(np.bincount(ids, minlength=n_classes), members):
            raise ValueError("classes of columns do not agree with their numbers")
        self._model = _Model(shares, ids) if halves is None else _TreeModel(shares, ids, halves)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CompressedCode:
        """Read the header and the index, and check them; errors as in :func:`decompress`."""
        _constriction()
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = cls._read_head(file, path, size)
        try:
            return cls(path, head, size)
        except (ValueError, struct.error, AssertionError, RecursionError) as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error

    @staticmethod
    def _read_head(file: BinaryIO, path: str | os.PathLike[str], size: int) -> bytes:
        prefix = file.read(_PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC[: len(prefix)] or not prefix:
            raise ValueError(f"{path} is not a compressed code: it begins with {prefix[:8]!r}")
        if len(prefix) < _PREFIX.size:
            raise ValueError(f"{path} is truncated: {size} bytes")
        _, version, length = _PREFIX.unpack(prefix)
        if version not in (FORMAT_VERSION, TREE_VERSION):
            raise ValueError(
                f"{path} has version {version}; can read {FORMAT_VERSION} and {TREE_VERSION}"
            )
        # no more is asked for than the file has: a length of 4 GiB would be set apart first
        header = file.read(min(length, size))
        try:
            fields = _FIXED.unpack_from(header)
            lead = struct.unpack_from(f"<{fields[2]}Q", header, _FIXED.size)
            index = file.read(min(-(-math.prod(lead) // fields[4]) * _ENTRY.size, size))
        except (struct.error, ZeroDivisionError) as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error
        if file.read(_DIGEST) != _digest(prefix, header, index):
            raise ValueError(f"{path} is truncated or corrupt: its header fails the digest")
        return prefix + header + index

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"CompressedCode({str(self.path)!r}, shape={tuple(self.shape)})"

    @property
    def edges(self) -> int:
        """Columns that are coded given another; 0 in a file of independent columns."""
        halves = getattr(self._model, "halves", None)
        return 0 if halves is None else halves.n_halves - len(halves.parents)

    @property
    def n_blocks(self) -> int:
        """Blocks of rows that can be read on their own."""
        return len(self._entries)

    def block(self, i: int) -> BinaryCode:
        """Rows ``i * block_rows`` on, leading dimensions flattened: ``[<= block_rows, K]``.

        Raises:
            IndexError: no such block.
            ValueError: the block is corrupt, or the file is not the one that was opened.
        """
        if not 0 <= i < self.n_blocks:
            raise IndexError(f"block must be 0 to {self.n_blocks - 1}; got {i}")
        length, digest, checksum = self._entries[i]
        with open(self.path, "rb") as file:
            file.seek(self._starts[i])
            data = file.read(length)
        if _digest(data) != digest:
            raise ValueError(f"{self.path} is truncated or corrupt: block {i} fails its digest")
        n_rows = min(self.block_rows, math.prod(self.shape[:-1]) - i * self.block_rows)
        try:
            words = self._model.decode_rows(data, n_rows)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{self.path}: block {i} cannot be decoded: {error}") from error
        if _checksum(words) != checksum:
            raise ValueError(
                f"{self.path}: block {i} decodes to other bits than were written; was it written "
                "with another version of constriction?"
            )
        return self._split_mask(words)

    def _split_mask(self, words: Tensor) -> BinaryCode:
        if not self._masked:
            return BinaryCode(words, self._columns, n_bits=self.n_bits)
        word, bit = divmod(self._columns, packing.WORD_BITS)
        mask = (words[:, word] >> bit) & 1 == 1
        words[:, word] &= ~torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        words = words[:, : packing.n_words(self._columns)].contiguous()
        return BinaryCode(words, self._columns, n_bits=self.n_bits, row_mask=mask)

    def code(self) -> BinaryCode:
        """All rows.

        Raises:
            MemoryError: their words take more than this machine has.
            ValueError: a corrupt block.
        """
        n_rows = math.prod(self.shape[:-1])
        n_bytes, most = n_rows * packing.n_words(self._columns) * 4, _machine_bytes()
        if n_bytes > most:
            raise MemoryError(
                f"{self.path} holds {n_bytes / 2**30:,.1f} GiB of words, and this machine has "
                f"{most / 2**30:,.1f} GiB of memory: read some of its rows at a time"
            )
        words = torch.empty(n_rows, packing.n_words(self._columns), dtype=torch.int32)
        mask = torch.empty(n_rows, dtype=torch.bool) if self._masked else None
        for i in tracked(range(self.n_blocks), self.n_blocks, "blocks"):
            part, rows = self.block(i), slice(i * self.block_rows, (i + 1) * self.block_rows)
            words[rows] = part.words
            if mask is not None and part.row_mask is not None:
                mask[rows] = part.row_mask
        return self._shaped(words, mask, self.shape[:-1])

    def _shaped(self, words: Tensor, mask: Tensor | None, lead: torch.Size) -> BinaryCode:
        return BinaryCode(
            words.reshape(*lead, words.shape[-1]),
            self._columns,
            n_bits=self.n_bits,
            row_mask=None if mask is None else mask.reshape(lead),
        )

    def __getitem__(self, rows: Any) -> BinaryCode:
        """Select along the first dimension, as :meth:`BinaryCode.__getitem__` does."""
        numbers = torch.arange(math.prod(self.shape[:-1]), dtype=torch.int32)
        # a code whose words are row numbers: its indexing is the one that is promised
        chosen = BinaryCode(numbers.view(*self.shape[:-1], 1), packing.WORD_BITS)[rows].words[
            ..., 0
        ]
        flat = chosen.reshape(-1).long()
        words = torch.empty(len(flat), packing.n_words(self._columns), dtype=torch.int32)
        mask = torch.empty(len(flat), dtype=torch.bool) if self._masked else None
        blocks = flat // self.block_rows
        for i in blocks.unique().tolist():
            here, part = blocks == i, self.block(i)
            own = flat[here] - i * self.block_rows
            words[here] = part.words[own]
            if mask is not None and part.row_mask is not None:
                mask[here] = part.row_mask[own]
        return self._shaped(words, mask, chosen.shape)
