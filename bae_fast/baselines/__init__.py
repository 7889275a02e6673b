"""The field's sparse autoencoders, trained by the same loop and judged by the same metrics."""

from __future__ import annotations

from bae_fast.baselines.evaluation import SparseEvaluation, evaluate_baseline
from bae_fast.baselines.model import (
    METHODS,
    SAEConfig,
    SAEOutput,
    SparseAutoencoder,
    load_autoencoder,
    make_baseline,
)
from bae_fast.training import SparseConfig

# what Trainer is given for a baseline: Adam as the methods' papers have it
TRAINING = SparseConfig()

__all__ = [
    "METHODS",
    "TRAINING",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "SparseEvaluation",
    "evaluate_baseline",
    "load_autoencoder",
    "make_baseline",
]
