"""Most salient features of packed rows, and counts of columns, for :mod:`bae_fast.interpret`."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import op


def salient(words: Tensor, order: Tensor, n_columns: int, k: int) -> Tensor:
    """Places in ``order`` of the first k entries that hold in each row: int32 ``[N, k]``."""
    order = order.to(torch.int32).contiguous()
    return op("salient")(dense_rows(words), order, n_columns, k)


def column_counts(words: Tensor, n_columns: int) -> Tensor:
    """Ones in each column: int64 ``[K]``."""
    return op("column_counts")(dense_rows(words), n_columns)


def grouped(numbers: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Offsets ``[n_groups + 1]`` and rising indices of int32 numbers; others are left out."""
    return op("grouped")(numbers.contiguous(), n_groups)
