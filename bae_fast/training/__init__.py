"""Training an autoencoder on rows of hidden states."""

from bae_fast.training.bank import CodeBank
from bae_fast.training.recipe import init_from_rows_, refit_decoder_, revive_
from bae_fast.training.trainer import PRESETS, Trainable, Trainer, TrainingConfig

__all__ = [
    "PRESETS",
    "CodeBank",
    "Trainable",
    "Trainer",
    "TrainingConfig",
    "init_from_rows_",
    "refit_decoder_",
    "revive_",
]
