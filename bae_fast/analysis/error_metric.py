"""In which unit each dimension's error is measured: what ``fit_normalization_(metric=)`` takes.

An autoencoder's squared error counts every dimension alike. In hidden states a few dimensions have
most of the variance, so most of the error is theirs, while the language model may read others.
Dividing each dimension by a scale s_i before training weighs its squared error by 1 / s_i^2:

``none``           s_i = 1
``std``            the standard deviation
``robust``         1.4826 times the median distance from the median, which outliers do not move
``sensitivity``    1 / sqrt(F_i), F_i the mean squared gradient of the language model's
                   log-likelihood at the hook (:func:`bae_fast.lm.sensitivity`). To second order
                   an error e costs a divergence of sum_i F_i e_i^2 / 2, cross terms left out.

``NAME^P`` is s_i to the power P: std^0.5 lies between none and std. And with a matrix in place of
scales, by which rows are divided: the squared error is then that divergence with its cross terms:

``fisher``         (F / f + 0.02)^(-1/2), F the second moments of these gradients
                   (:func:`bae_fast.lm.fisher`) and f the mean of its diagonal. What is added keeps
                   directions that few gradients were seen of; ``fisher^P`` is its power P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bae_fast.arguments import all_finite
from bae_fast.normalization import check_rows
from bae_fast.spacing import evenly_from

KINDS = ("std", "robust", "sensitivity", "fisher")

# scales are at least this share of their median: else a dimension that hardly varies would be all
# that counts, and one that nothing reads would not count at all
_LEAST = 1e-3

_MEDIAN_TO_STD = 1.4826

# of the mean of a Fisher information's diagonal, added to all its eigenvalues
_FLOOR = 0.02

# rows that the robust scale is read from, evenly over all
_ROBUST_ROWS = 2**15


def parse_metric(metric: str) -> tuple[str, float]:
    """The kind of a metric and its power; ("none", 0) for "none".

    Raises:
        ValueError: another kind, or a power that is not in (0, 4].
    """
    if metric == "none":
        return "none", 0.0
    kind, _, power = str(metric).partition("^")
    try:
        value = float(power) if "^" in str(metric) else 1.0
    except ValueError:
        value = math.nan
    if kind not in KINDS or not 0 < value <= 4:
        raise ValueError(
            f"metric must be none or one of {', '.join(KINDS)}, with ^ and a power in (0, 4] or "
            f"without; got {metric!r}"
        )
    return kind, value


@torch.no_grad()
def metric_scales(
    metric: str,
    rows: Tensor,
    *,
    sensitivity: Tensor | None = None,
    fisher: Tensor | None = None,
) -> Tensor | None:
    """The scale of each dimension, float64 ``[d]``, or a matrix ``[d, d]``; None for "none".

    Args:
        metric: see the module's text.
        rows: raw training rows ``[n, d]``.
        sensitivity: ``[d]``, mean squared gradients, for that kind.
        fisher: ``[d, d]``, second moments of gradients, for that kind.

    Raises:
        ValueError: another metric, rows that do not vary, or a sensitivity or Fisher information
            that is missing, of another width or nowhere positive.
    """
    kind, power = parse_metric(metric)
    check_rows("rows", rows, rows.shape[-1])
    if kind == "none":
        return None
    width = rows.shape[1]
    if kind == "fisher":
        return _fisher_units(fisher, width, power)
    if kind == "sensitivity":
        if sensitivity is None or sensitivity.shape != (width,):
            got = None if sensitivity is None else list(sensitivity.shape)
            raise ValueError(f"sensitivity must have shape [{width}]; got {got}")
        square = sensitivity.double().cpu()
        if not all_finite(square) or not bool((square > 0).any()):
            raise ValueError("sensitivity must be finite and somewhere positive")
        # dimensions that the model hardly reads get a large scale, and not an endless one
        scales = square.clamp_min(float(square[square > 0].median()) * _LEAST**2).rsqrt()
    elif kind == "std":
        mean = sum(block.double().sum(0) for block in rows.split(8192)) / len(rows)
        total = sum((block.double() - mean).square().sum(0) for block in rows.split(8192))
        scales = (torch.as_tensor(total) / len(rows)).sqrt().cpu()
    else:
        some = evenly_from(rows, _ROBUST_ROWS).double().cpu()
        middle = some.median(0).values
        scales = (some - middle).abs().median(0).values * _MEDIAN_TO_STD
    positive = scales[scales > 0]
    if not len(positive):
        raise ValueError(f"rows must vary for the metric {metric}; got constant ones")
    return scales.clamp_min(float(positive.median()) * _LEAST) ** power


def _fisher_units(fisher: Tensor | None, width: int, power: float) -> Tensor:
    if fisher is None or fisher.shape != (width, width):
        got = None if fisher is None else list(fisher.shape)
        raise ValueError(f"fisher must have shape [{width}, {width}]; got {got}")
    wide = fisher.double().cpu()
    mean = float(wide.diagonal().mean())
    if not all_finite(wide) or not mean > 0:
        raise ValueError("fisher must be finite and somewhere positive")
    values, vectors = torch.linalg.eigh((wide + wide.T) / (2 * mean))
    units = (values.clamp_min(0) + _FLOOR) ** (-power / 2)
    return (vectors * units) @ vectors.T
