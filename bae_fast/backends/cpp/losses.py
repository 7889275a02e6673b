"""H, D and the slopes of H from counts, and the squared error, each in one pass in C++.

Every one of them is small beside the products of a step. Made of a dozen operators of torch they
would each wake its threads, which takes longer than the numbers do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import op
from bae_fast.ops.limits import check_counted
from bae_fast.ops.terms import covariance_of


def terms(
    counts: Tensor, n_rows: Tensor, numerator: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_counted(n_rows)
    entropy = op("entropy")(counts.contiguous(), int(n_rows)).to(dtype)
    if numerator is None:
        return entropy, entropy.new_zeros(())
    return entropy, covariance_of(numerator, n_rows).to(dtype)


def slopes(counts: Tensor, n_rows: Tensor, grad_entropy: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(counts), dtype=torch.promote_types(dtype, torch.float32))
    op("entropy_slopes")(counts.contiguous(), int(n_rows), float(grad_entropy), out)
    return out.to(dtype)


def squared_error(recon: Tensor, target: Tensor, unit: Tensor, keep: Tensor | None) -> Tensor:
    """See :attr:`bae_fast.ops.registry.Extras.squared_error`."""
    found: Tensor = op("squared_error")(dense_rows(recon), dense_rows(target), unit, keep)
    return found


def squared_error_gradient(
    recon: Tensor, target: Tensor, unit: Tensor, keep: Tensor | None, scale: float
) -> Tensor:
    """See :attr:`bae_fast.ops.registry.Extras.squared_error_gradient`."""
    out = torch.empty_like(recon, memory_format=torch.contiguous_format)
    op("squared_error_gradient")(dense_rows(recon), dense_rows(target), unit, keep, scale, out)
    return out
