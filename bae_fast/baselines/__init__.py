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
from bae_fast.training import TrainingConfig

# what Trainer is given for a baseline: Adam as the methods' papers have it, and nothing of the
# Binary Autoencoder's objective
TRAINING = TrainingConfig(
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    decoder_lr_scale=1.0,
    entropy_weight=0.0,
    init="none",
    bank_batches=0,
    multilinear=False,
    revive_every=0,
    refit=False,
)

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
