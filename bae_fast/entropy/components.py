"""A start along independent components, from which a code of few bits is near.

At p = 1/2 the entropy has no gradient, and a rotation of fair bits looks like any other set until
one looks at fourth moments: gradient descent from random directions takes long to find the bits,
the longer the more there are. Fixed-point independent component analysis (Hyvarinen and Oja 1997,
symmetric, skew and kurtosis) finds such directions in seconds; training then does what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.model import BinaryAutoencoder
from bae_fast.training import init_from_rows_

# Eigenvalues of the covariance below this share of the largest are rounding: that of float32 rows
# is about 1e-14, and the least of d Gaussian directions in d dimensions about 1 / (4 d^2).
_RANK_BELOW = 1e-9

# rows that thresholds and first decoder are read from
_THRESHOLD_ROWS = 16384

_ITERATIONS = 200
_TOLERANCE = 1e-5

# Gaussian directions turn among themselves for ever: it is over when this many iterations raise
# the sum of what is maximised by less than this share.
_SETTLED_OVER, _SETTLED_BELOW = 10, 1e-4


def independent_components(
    x: Tensor, *, max_components: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Unmixing directions of rows: float32 ``[c, d]``, (x - mean) @ W.T of unit variance.

    c is the rank of the covariance, at most ``max_components`` (then of the largest variance).

    Args:
        x: ``[n, d]``, n >= 2.

    Raises:
        ValueError: fewer than two rows, or rows without variance.
    """
    centred, values, vectors = _axes(x)
    kept = int((values > _RANK_BELOW * values[-1]).sum())
    kept = kept if max_components is None else min(kept, max_components)
    whitening = vectors[:, -kept:] / values[-kept:].sqrt()
    white = (centred @ whitening).float()
    draws = torch.randn(kept, kept, generator=generator, dtype=torch.float32).to(white)
    rotation = _nearest_rotation(draws)
    reached: list[float] = []
    for _ in range(_ITERATIONS):
        projected = white @ rotation.T
        # the gradient of skew^2 / 12 + kurtosis^2 / 48 (Jones and Sibson 1987), all rows at once:
        # kurtosis alone is blind to bits of p = 0.21, skew alone to fair ones
        squares = projected.square()
        skew = (squares * projected).mean(0)
        kurtosis = squares.square().mean(0) - 3
        reached.append(float((skew.square() / 12 + kurtosis.square() / 48).sum()))
        earlier = max(reached[:-_SETTLED_OVER], default=-1.0)
        if reached[-1] < (1 + _SETTLED_BELOW) * earlier:
            break
        by_square = squares.T @ white / len(white)
        by_cube = (squares * projected).T @ white / len(white) - 3 * rotation
        moved = _nearest_rotation(skew[:, None] * by_square / 2 + kurtosis[:, None] * by_cube / 6)
        change = 1 - (moved * rotation).sum(1).abs().min()
        rotation = moved
        if float(change) < _TOLERANCE:
            break
    return rotation @ whitening.T.float()


def rank(x: Tensor) -> int:
    """Rank of the covariance of rows ``[n, d]``, n >= 2.

    Raises:
        ValueError: fewer than two rows, or rows without variance.
    """
    _, values, _ = _axes(x)
    return int((values > _RANK_BELOW * values[-1]).sum())


def _axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows, and the eigenvalues (rising) and vectors of their covariance: float64."""
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"x must have shape [n, d] with n >= 2; got {list(x.shape)}")
    centred = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    if float(values[-1]) <= 0:
        raise ValueError("x must vary: its covariance is zero")
    return centred, values, vectors


def _nearest_rotation(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix.double())
    return (left @ right).to(matrix.dtype)


@torch.no_grad()
def init_from_components_(
    bae: BinaryAutoencoder,
    x: Tensor,
    *,
    density: float,
    decoder_norm: float,
    generator: torch.Generator | None = None,
) -> int:
    """Start features along independent components, the rest rare and along rows.

    A component's sign is that of its skew (rare is on); its threshold lies in the widest gap
    between neighbouring values within the middle 98 % of the rows, which for two-valued components
    is between the two values. The decoder's rows are those of the least-squares decoder of these
    bits.

    Args:
        x: raw rows ``[n, d_in]``, more than d_in of them.
        density, decoder_norm: for features beyond the components, see ``init_from_rows_``.

    Returns:
        How many features started along components.

    Raises:
        ValueError: several bits a feature, or rows that do not vary.
    """
    if bae.config.n_bits != 1:
        raise ValueError(f"bae must have n_bits=1; got {bae.config.n_bits}")
    init_from_rows_(bae, x, density, decoder_norm=decoder_norm, generator=generator)
    rows = bae.normalize(x).to(bae.W_enc.dtype)
    directions = independent_components(
        rows, max_components=bae.config.d_sae, generator=generator
    ).to(rows)
    rows = rows[:_THRESHOLD_ROWS]
    projected = rows @ directions.T
    mean = projected.mean(0)
    sign = torch.where((projected - mean).pow(3).mean(0) < 0, -1.0, 1.0).to(rows)
    projected, directions = projected * sign, directions * sign[:, None]
    ordered = projected.sort(dim=0).values
    margin = max(len(rows) // 100, 1)
    middle = ordered[margin:-margin] if len(rows) > 4 * margin else ordered
    at = middle.diff(dim=0).argmax(0)
    column = torch.arange(len(directions), device=rows.device)
    threshold = (middle[at, column] + middle[at + 1, column]) / 2
    c = len(directions)
    bae.W_enc[:, :c] = directions.T
    bae.b_enc[:c] = -threshold
    bits = (projected > threshold).to(torch.float64)
    bits = torch.cat([bits, torch.ones_like(bits[:, :1])], dim=1)
    solution = torch.linalg.lstsq(bits, rows.double(), driver="gelsd").solution
    bae.W_dec[:c] = solution[:c].to(bae.W_dec.dtype)
    bae.b_dec.copy_(solution[c])
    return c
