"""The units of a normalisation: one scale, relative ones of dimensions, or a matrix of them."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.arguments import all_finite
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


def empty_metric(mean: Tensor, given: Tensor) -> Tensor:
    """Memory for a metric of rows whose mean is ``[d]``, as a given one is to be copied to it: a
    matrix for ``[d, d]``, else units of dimensions, which another shape does not fit."""
    matrix = given.shape == (len(mean), len(mean))
    return mean.new_empty(given.shape if matrix else mean.shape)


def inverse_units(metric: Tensor | None, name: str = "metric") -> Tensor | None:
    """The inverse of a matrix of units, in its dtype; None for units of dimensions, and for None.

    Args:
        name: what an error calls the metric.

    Raises:
        ValueError: a matrix that is not symmetric, positive definite and finite.
    """
    if metric is None or metric.dim() == 1:
        return None
    if metric.is_meta:
        return torch.empty_like(metric)
    wide = metric.detach().double()
    symmetric = all_finite(wide) and torch.allclose(wide, wide.T, rtol=1e-2, atol=1e-6)
    factor, failed = torch.linalg.cholesky_ex(wide) if symmetric else (wide, 1)
    if not symmetric or bool(failed):
        raise ValueError(f"{name} must be symmetric and positive definite where it is a matrix")
    return torch.cholesky_inverse(factor).to(metric.dtype)
