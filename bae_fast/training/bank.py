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

    def __init__(self, n_batches: int, *, keep_codes: bool = True) -> None:
        """An empty bank.

        Args:
            n_batches: batches held.
            keep_codes: hold the codes too, N K / 8 bytes a batch, which the covariance needs;
                otherwise only their counts, 8 K bytes a batch.

        Raises:
            ValueError: n_batches below 1.
        """
        if n_batches < 1:
            raise ValueError(f"n_batches must be at least 1; got {n_batches}")
        self.n_batches, self.keep_codes = n_batches, keep_codes
        self._batches: deque[CodeStatistics] = deque()
        self._codes: deque[BinaryCode] = deque()
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None  # rows, ones in each column

    def __len__(self) -> int:
        """Batches held."""
        return len(self._batches)

    @property
    def codes(self) -> list[BinaryCode]:
        """The codes held, oldest first; none where codes are not kept."""
        return list(self._codes)

    @property
    def counts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(rows ``[]``, ones in each column ``[K]``) of the batches held, oldest first."""
        return [(batch.n_rows, batch.counts) for batch in self._batches]

    def append(self, code: BinaryCode) -> None:
        """Add a batch's code; the oldest one leaves once the bank is full."""
        self.append_counts(code.n_rows(), code.counts(), code)

    def append_counts(
        self, n_rows: torch.Tensor, counts: torch.Tensor, code: BinaryCode | None = None
    ) -> None:
        """Add a batch by its statistics, int64 ``[]`` and ``[K]``, with its code where it is kept.

        Raises:
            ValueError: no code for a bank that keeps codes, or one of other columns.
        """
        if self.keep_codes and code is None:
            raise ValueError("code must be given to a bank that keeps codes; got None")
        if self._batches and counts.shape != self._batches[0].counts.shape:
            raise ValueError(
                f"code must have the {len(self._batches[0].counts)} columns of those held; "
                f"got {len(counts)}"
            )
        total, ones = n_rows, counts
        if self._sums is not None:
            total, ones = self._sums[0] + n_rows, self._sums[1] + counts
        self._batches.append(CodeStatistics(n_rows, counts))
        if self.keep_codes and code is not None:
            self._codes.append(code)
        if len(self._batches) > self.n_batches:
            oldest = self._batches.popleft()
            if self.keep_codes:
                self._codes.popleft()
            total, ones = total - oldest.n_rows, ones - oldest.counts
        self._sums = total, ones

    def statistics(self, *, words: bool = False) -> CodeStatistics:
        """Statistics of all rows held, for ``past=``.

        Args:
            words: keep the codes too, which the covariance needs.

        Raises:
            ValueError: the bank is empty, or has no codes and ``words`` asks for them.
        """
        if self._sums is None:
            raise ValueError("the bank is empty: append a code first")
        if words and not self.keep_codes:
            raise ValueError("words must be False for a bank with keep_codes=False; got True")
        kept = torch.cat([code.flatten().words for code in self._codes]) if words else None
        return CodeStatistics(*self._sums, kept)
