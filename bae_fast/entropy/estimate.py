"""The entropy of a set of hidden states, read off its code.

Four numbers, each at least the entropy of the code but for sampling error:

``marginal``  sum_j H(b_j), the entropy that training minimises: exact for independent bits.
``tree``      sum_j H(b_j) - sum_{(i,j) in T} I(b_i; b_j), T the maximum spanning tree of the
              mutual information (Chow and Liu 1968): exact where dependence runs along a tree,
              copies of a bit included; never above ``marginal``.
``chain``     the tree with up to three columns to condition on in place of one (see
              :mod:`bae_fast.entropy.chain`): functions of two or three other bits come off too;
              never above ``tree``.
``plugin``    the same sum as ``marginal`` without the correction below.

Sampling. A plug-in entropy of N rows is low by about (m - 1) / (2 N ln 2) bits for m outcomes
that occur (Miller and Madow 1955); ``marginal`` and the entropies inside ``tree`` and ``chain``
have that added, so mutual information is lowered by one such term where all four outcomes occur.
The largest of F^2 / 2 mutual informations of independent bits is not small either: an edge counts
only if 2 N ln 2 I exceeds the quantile of chi^2 with one degree of freedom at which one of all
pairs would pass by chance in 1 % of sets; pairs and triples in ``chain`` likewise. Rare outcomes
that no row shows are beyond both corrections.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.analysis.pairs import COLUMN_BLOCK, ROW_BLOCK, pair_counts
from bae_fast.codes import BinaryCode
from bae_fast.entropy import chain
from bae_fast.entropy.chain import xlog2x as _xlog2x

# the mutual information is held as one float32 matrix: 1 GiB at this width
MAX_FEATURES = 16384

# chance that a set of independent bits gets any edge
_FALSE_EDGE = 0.01


@dataclasses.dataclass(frozen=True)
class EntropyEstimate:
    """Entropy of a code in bits a row.

    Attributes:
        plugin: sum of the columns' entropies, as :meth:`BinaryCode.entropy`.
        marginal: the same with the Miller-Madow term.
        tree: ``marginal`` less the mutual information along the edges.
        chain: ``tree`` less what two or three columns tell beyond one.
        edges: how many edges count.
        live: columns that are neither always off nor always on.
        n_rows: N.
    """

    plugin: float
    marginal: float
    tree: float
    chain: float
    edges: int
    live: int
    n_rows: int

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return dataclasses.asdict(self)


def _mutual_information_(joint: Tensor, counts: Tensor, n: int) -> None:
    """Replace the counts n_ij by I(b_i; b_j) in bits, block by block; -inf on the diagonal."""
    p = (counts.double() / n).float()
    own = -_xlog2x(p) - _xlog2x(1 - p)
    for block, p_i, own_i in zip(
        joint.split(COLUMN_BLOCK), p.split(COLUMN_BLOCK), own.split(COLUMN_BLOCK), strict=True
    ):
        both = block / n
        only_i = (p_i[:, None] - both).clamp_min(0)
        only_j = (p - both).clamp_min(0)
        neither = (1 - both - only_i - only_j).clamp_min(0)
        block.copy_(own_i[:, None] + own)
        for share in (both, only_i, only_j, neither):
            block += _xlog2x(share)
    joint.fill_diagonal_(-torch.inf)


def _spanning_tree(weights: Tensor) -> Tensor:
    """Edges of the maximum spanning tree of a symmetric matrix (Prim): int64 ``[k - 1, 2]``."""
    k = len(weights)
    best, parent = weights[0].clone(), torch.zeros(k, dtype=torch.int64, device=weights.device)
    outside = torch.ones(k, dtype=torch.bool, device=weights.device)
    outside[0] = False
    edges = torch.empty(k - 1, 2, dtype=torch.int64, device=weights.device)
    for i in range(k - 1):
        new = torch.where(outside, best, -torch.inf).argmax()
        edges[i, 0], edges[i, 1] = parent[new], new
        outside[new] = False
        closer = weights[new] > best
        best = torch.where(closer, weights[new], best)
        parent = torch.where(closer, new, parent)
    return edges


def _exact_information(
    code: BinaryCode, columns: Tensor, edges: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Mutual information of each edge, and outcomes that occur: float64 and int64 ``[k - 1]``."""
    rows = code.flatten()
    n = rows.shape[0]
    both = torch.zeros(len(edges), dtype=torch.int64, device=code.device)
    left, right = columns[edges[:, 0]], columns[edges[:, 1]]
    for start in range(0, n, ROW_BLOCK):
        words = rows.words[start : start + ROW_BLOCK]
        dense = packing.unpack_rows(words, code.n_columns)
        both += (dense[:, left] & dense[:, right]).sum(0)
    n_i, n_j = counts[edges[:, 0]], counts[edges[:, 1]]
    cells = torch.stack([both, n_i - both, n_j - both, n - n_i - n_j + both])
    p_i, p_j = n_i.double() / n, n_j.double() / n
    own = -_xlog2x(p_i) - _xlog2x(1 - p_i) - _xlog2x(p_j) - _xlog2x(1 - p_j)
    return own + _xlog2x(cells.double() / n).sum(0), (cells > 0).sum(0)


@torch.no_grad()
def estimate_entropy(code: BinaryCode) -> EntropyEstimate:
    """Entropy of the rows of a code: the sum of marginals, and corrected for dependence.

    Memory: 4 F'^2 bytes for F' live columns (at most 1 GiB) and a few hundred MiB.

    Args:
        code: ``[..., K]``, at least 2 rows, without a row mask.

    Raises:
        TypeError: no code.
        ValueError: a row mask, fewer than 2 or at least 2^24 rows, or more than 16,384 columns
            that vary.
    """
    if not isinstance(code, BinaryCode):
        raise TypeError(
            f"code must be a BinaryCode; got {type(code).__name__} (of rows, "
            "bae_fast.entropy.rows_entropy fits a code first)"
        )
    if code.row_mask is not None:
        raise ValueError("code must have no row_mask: index the kept rows first")
    rows = code.flatten()
    n = rows.shape[0]
    if not 2 <= n < 2**24:
        raise ValueError(f"code must have 2 to 2^24 - 1 rows; got {n}")
    every = rows.counts()
    columns = ((every > 0) & (every < n)).nonzero().flatten()
    live = len(columns)
    if live > MAX_FEATURES:
        raise ValueError(
            f"code must have at most {MAX_FEATURES} columns that vary, as their mutual "
            f"information is one matrix; got {live}"
        )
    plugin = rows.entropy().item()
    unit = 1 / (2 * n * math.log(2))
    counts = every[columns]
    p = counts.double() / n
    marginal = float((-_xlog2x(p) - _xlog2x(1 - p)).sum()) + live * unit
    if live < 2:
        return EntropyEstimate(plugin, marginal, marginal, marginal, 0, live, n)
    joint = pair_counts(rows, columns)
    _mutual_information_(joint, counts, n)
    edges = _spanning_tree(joint)
    order = torch.cat([edges[:1, 0], edges[:, 1]])
    among = chain.candidates(joint, order)
    del joint
    information, outcomes = _exact_information(rows, columns, edges, counts)
    tail = torch.tensor(_FALSE_EDGE / (live * (live - 1)), dtype=torch.float64)
    least = float(torch.special.ndtri(tail).square()) * unit
    counted = information > least
    # Miller-Madow: I = H_i + H_j - H_ij with (2 - 1) + (2 - 1) - (m_ij - 1) terms
    corrected = information + (3 - outcomes) * unit
    tree = marginal - float(corrected[counted].sum())
    # every column but the first given its neighbour in the tree, where that edge counts
    given = torch.stack([-_xlog2x(p) - _xlog2x(1 - p), torch.ones_like(p)])
    given[:, edges[:, 1]] -= torch.stack([information, (3 - outcomes).double()]) * counted
    has_parent = torch.zeros(live, dtype=torch.bool, device=code.device)
    has_parent[edges[:, 1]] = counted
    saved = chain.savings(rows, columns, among, has_parent, given, _FALSE_EDGE)
    return EntropyEstimate(
        plugin, marginal, tree, tree - float(saved.sum()), int(counted.sum()), live, n
    )
