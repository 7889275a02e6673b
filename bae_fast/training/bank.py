"""A bank of past codes: statistics over more rows than a batch, at one bit a feature and row."""

from __future__ import annotations

from collections import deque

import torch

from bae_fast.codes import BinaryCode
from bae_fast.statistics import CodeStatistics


class CodeBank:
    """The codes of the last ``n_batches`` batches, and their pooled statistics.

    The entropy of a small batch is biased low and its gradient is noisy for rare features; the
    covariance of N independent rows has a floor of order 1 / sqrt(N). Both improve with the
    number of rows counted. Gradient still flows to the current rows only.
    """

    def __init__(self, n_batches: int) -> None:
        if n_batches < 1:
            raise ValueError(f"n_batches must be at least 1; got {n_batches}")
        self.n_batches = n_batches
        self._codes: deque[BinaryCode] = deque()
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None  # rows, ones in each column

    def __len__(self) -> int:
        """Batches held."""
        return len(self._codes)

    @property
    def codes(self) -> list[BinaryCode]:
        """The codes held, oldest first."""
        return list(self._codes)

    def append(self, code: BinaryCode) -> None:
        """Add a batch's code; the oldest one leaves once the bank is full."""
        n_rows, counts = code.n_rows(), code.counts()
        if self._sums is not None:
            n_rows, counts = self._sums[0] + n_rows, self._sums[1] + counts
        self._codes.append(code)
        if len(self._codes) > self.n_batches:
            oldest = self._codes.popleft()
            n_rows, counts = n_rows - oldest.n_rows(), counts - oldest.counts()
        self._sums = n_rows, counts

    def statistics(self, *, words: bool = False) -> CodeStatistics:
        """Statistics of all rows held, for ``past=``.

        Args:
            words: keep the codes too, which the covariance needs.

        Raises:
            ValueError: the bank is empty.
        """
        if self._sums is None:
            raise ValueError("the bank is empty: append a code first")
        kept = torch.cat([code.flatten().words for code in self._codes]) if words else None
        return CodeStatistics(*self._sums, kept)
