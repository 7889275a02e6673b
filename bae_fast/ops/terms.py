"""H and D as numbers and the slopes of H, in plain torch: what every device can run."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.ops.limits import check_counted
from bae_fast.statistics import entropy_bits, entropy_gradient


def terms(
    counts: Tensor, n_rows: Tensor, numerator: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """H in bits and D, ``dtype []``, computed in float64; D is zero without a numerator."""
    check_counted(n_rows)
    entropy = entropy_bits(counts, n_rows).to(dtype)
    if numerator is None:
        return entropy, entropy.new_zeros(())
    return entropy, covariance_of(numerator, n_rows).to(dtype)


def covariance_of(numerator: Tensor, n_rows: Tensor) -> Tensor:
    """D, float64 ``[]``."""
    total = n_rows.double()
    return numerator / (total * (total - 1))


def slopes(counts: Tensor, n_rows: Tensor, grad_entropy: Tensor, dtype: torch.dtype) -> Tensor:
    """dH/dB of every column times the loss's gradient at H, ``dtype [K]``, computed in float64."""
    return (entropy_gradient(counts, n_rows) * grad_entropy).to(dtype)
