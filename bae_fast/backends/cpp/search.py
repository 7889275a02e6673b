"""The search for a code, for :mod:`bae_fast.search`."""

from __future__ import annotations

from torch import Tensor

from bae_fast.backends.cpp.extension import op


def search(
    projection: Tensor,
    gram: Tensor,
    on: Tensor,
    off: Tensor,
    words: Tensor,
    most: int,
    least: float,
) -> tuple[Tensor, Tensor]:
    """Words after the search and the flips of each row, int32 ``[N]``; float32 ``[N, K]`` in."""
    found = words.clone().contiguous()
    args = (projection.contiguous(), gram.contiguous(), on.contiguous(), off.contiguous())
    return found, op("search")(*args, most, least, found)
