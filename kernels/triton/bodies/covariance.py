"""Covariance: sum |V_ij| and, where they are kept, the planes of the signs.

Sparse codes are counted by lists of their ones, :mod:`bae_fast.kernels.pair_lists`. Which form runs
is known on the device alone: both are started, one returns at once, and planes that were not made
carry a mark that no signs can be, a pair that is above and below zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bae_fast.kernels.bits import feature_packed
from bae_fast.kernels.pair_lists import PairLists
from bae_fast.ops import nvidia


def covariance(
    kernels: Any,
    words: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    keep_signs: bool,
    keep_lists: bool = False,
) -> tuple[Tensor, Tensor]:
    if words.device.type == "cpu" and n_rows < 2:  # reading it back would synchronise a GPU
        raise ValueError(f"covariance needs at least 2 rows; got {int(n_rows)}")
    k, n = counts.shape[0], words.shape[0]
    features, counts = feature_packed(words, k), counts.contiguous()
    if not nvidia.lists_may_serve(n, k):
        return kernels.covariance(features, counts, n_rows, keep_signs, n)
    pairs = PairLists(words, features, counts, n_rows)
    total, signs = kernels.covariance(features, counts, n_rows, keep_signs, n, pairs.serves)
    pairs.settle(total, signs)
    return total, signs


def made(signs: Tensor) -> Tensor:
    """Zero where planes carry the mark, which is all ones in both: int32 ``[1]``."""
    return torch.bitwise_not(signs[0, :1, 0] & signs[1, :1, 0])
