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
    index = _steps(features, low, high, bits)
    return torch.where(features > 0, low + (index + 0.5) * ((high - low) / 2**bits), 0)


def _steps(features: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The step that each value lies in, 0 to 2^bits - 1, as floats."""
    step = (high - low) / 2**bits
    return ((features - low) / step.clamp_min(1e-30)).floor().clamp(0, 2**bits - 1)


class ValueCounts:
    """How often the values of each feature lie in each of 2^bits even steps.

    Attributes:
        counts: int64 ``[F, 2^bits]``.
    """

    def __init__(self, low: Tensor, high: Tensor, bits: int) -> None:
        """Count nothing yet; arguments as of :func:`quantize`."""
        self.low, self.high, self.bits = low, high, bits
        self.counts = torch.zeros(len(low) << bits, dtype=torch.int64, device=low.device)

    def add(self, features: Tensor) -> None:
        """Count the values of a block ``[n, F]``; zeros are not on, and do not count."""
        rows, at = features.nonzero(as_tuple=True)
        steps = _steps(features[rows, at], self.low[at], self.high[at], self.bits)
        self.counts += torch.bincount(
            (at << self.bits) + steps.to(torch.int64), minlength=len(self.counts)
        )

    def bits_of(self, charged: ValueCounts) -> float:
        """Bits that all values of other rows take, by the shares of the steps counted here.

        A feature's share of a step is that of its own values, with two more of all features': what
        is seldom on has no shares of its own. As of what is on, see
        :mod:`bae_fast.analysis.description`, they are of other rows than are charged.
        """
        own = self.counts.view(-1, 1 << self.bits).double()
        pooled = (own.sum(0) + 0.5) / (own.sum() + 0.5 * own.shape[1])
        shares = (own + 2 * pooled) / (own.sum(1, keepdim=True) + 2)
        return float(-(charged.counts.view_as(own) * shares.log2()).sum())


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
