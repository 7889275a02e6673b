"""Description length of a code under one coder for every method, what was learned paid for.

A coder is fitted to the codes of training rows and charged on those of held-out rows, so that bits
are a code length that somebody else would really need:

``columns``  each column on its own, -log2 of its share of ones or zeros.
``tree``     each column given the one it shares most with (Chow and Liu 1968), as
             :func:`bae_fast.compression.compress` has it.

A probability is estimated as (ones + 1/2) / (rows + 1) (Krichevsky and Trofimov 1981): what the
training rows never show costs much and not without end. The model itself takes 1/2 log2 N bits
for each probability and log2 K for each parent (Rissanen 1978), once for all rows. It is stated
apart, as its share of a row depends on how many rows there are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast.codes import BinaryCode
from bae_fast.pairs import (
    SAMPLE_PIECE,
    counts_with_parents,
    edges_that_pay,
    model_bits,
    sample_starts,
    tree_parents,
)

CODERS = ("columns", "tree")


@dataclasses.dataclass(frozen=True)
class DescriptionLength:
    """What a code costs under a coder.

    Attributes:
        bits: mean of the charged rows, bits a row.
        model_bits: bits of the coder's probabilities and edges, once for all rows.
        edges: columns that are coded given another.
        n_fitted, n_rows: rows that the coder was fitted to, and that were charged.
    """

    bits: float
    model_bits: float
    edges: int
    n_fitted: int
    n_rows: int

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def description_length(
    code: BinaryCode, coder: str = "tree", *, fitted_to: BinaryCode | None = None
) -> DescriptionLength:
    """Bits a row that a coder needs for which columns are on.

    Args:
        code: ``[..., K]``, the rows that are charged, without a row mask.
        coder: "tree" or "columns".
        fitted_to: ``[..., K]``, the rows that the coder is fitted to. Without them it is fitted to
            the rows that are charged: the length is then too short where rows are few.

    Raises:
        ValueError: another coder, a row mask, no rows, or codes of two widths.
    """
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {', '.join(CODERS)}; got {coder!r}")
    training = code if fitted_to is None else fitted_to
    for name, rows in (("code", code), ("fitted_to", training)):
        if rows.row_mask is not None:
            raise ValueError(f"{name} must have no row_mask: index the kept rows first")
        if not len(rows.flatten()):
            raise ValueError(f"{name} must hold at least one row; got {rows!r}")
    if training.n_columns != code.n_columns:
        raise ValueError(f"fitted_to must have {code.n_columns} columns; got {training.n_columns}")
    fit, charged = training.flatten(), code.flatten()
    n, m = len(fit), len(charged)
    counts, ones = fit.counts(), charged.counts()
    if coder == "tree" and n > 1:
        parents = tree_parents(_sample(fit, counts))
        parents = edges_that_pay(parents, counts, counts_with_parents(fit, parents), n)
    else:
        parents = torch.full_like(counts, -1)
    # rows and ones given that the parent is on; a root has no such rows
    has = parents >= 0
    at = parents.clamp_min(0)
    fit_on, fit_both = counts[at] * has, counts_with_parents(fit, parents) * has
    on, both = ones[at] * has, counts_with_parents(charged, parents) * has
    total = _cost(both, on, fit_both, fit_on).sum()
    total += _cost(ones - both, m - on, counts - fit_both, n - fit_on).sum()
    edges = int(has.sum())
    return DescriptionLength(
        bits=float(total) / m,
        model_bits=model_bits(code.n_columns, edges, n),
        edges=edges,
        n_fitted=n,
        n_rows=m,
    )


def _cost(ones: Tensor, rows: Tensor, fit_ones: Tensor, fit_rows: Tensor) -> Tensor:
    """Bits of so many ones among rows, by probabilities of other counts: float64 ``[K]``."""
    p = (fit_ones.double() + 0.5) / (fit_rows.double() + 1)
    return -(ones * p.log2() + (rows - ones) * (1 - p).log2())


def _sample(code: BinaryCode, counts: Tensor) -> BinaryCode:
    """Rows that are enough to find the tree by."""
    n = len(code)
    starts = sample_starts(n, int(((counts > 0) & (counts < n)).sum()))
    return BinaryCode.cat(code[start : start + SAMPLE_PIECE] for start in starts)
