"""Quantisers of raw hidden states: what one would do without a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.metrics import fvu as fvu_of


def absmax(rows: Tensor, bits: int) -> tuple[Tensor, float]:
    """Integers of a row with one bf16 scale: (reconstructions, bits a row)."""
    most = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(1, keepdim=True) / most).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    found = (rows / scale).round().clamp(-most - 1, most)
    return found * scale, rows.shape[1] * bits + 16.0


def entropy_of_levels(levels: Tensor) -> float:
    """Sum over columns of the plug-in entropy of whole numbers ``[n, d]``, in bits."""
    n, total = len(levels), 0.0
    for column in levels.long().T:
        share = torch.bincount(column - column.min()).double() / n
        total -= float(torch.special.xlogy(share, share).sum()) / math.log(2)
    return total


def step_for(values: Tensor, variance: float, fvu: float) -> float:
    """The step of a uniform quantiser of centred values whose FVU is the one given."""
    low, high = 1e-4 * math.sqrt(variance), 100 * math.sqrt(variance)
    for _ in range(20):
        step = math.sqrt(low * high)
        error = (values - (values / step).round() * step).square().mean()
        low, high = (step, high) if float(error) < fvu * variance else (low, step)
    return math.sqrt(low * high)


@torch.no_grad()
def quantisers(rows: Tensor, train: Tensor, fvu: float) -> list[dict[str, Any]]:
    """Rate and FVU of what one would do without a model.

    Whole numbers of 8 to 2 bits with a scale a row; and, entropy coded at the code's own FVU, one
    step for all dimensions, of the states as they are and on their principal axes. Entropies are
    empirical, without any header: bounds, not files.
    """
    found = []
    for bits in (8, 4, 3, 2):
        recon, rate = absmax(rows, bits)
        found.append({"name": f"int{bits}", "fvu": fvu_of(rows, recon), "bits": rate})
    mean = train.mean(0)
    centred = rows - mean
    axes = torch.linalg.eigh(torch.cov(train.T.double())).eigenvectors.float()
    variance = float((rows - rows.mean(0)).square().mean())
    for name, values in (("entropy coded", centred), ("PCA, entropy coded", centred @ axes)):
        step = step_for(values, variance, fvu)
        levels = (values / step).round()
        found.append(
            {
                "name": name,
                "fvu": float((values - levels * step).square().mean()) / variance,
                "bits": entropy_of_levels(levels),
            }
        )
    return found
