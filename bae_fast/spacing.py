"""Some of many rows, evenly spaced over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

# rows on which what is made at the end of a run, or a coder, can be fitted: more change little
MOST_ROWS = 262_144


def evenly(rows: Tensor, most: int = MOST_ROWS) -> Tensor:
    """Every k-th of ``[n, ...]``, with the least k that leaves at most so many: a view."""
    return rows[:: -(-len(rows) // most)]


def evenly_from(rows: Tensor, least: int) -> Tensor:
    """Every k-th of ``[n, ...]``, with the largest k that leaves at least so many, all where there
    are no more: a view."""
    return rows[:: max(len(rows) // least, 1)]


def even_numbers(n: int, k: int, device: torch.device | None = None) -> Tensor:
    """k of the numbers below n, evenly spaced from 0 on: int64 ``[k]``, for k of at most n."""
    return torch.arange(k, device=device) * n // k
