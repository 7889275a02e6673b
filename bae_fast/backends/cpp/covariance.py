"""Covariance: sum |V_ij| over i != j and the signs of V, from bits by integer operations.

    V_ij = N n_ij - n_i n_j,   n_ij = popcount of column i & column j

The kernels and their layout are in ``csrc/``; here are the checks that raise Python's errors.
"""

from __future__ import annotations

from torch import Tensor

from bae_fast.backends.cpp.extension import op


def dense_rows(words: Tensor) -> Tensor:
    """Words whose rows are contiguous; kernels take any distance between rows."""
    return words if words.stride(-1) == 1 or words.shape[-1] == 1 else words.contiguous()


def covariance(
    words: Tensor, counts: Tensor, n_rows: Tensor, keep_signs: bool
) -> tuple[Tensor, Tensor]:
    if n_rows < 2:
        raise ValueError(f"covariance needs at least 2 rows; got {int(n_rows)}")
    return op("covariance")(dense_rows(words), counts.contiguous(), int(n_rows), keep_signs)
