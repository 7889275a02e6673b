"""Which features of two codes of the same rows are the same.

n_i and n_ij count rows in which a feature is on, and two together, exactly. Of a pair,

    Jaccard      n_ij / (n_i + n_j - n_ij)
    phi          (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))
    containment  (n_ij / n_i - p_j) / (1 - p_j),  p_j = n_j / N

Containment of i in j is the share of i's rows in which j is on too, less what chance gives: 1 if
all of them, 0 if j is as common there as everywhere. It counts only where chance would leave at
least 5 of i's rows outside of j: a feature that is nearly always on holds no rare one by that
alone. Classes, with a threshold t and in this order:

    dead       n_i = 0
    same       i and j are each other's best partner, and the Jaccard index is at least t
    subset     containment in some feature of the other code is at least t
    superset   some feature of the other code is contained in it by at least t
    unmatched  none of these

Features on in fewer than ``min_count`` rows are ``rare``: a feature of one row is contained in
all that are on there. The control is the same with the rows of one code in another order, which
keeps all densities and takes away what the codes share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.codes import BinaryCode
from bae_fast.pairs import COLUMN_BLOCK, joint_counts
from bae_fast.progress import tracked

CLASSES = ("same", "subset", "superset", "unmatched", "rare", "dead")
SCORES = ("jaccard", "phi")

# rows that containment by chance must be expected to leave outside: all inside has p < e^-5
_LEAST_OUTSIDE = 5


@dataclasses.dataclass(frozen=True)
class Matching:
    """Best partners and classes of the features of two codes.

    Attributes:
        partner_a, partner_b: int64 ``[F_a]``, ``[F_b]``: the feature of the other code with the
            highest score, the lowest number of equals; -1 where none is on with it.
        score_a, score_b: float64, that score; 0 without a partner.
        class_a, class_b: int64, places in ``CLASSES``.
        n_rows: N.
        score: "jaccard" or "phi".
        threshold, min_count: those that the call was given.
    """

    partner_a: Tensor
    partner_b: Tensor
    score_a: Tensor
    score_b: Tensor
    class_a: Tensor
    class_b: Tensor
    n_rows: int
    score: str
    threshold: float
    min_count: int

    def summary(self) -> dict[str, Any]:
        """Counts of the classes and the mean best score of the others, for JSON."""
        found: dict[str, Any] = {}
        for side, classes, score in (
            ("a", self.class_a, self.score_a),
            ("b", self.class_b, self.score_b),
        ):
            counts = torch.bincount(classes, minlength=len(CLASSES)).tolist()
            judged = classes < CLASSES.index("rare")
            found[side] = dict(zip(CLASSES, counts, strict=True)) | {
                "features": len(classes),
                "mean_score": float(score[judged].mean()) if bool(judged.any()) else None,
            }
        return found


def _scores(joint: Tensor, n_i: Tensor, n_j: Tensor, n: int, score: str) -> Tensor:
    """float64, of float64 counts; 0 where undefined."""
    if score == "jaccard":
        union = n_i[:, None] + n_j - joint
        return torch.where(union > 0, joint / union, 0.0)
    spread = (n_i * (n - n_i)).sqrt()[:, None] * (n_j * (n - n_j)).sqrt()
    return torch.where(spread > 0, (n * joint - n_i[:, None] * n_j) / spread, 0.0)


def _containment(joint: Tensor, inner: Tensor, outer: Tensor, n: int) -> Tensor:
    """How far the ``inner`` rows lie in the ``outer`` ones, beyond chance; 0 where not counted."""
    chance = outer / n
    share = joint / inner.clamp_min(1)
    counts = inner * (1 - chance) >= _LEAST_OUTSIDE
    return torch.where(counts, (share - chance) / (1 - chance), 0.0)


@torch.no_grad()
def match_codes(
    a: BinaryCode,
    b: BinaryCode,
    *,
    threshold: float = 0.5,
    score: str = "jaccard",
    min_count: int = 10,
) -> Matching:
    """Match the columns of two codes of the same rows.

    Memory beyond the codes: a block of 256 x F_b counts and scores.

    Args:
        a, b: ``[..., F_a]`` and ``[..., F_b]``, as many rows, fewer than 2^24, no row mask.
        threshold: t above, in (0, 1].
        score: what the best partner has most of, one of ``SCORES``.
        min_count: rows below which a feature is rare.

    Raises:
        ValueError: codes of unequal rows, with a row mask or without rows, or an argument out of
            range.
    """
    if a.row_mask is not None or b.row_mask is not None:
        raise ValueError("a and b must have no row_mask: index the kept rows first")
    a, b = a.flatten(), b.flatten()
    n = a.shape[0]
    if n != b.shape[0] or not 1 <= n < 2**24:
        raise ValueError(
            f"a and b must have equally many rows, 1 to 2^24 - 1; got {n} and {b.shape[0]}"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1]; got {threshold!r}")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    check_int("min_count", min_count, 1)
    n_a, n_b = a.counts().double(), b.counts().double()
    f_a, f_b = a.n_columns, b.n_columns
    partner_a = torch.full((f_a,), -1, device=a.device)
    partner_b = torch.full((f_b,), -1, device=a.device)
    score_a, score_b = torch.zeros_like(n_a), torch.zeros_like(n_b)
    in_other = [torch.zeros_like(n_a), torch.zeros_like(n_b)]
    holds_other = [torch.zeros_like(n_a), torch.zeros_like(n_b)]
    columns_b = torch.arange(f_b, device=a.device)
    common = (n_a >= min_count, n_b >= min_count)
    for top in tracked(range(0, f_a, COLUMN_BLOCK), f_a, "features", by=COLUMN_BLOCK):
        ids = torch.arange(top, min(top + COLUMN_BLOCK, f_a), device=a.device)
        joint = joint_counts(a, ids, b, columns_b).double()
        block = _scores(joint, n_a[ids], n_b, n, score)
        best, at = block.max(1)
        partner_a[ids] = torch.where(best > 0, at, -1)
        score_a[ids] = best.clamp_min(0)
        best, at = block.max(0)
        better = best > score_b  # of equals the first block's, so the lowest number
        partner_b = torch.where(better, ids[at], partner_b)
        score_b = torch.where(better, best, score_b)
        # what is contained, and what contains, is common enough to tell
        both = common[0][ids][:, None] & common[1]
        held = torch.where(both, _containment(joint, n_a[ids][:, None], n_b, n), 0.0)
        in_other[0][ids] = held.amax(1)
        holds_other[1] = torch.maximum(holds_other[1], held.amax(0))
        held = torch.where(both, _containment(joint, n_b, n_a[ids][:, None], n), 0.0)
        in_other[1] = torch.maximum(in_other[1], held.amax(0))
        holds_other[0][ids] = held.amax(1)
    jaccard_a, mutual_a = _mutual(a, b, n_a, n_b, partner_a, partner_b)
    jaccard_b, mutual_b = _mutual(b, a, n_b, n_a, partner_b, partner_a)
    classes = [
        _classes(counts, mutual & (jaccard >= threshold), inner, outer, threshold, min_count)
        for counts, jaccard, mutual, inner, outer in (
            (n_a, jaccard_a, mutual_a, in_other[0], holds_other[0]),
            (n_b, jaccard_b, mutual_b, in_other[1], holds_other[1]),
        )
    ]
    return Matching(
        partner_a.cpu(), partner_b.cpu(), score_a.cpu(), score_b.cpu(),
        classes[0].cpu(), classes[1].cpu(), n, score, threshold, min_count,
    )  # fmt: skip


def _mutual(
    a: BinaryCode, b: BinaryCode, n_a: Tensor, n_b: Tensor, partner: Tensor, back: Tensor
) -> tuple[Tensor, Tensor]:
    """Jaccard index with the partner, and whether the partner's partner is the feature itself."""
    has = partner >= 0
    at = partner.clamp_min(0)
    mutual = has & (back[at] == torch.arange(len(partner), device=partner.device))
    jaccard = torch.zeros_like(n_a)
    ids = mutual.nonzero()[:, 0]
    both = torch.zeros_like(n_a)
    for top in range(0, a.shape[0], 4096):
        left = a[top : top + 4096].to_dense()[:, ids]
        right = b[top : top + 4096].to_dense()[:, at[ids]]
        both[ids] += (left & right).sum(0)
    jaccard[ids] = both[ids] / (n_a[ids] + n_b[at[ids]] - both[ids])
    return jaccard, mutual


def _classes(
    counts: Tensor,
    same: Tensor,
    inner: Tensor,
    outer: Tensor,
    threshold: float,
    min_count: int,
) -> Tensor:
    found = torch.full_like(counts, CLASSES.index("unmatched"), dtype=torch.int64)
    found[outer >= threshold] = CLASSES.index("superset")
    found[inner >= threshold] = CLASSES.index("subset")
    found[same] = CLASSES.index("same")
    found[counts < min_count] = CLASSES.index("rare")
    found[counts == 0] = CLASSES.index("dead")
    return found


def shuffled_rows(code: BinaryCode, seed: int = 0) -> BinaryCode:
    """The same rows in another order, ``[N, K]``: what matches by chance alone."""
    rows = code.flatten()
    order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
    return rows[order]
