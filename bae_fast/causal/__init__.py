"""An autoencoder inside a running model: what it costs, what its features cause."""

from __future__ import annotations

from bae_fast.causal.splice import Splice, active_code, features, replaced_output, spliced
from bae_fast.causal.substitution import (
    Divergence,
    FeatureEffect,
    Substitution,
    SubstitutionTest,
    divergence,
)

__all__ = [
    "Divergence",
    "FeatureEffect",
    "Splice",
    "Substitution",
    "SubstitutionTest",
    "active_code",
    "divergence",
    "features",
    "replaced_output",
    "spliced",
]
