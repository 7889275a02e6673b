"""A two-dimensional layout of decoder directions, for a map to look at.

Directions lie on a sphere of hundreds of dimensions, which no plane can show. What a map can keep
is who is near whom. Each direction is joined to its nearest by cosine, and the layout is the two
slowest modes of a walk along these joints (the spectral layout of the graph), begun at the two
principal components and taken a fixed number of steps. Coordinates are then replaced by their
ranks, so that points fill the square: the map keeps neighbourhoods, and no distances.

How much it keeps is measured: the share of every direction's nearest that are near it on the map.

Sources: Koren, "On spectral graph drawing" (2003); the weak joint of every point with every other,
which holds separate parts together, is the regularisation of Amini et al. (2013).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bae_fast.progress import tracked

# joints of each direction, and the weak joint with all, as a share of these
_JOINTS = 10
_WITH_ALL = 0.1
_STEPS = 100

# the share of the points that counts as near on the map
_NEAR_SHARE = 0.02

# rows of cosines or distances at a time
_ROWS = 1024

# how much is kept is measured at this many directions, evenly over their numbers
_MEASURED = 2048


class Layout(NamedTuple):
    """Places of directions on a map.

    Attributes:
        places: float32 ``[F, 2]``, each coordinate between 0 and 1.
        kept: the share of each direction's nearest ten, by cosine, that are among the nearest 2 %
            of the points on the map (the nearest ten, where these are more); of more than 2,048
            directions, at 2,048 spread evenly over their numbers.
        near: the number of points that these 2 % are.
    """

    places: Tensor
    kept: float
    near: int


@torch.no_grad()
def layout_directions(directions: Tensor) -> Layout:
    """Lay out directions so that near ones stay near.

    The result is the same at every call. Work: F^2 d products, and F d^2; memory: 4 KiB a
    direction beside the directions.

    Args:
        directions: ``[F, d]``; one of length zero stands in the middle of what it is joined to.

    Raises:
        ValueError: another shape, fewer than 3 directions, or values that are not finite.
    """
    if directions.dim() != 2 or len(directions) < 3 or directions.shape[1] < 2:
        raise ValueError(
            f"directions must have shape [F, d], F at least 3 and d at least 2; "
            f"got {list(directions.shape)}"
        )
    if not bool(directions.isfinite().all()):
        raise ValueError("directions must be finite")
    unit = torch.nn.functional.normalize(directions.detach().float().cpu(), dim=1)
    f = len(unit)
    near = nearest_directions(unit, k=min(_JOINTS, f - 1))
    places = _modes(near, _principal(unit))
    places = places.argsort(dim=0, stable=True).argsort(dim=0).float() / (f - 1)
    n_near = max(round(_NEAR_SHARE * f), near.shape[1])
    return Layout(places, _kept(near, places, n_near), n_near)


def nearest_directions(unit: Tensor, k: int) -> Tensor:
    """The k other directions of the largest cosine, int64 ``[F, k]``, of unit rows ``[F, d]``."""
    parts = []
    for first in tracked(range(0, len(unit), _ROWS), len(unit), "directions", by=_ROWS):
        cosine = unit[first : first + _ROWS] @ unit.T
        cosine.diagonal(first).fill_(-torch.inf)
        parts.append(cosine.topk(k, dim=1).indices)
    return torch.cat(parts)


def _principal(unit: Tensor) -> Tensor:
    """Coordinates along the two directions of the largest variance, float64 ``[F, 2]``."""
    centred = (unit - unit.mean(0)).double()
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    # the sign of an eigenvector is anything: its largest entry is made positive
    largest = vectors.abs().argmax(0)
    return centred @ (vectors * vectors[largest, [0, 1]].sign())


def _modes(near: Tensor, start: Tensor) -> Tensor:
    """Two smooth coordinates of the graph of neighbours, float64 ``[F, 2]``."""
    f, k = near.shape
    left = torch.arange(f).repeat_interleave(k)
    # a joint that both ends ask for counts twice
    here, there = torch.cat([left, near.flatten()]), torch.cat([near.flatten(), left])
    weak = _WITH_ALL * k
    degree = torch.bincount(here, minlength=f).double() + weak
    scale = degree.rsqrt()[:, None]
    steady = degree.sqrt() / degree.sum().sqrt()
    places = start
    for _ in range(_STEPS):
        # half a step of the walk: all its modes stay positive, so the slowest win
        scaled = scale * places
        across = torch.zeros_like(scaled).index_add_(0, here, scaled[there])
        places = places + scale * (across + (weak / f) * scaled.sum(0))
        places = places - steady[:, None] * (steady @ places)
        places = torch.linalg.qr(places).Q
    return places * scale


def _kept(near: Tensor, places: Tensor, n: int) -> float:
    """The share of the nearest that are near on the map."""
    f = len(places)
    at = torch.linspace(0, f - 1, min(f, _MEASURED)).round().long()
    found = 0
    for some in at.split(_ROWS):
        far = torch.cdist(places[some], places)
        far.scatter_(1, some[:, None], torch.inf)
        # the n-th smallest distance bounds what is near
        bound = far.kthvalue(n, dim=1).values
        found += int((far.gather(1, near[some]) <= bound[:, None]).sum())
    return found / (len(at) * near.shape[1])
