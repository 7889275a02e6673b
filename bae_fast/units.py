"""The units of a normalisation: one scale, relative ones of dimensions, or a matrix of them."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.devices import without_autocast


def divided(rows: Tensor, scale: Tensor, metric: Tensor | None, inverse: Tensor | None) -> Tensor:
    """Centred rows ``[..., d]`` in the units of a normalisation.

    Args:
        scale: ``[]``.
        metric: the relative units ``[d]``, or a matrix of them ``[d, d]``, or None.
        inverse: the inverse of a matrix, where it is at hand.
    """
    if metric is not None and metric.dim() == 2:
        inverse = inverse_units(metric) if inverse is None else inverse
        assert inverse is not None
        return _product(rows / scale, inverse)
    return rows / (scale if metric is None else scale * metric)


def multiplied(rows: Tensor, scale: Tensor, metric: Tensor | None) -> Tensor:
    """The inverse of :func:`divided`."""
    if metric is not None and metric.dim() == 2:
        return _product(rows * scale, metric)
    return rows * (scale if metric is None else scale * metric)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    own = torch.promote_types(rows.dtype, matrix.dtype)
    wide = torch.promote_types(own, torch.float32)
    # autocast would round both sides to half precision, which a division does not
    with without_autocast():
        return (rows.to(wide) @ matrix.to(wide)).to(own)


def inverse_units(metric: Tensor | None) -> Tensor | None:
    """The inverse of a matrix of units, in its dtype; None for units of dimensions, and for None.

    Raises:
        ValueError: a matrix that is not symmetric, positive definite and finite.
    """
    if metric is None or metric.dim() == 1:
        return None
    if metric.is_meta:
        return torch.empty_like(metric)
    wide = metric.detach().double()
    symmetric = bool(wide.isfinite().all()) and torch.allclose(wide, wide.T, rtol=1e-2, atol=1e-6)
    factor, failed = torch.linalg.cholesky_ex(wide) if symmetric else (wide, 1)
    if not symmetric or bool(failed):
        raise ValueError("metric must be symmetric and positive definite where it is a matrix")
    return torch.cholesky_inverse(factor).to(metric.dtype)
