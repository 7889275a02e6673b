"""Rows in which columns are on together: pairs for :mod:`bae_fast.pairs`, more for the chain rule.

Pairs by lists of the ones where they are few, else by bits (``csrc/pair_counts.cpp``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import op, simd

# Products of bits in the time of one visited entry, on one thread, at N = 8,192 and 100 and 300
# ones a row of K = 2,304 and 8,192: 185 to 212 on avx512, 90 to 193 on avx2, 21 to 26 on scalar.
# neon and amx are estimates.
LIST_COST = {"scalar": 25.0, "avx2": 120.0, "avx512": 200.0, "neon": 60.0, "amx": 200.0}


def pair_counts(words: Tensor, columns: Tensor, n_columns: int) -> Tensor:
    """float32 ``[k, k]`` of exact integers, for different columns int64 ``[k]``."""
    place = torch.full((n_columns,), -1, dtype=torch.int32, device="cpu")
    place[columns] = torch.arange(len(columns), dtype=torch.int32, device="cpu")
    counts: Tensor = op("pair_counts")(dense_rows(words), place, len(columns), LIST_COST[simd()])
    return counts


def common_ones(left: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Ones in common of int32 words ``[G, a, m]`` and of those among ``[k, m]`` that index int64
    ``[G, c]`` chooses: float32 ``[G, a, c]``; k at most 2^16."""
    counts: Tensor = op("common_ones")(
        left.contiguous(), rows.contiguous(), index.int().contiguous()
    )
    return counts
