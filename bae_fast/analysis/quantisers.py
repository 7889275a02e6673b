"""Values of features written with few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder


def quantize(features: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Positive values to the middle of one of 2^bits even steps between low and high; 0 stays.

    Args:
        features: ``[..., F]``, none negative.
        low, high: ``[F]``; values outside go to the nearest level.
    """
    step = (high - low) / 2**bits
    index = ((features - low) / step.clamp_min(1e-30)).floor().clamp(0, 2**bits - 1)
    return torch.where(features > 0, low + (index + 0.5) * step, 0)


@torch.no_grad()
def value_ranges(model: Autoencoder, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest positive value of every feature over raw rows ``[n, d_in]``.

    Returns:
        Two of ``[F]``; 0 and 0 where a feature is never on.

    Raises:
        ValueError: no rows.
    """
    low = high = None
    for block in model.blocks(rows):
        features = model.activations(block)
        least = torch.where(features > 0, features, torch.inf).amin(0)
        low = least if low is None else torch.minimum(low, least)
        high = features.amax(0) if high is None else torch.maximum(high, features.amax(0))
    if low is None or high is None:
        raise ValueError(f"rows must hold at least one row; got {list(rows.shape)}")
    high = high.clamp_min(0)
    return torch.where(high > 0, low, 0), high
