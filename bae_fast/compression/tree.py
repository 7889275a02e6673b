"""Columns along a tree, each coded given its parent, and how their blocks of rows are coded.

A column has two probabilities, one for the rows in which its parent is off and one for those in
which it is on. Each of the two is a half of the column that has its own class; the bits of a class
are one sequence, so all its gaps are decoded in one call, and only then are the columns put
together, a level of the tree at a time.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.compression.bits import Ranks, ones_before, places_of_ones, row_bits, set_ones
from bae_fast.compression.columns import ALWAYS
from bae_fast.compression.gaps import (
    ONE,
    Gaps,
    categorical,
    constriction_stream,
    decode_places,
    encode_places,
)


class Halves:
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
    def decode(cls, decoder: Any, n_columns: int, n_edges: int) -> Halves:
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
        return categorical(np.array([len(self.parents) - n_edges, n_edges], dtype=np.float64))

    def _numbers(self) -> Any:
        return constriction_stream().model.Uniform(len(self.parents))


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
        self, tree: Halves, columns: np.ndarray, class_of: np.ndarray, n_classes: int
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


class TreeColumns:
    """Columns that are coded given their parents.

    A half is a sequence of the bits of one column in the rows in which its parent is off, or on.
    Columns are coded and decoded a level of the tree at a time: the parents of a level are all
    known when it is read, so the number of calls grows with the depth and not with the columns.

    Attributes:
        shares: uint32 ``[c]``, p of each class.
        ids: ``[n_halves]``, the class of each half.
        halves: the tree.
    """

    def __init__(self, shares: np.ndarray, ids: np.ndarray, halves: Halves) -> None:
        self.shares, self.ids, self.halves = shares, ids, halves
        wide = shares.astype(np.int64)
        inverted = wide > ONE // 2
        # classes that have any bit to code
        coded = np.flatnonzero((wide > 0) & (wide < ALWAYS))
        self._flips = np.where(inverted, ONE - wide, wide)[coded].tolist()
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

    @property
    def n_edges(self) -> int:
        """Columns that have a parent."""
        return self.halves.n_halves - self.n_columns

    @cached_property
    def gaps(self) -> list[Gaps]:
        return [Gaps(flips) for flips in self._flips]

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
        found = places_of_ones(differing & row_bits(n_rows), torch.arange(len(on)), n_rows)
        half, row = np.divmod(found, n_rows)
        # of the rows before: those in which the parent is on, and those in which it is off
        counts = packing.popcount(columns)
        before = ones_before(columns, counts, part.parents[half], row)
        place = np.where(part.on[half], before, row - before)
        n_on = counts.sum(1).numpy()[part.parents]
        length = np.where(part.on, n_on, n_rows - n_on)
        ends = np.cumsum(length)
        by_class = np.append(ends, 0)[np.append(part.starts, len(ends))[1:] - 1]
        return encode_places(
            self.gaps, place + (ends - length)[half], by_class, [0] * len(self.gaps)
        )

    def decode_rows(self, data: bytes, n_rows: int) -> Tensor:
        """Inverse of :meth:`encode_rows`; ValueError for data that it did not make."""
        most = n_rows * self.n_columns
        lengths = [most] * len(self.gaps)
        found = decode_places(self.gaps, data, [0] * len(self.gaps), lengths)
        if any(len(part) and part[-1] >= most for part in found):
            raise ValueError("a difference beyond the last row")
        # ascending over all classes
        places = [np.empty(0, np.int64), *(part + c * most for c, part in enumerate(found))]
        differences = np.concatenate(places)
        used = np.arange(len(self.gaps)) * most
        n_taken = 0
        columns = torch.zeros(self.n_columns + 1, packing.n_words(n_rows), dtype=torch.int32)
        every = row_bits(n_rows)
        for part in self._levels:
            parents, which = np.unique(part.parents, return_inverse=True)
            ones = Ranks(columns[parents], n_rows)
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
            set_ones(
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
