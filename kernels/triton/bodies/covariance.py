"""Covariance: sum |V_ij| and, where they are kept, the planes of the signs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bae_fast.kernels.bits import feature_packed


def covariance(
    kernels: Any, words: Tensor, counts: Tensor, n_rows: Tensor, keep_signs: bool
) -> tuple[Tensor, Tensor]:
    if words.device.type == "cpu" and n_rows < 2:  # reading it back would synchronise a GPU
        raise ValueError(f"covariance needs at least 2 rows; got {int(n_rows)}")
    features = feature_packed(words, counts.shape[0])
    counts = counts.contiguous()
    return kernels.covariance(features, counts, n_rows, keep_signs, words.shape[0])
