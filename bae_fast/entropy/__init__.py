"""The entropy of a set of hidden states, read off a binary code of them."""

from __future__ import annotations

from bae_fast.entropy.autoregressive import AutoregressiveBound, autoregressive_bound
from bae_fast.entropy.components import independent_components, init_from_components_
from bae_fast.entropy.estimate import EntropyEstimate, estimate_entropy
from bae_fast.entropy.fit import RowsEntropy, fit_bae, measure, rows_entropy, run_synthetic
from bae_fast.entropy.synthetic import KINDS, SyntheticSpec

__all__ = [
    "KINDS",
    "AutoregressiveBound",
    "EntropyEstimate",
    "RowsEntropy",
    "SyntheticSpec",
    "autoregressive_bound",
    "estimate_entropy",
    "fit_bae",
    "independent_components",
    "init_from_components_",
    "measure",
    "rows_entropy",
    "run_synthetic",
]
