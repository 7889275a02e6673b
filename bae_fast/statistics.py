"""Statistics of packed codes: counts, entropy, and what the covariance term needs.

Statistics are a thing apart from the rows: the rows that receive gradient may be a subset of the
rows that are counted (micro-batches, ranks, a bank of past codes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-10


def entropy_bits(counts: Tensor, n_rows: Tensor) -> Tensor:
    """H = sum_j H2(n_j / N) in bits, float64 ``[]``, from int64 counts ``[K]`` and N ``[]``."""
    p = counts.double() / n_rows
    q = 1 - p
    return -(p * torch.log2(p + EPS) + q * torch.log2(q + EPS)).sum()


def entropy_gradient(counts: Tensor, n_rows: Tensor) -> Tensor:
    """dH/dB, the same for every row: float64 ``[K]``, the exact derivative of the sum above.

    Constant columns have the largest entries of all, 34.66 / N in size.
    """
    p = counts.double() / n_rows
    q = 1 - p
    slope = torch.log2((q + EPS) / (p + EPS)) + (q / (q + EPS) - p / (p + EPS)) / math.log(2)
    return slope / n_rows


@dataclass(frozen=True)
class CodeStatistics:
    """What the entropy and covariance terms know of the rows that are counted.

    Make one with :meth:`bae_fast.BinaryCode.statistics`. Passed as ``stats=`` it replaces the
    statistics of a call: every micro-batch or rank then reports the entropy and covariance of all
    counted rows, and the gradients of the parts add up to the gradient of the whole (add the
    entropy of each micro-batch to its loss undivided). Passed as ``past=`` it is added to them.

    Attributes:
        n_rows: int64 ``[]``, N, the rows counted.
        counts: int64 ``[K]``, ones in each column.
        words: int32 ``[N, ceil(K/32)]`` row-packed codes of the counted rows, or None; the
            covariance term needs them.
        numerator: int64 ``[]``, sum_{i != j} |V_ij|, or None where no covariance was asked for.
        signs: int32 ``[2, K, ceil(K/32)]``, bit planes [V > 0] and [V < 0], or None (then they
            are recomputed from ``words`` tile by tile).
    """

    n_rows: Tensor
    counts: Tensor
    words: Tensor | None = None
    numerator: Tensor | None = None
    signs: Tensor | None = None

    def entropy(self) -> Tensor:
        """Entropy of the counted rows in bits, float64 ``[]``, summed over columns."""
        return entropy_bits(self.counts, self.n_rows)

    def covariance(self) -> Tensor:
        """D = sum_{i != j} |C_ij| of the counted rows, float64 ``[]``.

        Raises:
            ValueError: these statistics were made without the covariance.
        """
        if self.numerator is None:
            raise ValueError("stats has no covariance: make it with statistics(covariance=True)")
        n = self.n_rows.double()
        return self.numerator / (n * (n - 1))

    def require_words(self) -> Tensor:
        """The counted codes, int32 ``[N, ceil(K/32)]``, row-packed.

        Raises:
            ValueError: they were not kept.
        """
        if self.words is None:
            raise ValueError("the covariance needs statistics that hold their words; got None")
        return self.words
