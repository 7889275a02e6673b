"""The entropy of a set of hidden states, read off its code.

Numbers in bits a row, each at least the entropy of the code but for sampling error:

``marginal``  sum_j H(b_j), the entropy that training minimises: exact for independent bits.
``tree``      sum_j H(b_j) - sum_{(i,j) in T} I(b_i; b_j), T the maximum spanning tree of the
              mutual information (Chow and Liu 1968): exact where dependence runs along a tree,
              copies of a bit included; never above ``marginal``.
``chain``     the tree with up to three columns to condition on in place of one (see
              :mod:`bae_fast.entropy.chain`): functions of two or three other bits come off too;
              never above ``tree``.
``bound``     held-out cross-entropy of a learned model of all columns (see
              :mod:`bae_fast.entropy.autoregressive`), where it is asked for: dependence of any
              order comes off as far as it was learned. Takes seconds to minutes.
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

from bae_fast.autoencoder import normal_quantile
from bae_fast.codes import BinaryCode
from bae_fast.entropy import chain
from bae_fast.entropy.autoregressive import autoregressive_bound
from bae_fast.pairs import (
    MAX_COLUMNS,
    edge_counts,
    mutual_information_,
    pair_counts,
    pair_information,
    spanning_tree,
    xlog2x,
)

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
        bound, bound_low, bound_high: held-out cross-entropy of the autoregressive model with its
            95 % interval; None where it was not asked for.
        shared: ``marginal`` less ``bound``, what the features tell about each other.
    """

    plugin: float
    marginal: float
    tree: float
    chain: float
    edges: int
    live: int
    n_rows: int
    bound: float | None = None
    bound_low: float | None = None
    bound_high: float | None = None
    shared: float | None = None

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON; those that were not asked for are left out."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}


def estimate_entropy(
    code: BinaryCode, *, bound: bool = False, documents: Tensor | None = None
) -> EntropyEstimate:
    """Entropy of the rows of a code: the sum of marginals, and corrected for dependence.

    Memory: 4 F'^2 bytes for F' live columns (at most 1 GiB) and a few hundred MiB.

    Args:
        code: ``[..., K]``, at least 2 rows, without a row mask.
        bound: fit the autoregressive model to five eighths of the rows and charge a quarter.
        documents: int64 ``[N]``, see :func:`bae_fast.entropy.autoregressive_bound`.

    Raises:
        TypeError: no code.
        ValueError: a row mask, fewer than 2 or at least 2^24 rows, or more than 16,384 columns
            that vary; for the bound see :func:`bae_fast.entropy.autoregressive_bound`.
    """
    if not isinstance(code, BinaryCode):
        raise TypeError(
            f"code must be a BinaryCode; got {type(code).__name__} (of rows, "
            "bae_fast.entropy.rows_entropy fits a code first)"
        )
    found = _from_counts(code)
    if not bound:
        return found
    learned = autoregressive_bound(code, documents=documents)
    return dataclasses.replace(
        found,
        bound=learned.bits,
        bound_low=learned.low,
        bound_high=learned.high,
        shared=found.marginal - learned.bits,
    )


@torch.no_grad()
def _from_counts(code: BinaryCode) -> EntropyEstimate:
    """All but the bound."""
    if code.row_mask is not None:
        raise ValueError("code must have no row_mask: index the kept rows first")
    rows = code.flatten()
    n = rows.shape[0]
    if not 2 <= n < 2**24:
        raise ValueError(f"code must have 2 to 2^24 - 1 rows; got {n}")
    every = rows.counts()
    columns = ((every > 0) & (every < n)).nonzero().flatten()
    live = len(columns)
    if live > MAX_COLUMNS:
        raise ValueError(
            f"code must have at most {MAX_COLUMNS} columns that vary, as their mutual "
            f"information is one matrix; got {live}"
        )
    plugin = rows.entropy().item()
    unit = 1 / (2 * n * math.log(2))
    counts = every[columns]
    p = counts.double() / n
    marginal = float((-xlog2x(p) - xlog2x(1 - p)).sum()) + live * unit
    if live < 2:
        return EntropyEstimate(plugin, marginal, marginal, marginal, 0, live, n)
    joint = pair_counts(rows, columns)
    mutual_information_(joint, counts, n)
    edges = spanning_tree(joint)
    order = torch.cat([edges[:1, 0], edges[:, 1]])
    among = chain.candidates(joint, order)
    del joint
    both = edge_counts(rows, columns[edges[:, 0]], columns[edges[:, 1]])
    information, outcomes = pair_information(counts[edges[:, 0]], counts[edges[:, 1]], both, n)
    quantile = normal_quantile(_FALSE_EDGE / (live * (live - 1)))
    least = quantile * quantile * unit
    counted = information > least
    # Miller-Madow: I = H_i + H_j - H_ij with (2 - 1) + (2 - 1) - (m_ij - 1) terms
    corrected = information + (3 - outcomes) * unit
    tree = marginal - float(corrected[counted].sum())
    # every column but the first given its neighbour in the tree, where that edge counts
    given = torch.stack([-xlog2x(p) - xlog2x(1 - p), torch.ones_like(p)])
    given[:, edges[:, 1]] -= torch.stack([information, (3 - outcomes).double()]) * counted
    has_parent = torch.zeros(live, dtype=torch.bool, device=code.device)
    has_parent[edges[:, 1]] = counted
    saved = chain.savings(rows, columns, among, has_parent, given, _FALSE_EDGE)
    return EntropyEstimate(
        plugin, marginal, tree, tree - float(saved.sum()), int(counted.sum()), live, n
    )
