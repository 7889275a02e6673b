"""Sets of vectors whose entropy is known: x = c V + noise, c in {0, 1}^r.

V is Gaussian, so for r <= d the rows tell c, and the entropy of the set is that of c. What the
kinds of c are, and their joint entropy in bits:

``fair``       independent, p = 1/2 (the paper's): r
``sparse``     independent, probability p: r H2(p)
``copies``     groups of g: a fair bit and g - 1 copies of it, each flipped with probability e:
               (r / g) (1 + (g - 1) H2(e)). Dependence runs along a star, so the tree is exact;
               the sum of marginals is r
``exclusive``  groups of g of which exactly one is on: (r / g) log2 g. Not a tree: the tree lies
               between the truth and the sum of marginals, r H2(1/g)
``noise``      as ``fair``, with Gaussian noise of a given share of the signal's variance: r, the
               entropy of what is not noise
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from bae_fast.arguments import check_int

KINDS = ("fair", "sparse", "copies", "exclusive", "noise")


@dataclasses.dataclass(frozen=True)
class SyntheticSpec:
    """A kind of set and its constants.

    Attributes:
        kind: one of :data:`KINDS`.
        r: bits; a multiple of ``group`` for ``copies`` and ``exclusive``.
        d: width of a vector.
        p: for ``sparse``, the share of ones.
        group, flip: g and e of the module's text.
        noise: for ``noise``, its variance over that of the signal.

    Raises:
        ValueError: an unknown kind, or a constant out of its range.
    """

    kind: str
    r: int
    d: int
    p: float = 0.1
    group: int = 4
    flip: float = 0.05
    noise: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        for name, least in (("r", 1), ("d", 1), ("group", 2)):
            value = getattr(self, name)
            check_int(name, value, least)
        for name in ("p", "flip"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {getattr(self, name)!r}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must not be negative; got {self.noise!r}")
        if self.kind in ("copies", "exclusive") and self.r % self.group:
            raise ValueError(f"r must be a multiple of group={self.group}; got {self.r}")

    @property
    def joint_bits(self) -> float:
        """The truth: entropy of c."""
        groups = self.r / self.group
        return {
            "fair": float(self.r),
            "noise": float(self.r),
            "sparse": self.r * _h2(self.p),
            "copies": groups * (1 + (self.group - 1) * _h2(self.flip)),
            "exclusive": groups * math.log2(self.group),
        }[self.kind]

    @property
    def marginal_bits(self) -> float:
        """Sum of the entropies of c's bits: what a sum of marginals gives at best."""
        if self.kind == "sparse":
            return self.r * _h2(self.p)
        return self.r * _h2(1 / self.group) if self.kind == "exclusive" else float(self.r)

    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw a set: (x float32 ``[n, d]``, c bool ``[n, r]``), the same for a seed everywhere.

        Raises:
            ValueError: n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1; got {n}")
        generator = torch.Generator().manual_seed(seed)
        # V first: it does not depend on n
        directions = torch.randn(
            self.r, self.d, generator=generator, dtype=torch.float32
        ) / math.sqrt(self.r)
        groups = self.r // self.group
        if self.kind == "sparse":
            bits = torch.rand(n, self.r, generator=generator, dtype=torch.float32) < self.p
        elif self.kind == "copies":
            first = torch.rand(n, groups, 1, generator=generator, dtype=torch.float32) < 0.5
            flips = (
                torch.rand(n, groups, self.group, generator=generator, dtype=torch.float32)
                < self.flip
            )
            flips[..., 0] = False
            bits = (first ^ flips).flatten(1)
        elif self.kind == "exclusive":
            which = torch.randint(self.group, (n, groups), generator=generator)
            bits = torch.nn.functional.one_hot(which, self.group).bool().flatten(1)
        else:
            bits = torch.rand(n, self.r, generator=generator, dtype=torch.float32) < 0.5
        x = bits.float() @ directions
        if self.kind == "noise":
            scale = math.sqrt(self.noise) * x.std(0).square().mean().sqrt()
            x += scale * torch.randn(n, self.d, generator=generator, dtype=torch.float32)
        return x, bits


def _h2(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)
