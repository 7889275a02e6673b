"""The field's sparse autoencoders, trained by the same loop and judged by the same metrics."""

from __future__ import annotations

from bae_fast.autoencoder import load_autoencoder
from bae_fast.baselines.base import (
    METHODS,
    SAEConfig,
    SAEOutput,
    SparseAutoencoder,
    make_baseline,
    register_method,
)
from bae_fast.baselines.methods import AUXK_WEIGHT
from bae_fast.baselines.pursuit import PursuedAutoencoder
from bae_fast.training import SparseConfig

# what Trainer is given for a baseline: Adam as the methods' papers have it
TRAINING = SparseConfig()

__all__ = [
    "AUXK_WEIGHT",
    "METHODS",
    "TRAINING",
    "PursuedAutoencoder",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "load_autoencoder",
    "make_baseline",
    "register_method",
]
