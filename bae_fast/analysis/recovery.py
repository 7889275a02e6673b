"""What an autoencoder finds of known features: rows made of directions, by hierarchy and groups.

Real hidden states have no list of true features. Here rows are sums of known directions, switched
on by bits that depend on each other in the two ways that are hardest for dictionaries:

- **hierarchy**: every root has children that are on only where it is on. An autoencoder that saves
  bits or units may let a child's feature swallow its parent's where both are on (absorption).
- **groups**: roots of a group tend to be on together, by a shared Gaussian. Two that are always
  together may become one.

True feature and found feature are paired one to one, by falling cosine of their directions. Scores:
the mean cosine of the pairs, and the mean F1 of the found feature's activity as a test of the true
one's, in rows that nothing was trained on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.autoencoder import Autoencoder, normal_quantile
from bae_fast.normalization import check_rows


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """True features and how they are switched on.

    Attributes:
        d: width of a row.
        roots: features at the top.
        children: features below each root.
        p_root: share of rows that a root is on in.
        p_child: share of a root's rows that each of its children is on in.
        group: roots that tend to be on together.
        correlation: correlation of the Gaussians of a group, 0 to below 1.
        spread: values of a feature that is on are uniform in 1 - spread to 1 + spread.
        noise: standard deviation of Gaussian noise of each dimension, over the length of a
            direction.
        seed: the seed of the directions.

    Raises:
        ValueError: a constant of another type or out of its range.
    """

    d: int = 64
    roots: int = 24
    children: int = 3
    p_root: float = 0.05
    p_child: float = 0.3
    group: int = 4
    correlation: float = 0.7
    spread: float = 0.3
    noise: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("d", 2), ("roots", 1), ("children", 0), ("group", 1)):
            value = getattr(self, name)
            check_int(name, value, least)
        for name in ("p_root", "p_child"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {getattr(self, name)!r}")
        for name in ("correlation", "spread"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)!r}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must not be negative; got {self.noise!r}")

    @property
    def n_features(self) -> int:
        """Roots and their children."""
        return self.roots * (1 + self.children)

    def parents(self) -> Tensor:
        """The root of each feature, int64 ``[T]``; -1 of a root. Roots come first."""
        of_children = torch.arange(self.roots).repeat_interleave(self.children)
        return torch.cat([torch.full((self.roots,), -1), of_children])

    def directions(self) -> Tensor:
        """Unit directions, float32 ``[T, d]``."""
        # apart from the numbers that a module of the same seed begins with
        generator = torch.Generator().manual_seed(2**40 + self.seed)
        drawn = _normal(self.n_features, self.d, generator)
        return torch.nn.functional.normalize(drawn, dim=1)

    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Rows float32 ``[n, d]`` and which true features are on in them, bool ``[n, T]``.

        Raises:
            ValueError: n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        generator = torch.Generator().manual_seed(seed)
        n_groups = -(-self.roots // self.group)
        shared = _normal(n, n_groups, generator)
        shared = shared.repeat_interleave(self.group, 1)[:, : self.roots]
        own = _normal(n, self.roots, generator)
        gauss = math.sqrt(self.correlation) * shared + math.sqrt(1 - self.correlation) * own
        edge = normal_quantile(1 - self.p_root)
        roots = gauss > edge
        below = _uniform(n, self.roots * self.children, generator) < self.p_child
        on = torch.cat([roots, below & roots.repeat_interleave(self.children, 1)], 1)
        uniform = _uniform(n, self.n_features, generator)
        values = on * (1 + self.spread * (2 * uniform - 1))
        noise = self.noise * _normal(n, self.d, generator)
        return values @ self.directions() + noise, on


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How much of the truth was found.

    Attributes:
        cosine: mean over true features of the cosine with their partner.
        f1: mean F1 of the partner's activity; of true features that are on in some row.
        f1_roots, f1_children: the same of either kind; None where there is none.
        absorbed: of the rows in which a root and one of its children are on, the share in which
            the root's partner is off; None where there are none.
        partners: int64 ``[T]``, the found feature of each true one, -1 where there are too few.
    """

    cosine: float
    f1: float
    f1_roots: float | None
    f1_children: float | None
    absorbed: float | None
    partners: Tensor

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        names = ("cosine", "f1", "f1_roots", "f1_children", "absorbed")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def recovery(
    model: Autoencoder, rows: Tensor, on: Tensor, directions: Tensor, parents: Tensor
) -> Recovery:
    """Pair true features with found ones and score the pairs.

    Args:
        model: an autoencoder in eval mode, trained on other rows of the same features.
        rows: ``[n, d]``, held out.
        on: bool ``[n, T]``, :meth:`FeatureSpec.sample`.
        directions: ``[T, d]``, :meth:`FeatureSpec.directions`.
        parents: int64 ``[T]``, :meth:`FeatureSpec.parents`.

    Raises:
        ValueError: a module without one direction a feature, or shapes that do not agree.
    """
    check_rows("rows", rows, model.d_in)
    if on.shape != (len(rows), len(directions)) or directions.shape[1] != model.d_out:
        raise ValueError(
            f"on must have shape [n, T] and directions [T, {model.d_out}], n={len(rows)}; got "
            f"{list(on.shape)} and {list(directions.shape)}"
        )
    if parents.shape != (len(directions),):
        raise ValueError(f"parents must have shape [{len(directions)}]; got {list(parents.shape)}")
    found = model.directions()
    if found is None or found.shape != (model.d_sae, model.d_out):
        raise ValueError(f"{type(model).__name__} must have one direction a feature")
    # what a feature adds to the raw row, whatever the units of dimensions
    raw = torch.nn.functional.normalize(model.in_raw_units(found).float().cpu(), dim=1)
    cosines = torch.nn.functional.normalize(directions.float().cpu(), dim=1) @ raw.T
    partners, own = _pairs(cosines)
    code = model.active(rows)
    active = code.to("cpu").to_dense()
    paired = partners >= 0
    said = torch.zeros_like(on, dtype=torch.bool)
    said[:, paired] = active[:, partners[paired]]
    both = (said & on).sum(0).double()
    f1 = 2 * both / (said.sum(0) + on.sum(0)).clamp_min(1)
    seen = on.any(0)

    def mean(which: Tensor) -> float | None:
        kept = f1[which & seen]
        return float(kept.mean()) if len(kept) else None

    is_child = parents >= 0
    above = parents[is_child]
    together = on[:, is_child] & on[:, above]
    n_together = int(together.sum())
    absorbed = float((together & ~said[:, above]).sum() / n_together) if n_together else None
    every = mean(torch.ones_like(seen))
    return Recovery(
        cosine=float(own.mean()),
        f1=0.0 if every is None else every,
        f1_roots=mean(~is_child),
        f1_children=mean(is_child),
        absorbed=absorbed,
        partners=partners,
    )


def _normal(n: int, m: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, m, generator=generator, dtype=torch.float32, device="cpu")


def _uniform(n: int, m: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, m, generator=generator, dtype=torch.float32, device="cpu")


def _pairs(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """One to one, the largest cosine first: partners int64 ``[T]`` and their cosines, 0 if none."""
    left = cosines.clone()
    partners = torch.full((len(cosines),), -1)
    own = cosines.new_zeros(len(cosines))
    for _ in range(min(cosines.shape)):
        at = int(left.argmax())
        true, column = divmod(at, cosines.shape[1])
        partners[true], own[true] = column, cosines[true, column]
        left[true], left[:, column] = -torch.inf, -torch.inf
    return partners, own
