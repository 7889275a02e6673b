"""Metrics of a code: unexplained variance, the Gaussian bound on bits, densities.

Everything is accumulated in float64, whatever the dtype of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bae_fast.arguments import all_finite

DENSE_ABOVE = 0.1
ALWAYS_ON_ABOVE = 0.9

_CHUNK = 8192  # rows upcast to float64 at a time


class FVUAccumulator:
    """Fraction of variance unexplained, fed chunk by chunk.

    FVU = sum (x - recon)^2 / sum (x - mean)^2, both sums over rows and dimensions, the mean that
    of all rows fed, per dimension. Means and sums of squares of the chunks are merged in float64
    (Chan, Golub and LeVeque 1979), so neither the chunk size nor a large mean costs digits.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        self._error = 0.0
        self._squares = 0.0
        self._mean: Tensor | None = None

    def update(self, x: Tensor, recon: Tensor) -> None:
        """Add rows.

        Args:
            x: [..., d], the hidden states.
            recon: the same shape, their reconstructions, in the same units.

        Raises:
            ValueError: shapes differ, no rows, or another width than before.
        """
        if x.shape != recon.shape or x.dim() == 0 or x.numel() == 0:
            raise ValueError(
                "x and recon must have one shape [..., d] with at least one row; got "
                f"{list(x.shape)} and {list(recon.shape)}"
            )
        if self._mean is not None and x.shape[-1] != self._mean.numel():
            raise ValueError(
                f"x must have width {self._mean.numel()}, as the rows before; got {x.shape[-1]}"
            )
        width = x.shape[-1]
        pairs = zip(
            x.detach().reshape(-1, width).split(_CHUNK),
            recon.detach().reshape(-1, width).split(_CHUNK),
            strict=True,
        )
        for part, part_recon in pairs:
            wide = part.double()
            self._error += float((wide - part_recon.to(wide)).square().sum())
            mean = wide.mean(0)
            self._squares += float((wide - mean).square().sum())
            if self._mean is None:
                self._mean = mean
            else:
                n_old, n_new = self.n_rows, len(part)
                step = mean - self._mean
                self._squares += float(step.square().sum()) * n_old * n_new / (n_old + n_new)
                self._mean = self._mean + step * (n_new / (n_old + n_new))
            self.n_rows += len(part)

    def compute(self) -> float:
        """The FVU of all rows fed so far; 0 is perfect, 1 is no better than the mean.

        Raises:
            ValueError: no rows yet, or rows without variance.
        """
        if self.n_rows == 0:
            raise ValueError("x must have at least two rows; got none")
        if self._squares == 0:
            raise ValueError("x must have rows that differ; got one row again and again")
        return self._error / self._squares


def fvu(x: Tensor, recon: Tensor) -> float:
    """Fraction of variance unexplained of one set of rows; see `FVUAccumulator`.

    Args:
        x: [..., d], the hidden states, any float dtype.
        recon: the same shape, their reconstructions.

    Raises:
        ValueError: shapes differ, no rows, or rows without variance.
    """
    accumulator = FVUAccumulator()
    accumulator.update(x, recon)
    return accumulator.compute()


def covariance_eigenvalues(x: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the rows, float64 [d], ascending.

    Args:
        x: [n, d], at least two rows, any float dtype; upcast chunk by chunk.

    Raises:
        ValueError: not two-dimensional, or fewer than two rows.
    """
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"x must have shape [n, d] with n of at least 2; got {list(x.shape)}")
    mean = torch.stack([part.double().sum(0) for part in x.split(_CHUNK)]).sum(0) / len(x)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(_CHUNK):
        centred = part.double() - mean
        total.addmm_(centred.T, centred)
    return torch.linalg.eigvalsh(total / (len(x) - 1)).clamp_min_(0)


def gaussian_rate_distortion_bits(
    covariance: Tensor, fvu: float | Sequence[float] | Tensor
) -> Tensor:
    """Bits per row that any code needs at a given FVU if the rows are Gaussian.

    Reverse water-filling over the eigenvalues v_i of the covariance (Cover and Thomas, Elements
    of Information Theory, section 10.3.3): R = sum_i max(0, log2(v_i / w) / 2), the water level w
    such that sum_i min(w, v_i) = FVU sum_i v_i. The level is found exactly: that sum is linear
    between neighbouring eigenvalues.

    Rows that are not Gaussian can be coded in fewer bits.

    Args:
        covariance: [d, d] symmetric, or its eigenvalues [d].
        fvu: one value or several, in (0, 1] and above.

    Returns:
        float64, shaped as `fvu`; 0 where FVU is 1 or more.

    Raises:
        ValueError: an FVU that is not positive, a negative eigenvalue, or no variance.
    """
    values = _spectrum(covariance)
    target = torch.as_tensor(fvu, dtype=torch.float64, device=values.device)
    if not bool((target > 0).all()):
        raise ValueError(f"fvu must be positive; got {fvu!r}")
    flat = target.reshape(-1)
    # With the k smallest eigenvalues under water, sum min(w, v) = (their sum) + (d - k) w.
    below = torch.cat([values.new_zeros(1), values.cumsum(0)])
    n_above = torch.arange(len(values), 0, -1, dtype=torch.float64, device=values.device)
    at_level = below[:-1] + n_above * values  # the distortion with w = v_k, ascending
    distortion = (flat * below[-1]).clamp_max(float(at_level[-1]))
    k = torch.searchsorted(at_level, distortion).clamp_max(len(values) - 1)
    level = (distortion - below[k]) / n_above[k]
    rates = 0.5 * torch.log2(values[None, :] / level[:, None]).clamp_min(0).sum(1)
    return torch.where(flat >= 1, 0.0, rates).reshape(target.shape)


def gaussian_rate_distortion_fvu(
    covariance: Tensor, bits: float | Sequence[float] | Tensor
) -> Tensor:
    """The smallest FVU that Gaussian rows allow at a given number of bits per row.

    The inverse of `gaussian_rate_distortion_bits`, exact in the same way.

    Args:
        covariance: [d, d] symmetric, or its eigenvalues [d].
        bits: one value or several, 0 or more.

    Returns:
        float64, shaped as `bits`.

    Raises:
        ValueError: negative bits, a negative eigenvalue, or no variance.
    """
    values = _spectrum(covariance)
    target = torch.as_tensor(bits, dtype=torch.float64, device=values.device)
    if not bool((target >= 0).all()):
        raise ValueError(f"bits must be at least 0; got {bits!r}")
    flat = target.reshape(-1)
    falling = values[values > 0].flip(0)
    logs = falling.log2()
    count = torch.arange(1, len(falling) + 1, dtype=torch.float64, device=values.device)
    # The rate with w at the m-th largest eigenvalue, ascending; with m of them above the level,
    # log2 w = (sum of their logs - 2 R) / m.
    at_level = 0.5 * (logs.cumsum(0) - count * logs)
    m = torch.searchsorted(at_level, flat, right=True).clamp_min(1)
    level = torch.exp2((logs.cumsum(0)[m - 1] - 2 * flat) / m)
    left = falling.sum() - falling.cumsum(0)[m - 1]
    return ((m * level + left) / falling.sum()).reshape(target.shape)


@dataclass(frozen=True)
class DensityHistogram:
    """How often features are on, counted in logarithmic bins.

    Attributes:
        edges: ascending, one more than bins; the last is 1.
        counts: features per bin, dead ones apart; a density below the first edge counts in the
            first bin.
        n_features: all features, dead ones included.
        dead: share of features that are never on in the rows looked at.
        dense: share on in more than 10 % of the rows, the always-on ones included.
        always_on: share on in more than 90 % of the rows.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    n_features: int
    dead: float
    dense: float
    always_on: float

    def lines(self, width: int = 72) -> list[str]:
        """The histogram as lines of text no wider than `width`, dead features first."""
        rows = [("never on", round(self.dead * self.n_features))]
        pairs = zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        rows += [(f"{_percent(low)} to {_percent(high)}", n) for low, high, n in pairs]
        # Empty bins below the rarest live feature say nothing.
        first = next((i for i, (_, n) in enumerate(rows) if i > 0 and n > 0), len(rows))
        rows = rows[:1] + rows[first:]
        label = max(len(name) for name, _ in rows)
        number = max(len(f"{n:,}") for _, n in rows)
        room = max(width - label - number - 4, 1)
        most = max(n for _, n in rows)
        return [
            f"{name:>{label}}  {n:>{number},}  {'#' * -(-n * room // most)}".rstrip()
            for name, n in rows
        ]


def density_histogram(
    density: Tensor, *, lowest: float = 1e-5, bins_per_decade: int = 3
) -> DensityHistogram:
    """Histogram of feature densities, with the shares of dead, dense and always-on features.

    Dead: never on in the rows looked at (p = 0). Dense: p > 0.1. Always on: p > 0.9.

    Args:
        density: [F], the share of rows each feature is on in, 0 to 1.
        lowest: the first bin's lower edge, to the nearest edge of a bin.
        bins_per_decade: bins for each factor of ten.

    Raises:
        ValueError: no features, or values outside 0 to 1.
    """
    if not 0 < lowest < 1 or bins_per_decade < 1:
        raise ValueError(
            "lowest must lie between 0 and 1, and bins_per_decade be at least 1; got "
            f"{lowest!r} and {bins_per_decade!r}"
        )
    p = density.detach().double().cpu().reshape(-1)
    if p.numel() == 0 or not bool(((p >= 0) & (p <= 1)).all()):
        found = f"{float(p.min())} to {float(p.max())}" if p.numel() else "no values"
        raise ValueError(f"density must hold a value or more, all between 0 and 1; got {found}")
    n_bins = max(round(-math.log10(lowest) * bins_per_decade), 1)
    # Python's powers of ten are exact where they can be, so a density of 0.1 lies on an edge.
    powers = [10.0 ** ((i - n_bins) / bins_per_decade) for i in range(n_bins + 1)]
    edges = torch.tensor(powers, dtype=torch.float64, device="cpu")
    live = p[p > 0]
    # Bins are [low, high), the last one [low, 1].
    bins = (torch.searchsorted(edges, live, right=True) - 1).clamp(0, n_bins - 1)
    return DensityHistogram(
        edges=tuple(edges.tolist()),
        counts=tuple(torch.bincount(bins, minlength=n_bins).tolist()),
        n_features=p.numel(),
        dead=1 - len(live) / p.numel(),
        dense=int((p > DENSE_ABOVE).sum()) / p.numel(),
        always_on=int((p > ALWAYS_ON_ABOVE).sum()) / p.numel(),
    )


def _spectrum(covariance: Tensor) -> Tensor:
    """Eigenvalues, float64 [d], ascending, none negative, from a matrix or from themselves."""
    wide = covariance.detach().double()
    if wide.dim() == 2 and wide.shape[0] == wide.shape[1] and wide.numel() > 0:
        values = torch.linalg.eigvalsh(wide)
    elif wide.dim() == 1 and wide.numel() > 0:
        values = wide.sort().values
    else:
        raise ValueError(
            "covariance must have shape [d, d], or [d] of eigenvalues; "
            f"got {list(covariance.shape)}"
        )
    if not all_finite(values) or float(values[-1]) <= 0:
        raise ValueError(
            f"covariance must be finite and have variance; got eigenvalues up to {values[-1]:.3g}"
        )
    if float(values[0]) < -1e-9 * float(values[-1]):
        raise ValueError(f"covariance must have no eigenvalue below 0; got {float(values[0]):.3g}")
    return values.clamp_min(0)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
