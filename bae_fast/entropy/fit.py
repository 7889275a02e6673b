"""An autoencoder fitted so that the entropy of rows can be read off its code."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.metrics import fvu
from bae_fast.codes import BinaryCode
from bae_fast.entropy.components import init_from_components_, rank
from bae_fast.entropy.estimate import estimate_entropy
from bae_fast.entropy.synthetic import SyntheticSpec
from bae_fast.model import BinaryAutoencoder
from bae_fast.training import PRESETS, Trainer, TrainingConfig

# The error that one of r fair bits explains is 1 / r of the variance: the price of a bit must stay
# far below it, here for r up to a thousand. Revival finds what components miss of dependent bits;
# it ends early, so that what was revived for nothing dies again. Chosen on 32 fair bits and 32
# copies in 64 dimensions, seed 0.
TRAINING = dataclasses.replace(
    PRESETS["sparse"],
    steps=600,
    lr=1e-2,
    decay_from=0.5,
    entropy_weight=3e-4,
    init="none",
    revive_until=0.6,
    refit=False,
    precision="float32",
)

# The paper's way, from random directions: found to need a high learning rate for long.
RANDOM_START = dataclasses.replace(
    TRAINING, steps=1500, lr=2e-2, decay_from=0.7, init="rows", density=0.5, revive_every=0
)

STARTS = {"components": TRAINING, "random": RANDOM_START}

# fair bits are on half of the time: the surrogate reaches further than for rare ones
SURROGATE_WIDTH = 1.0


def _of_start(start: str) -> TrainingConfig:
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}; got {start!r}")
    return STARTS[start]


def fit_bae(
    rows: Tensor,
    d_sae: int,
    config: TrainingConfig,
    *,
    start: str = "components",
    surrogate_width: float = SURROGATE_WIDTH,
) -> BinaryAutoencoder:
    """Train a Binary Autoencoder on rows, from independent components or from random directions.

    Args:
        rows: raw ``[n, d]``, any floating dtype; trained on in float32.
        start: "components" (see :func:`init_from_components_`; ``config.init`` should be "none")
            or "random" (``config.init`` decides).

    Raises:
        ValueError: an unknown start.
    """
    _of_start(start)
    rows = rows.float()
    torch.manual_seed(config.seed)
    bae = BinaryAutoencoder(rows.shape[1], d_sae, surrogate_width=surrogate_width)
    bae.fit_normalization_(rows)
    if start == "components":
        init_from_components_(
            bae,
            rows,
            density=config.density,
            decoder_norm=0.5,
            generator=torch.Generator().manual_seed(config.seed),
        )
    Trainer(bae, rows, config).fit()
    return bae


@torch.no_grad()
def measure(bae: BinaryAutoencoder, rows: Tensor) -> dict[str, Any]:
    """FVU and the entropy estimates of the code of rows ``[n, d]``, for JSON."""
    rows = rows.to(bae.W_enc.dtype)
    code = bae.encode(rows)
    return {"fvu": fvu(rows, bae.decode(code)), **estimate_entropy(code).summary()}


def run_synthetic(
    spec: SyntheticSpec,
    *,
    expansion: int,
    seed: int,
    n_train: int,
    n_heldout: int,
    start: str = "components",
    steps: int | None = None,
) -> dict[str, Any]:
    """One set of known entropy: the truth, the estimate on held-out rows, and what bounds it.

    The code has ``expansion`` features for each dimension that the rows span, at least 8.

    Returns:
        ``joint_bits`` and ``marginal_bits`` of the definition, ``estimate`` (see :func:`measure`),
        and ``of_true_bits``, the same estimator given c itself in place of a code.
    """
    config = dataclasses.replace(_of_start(start), seed=seed)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    x, bits = spec.sample(n_train + n_heldout, seed)
    spanned = rank(x[: min(n_train, max(2 * spec.d, 1024))])
    bae = fit_bae(x[:n_train], max(expansion * spanned, 8), config, start=start)
    return {
        "joint_bits": spec.joint_bits,
        "marginal_bits": spec.marginal_bits,
        "d_sae": bae.config.d_sae,
        "estimate": measure(bae, x[n_train:]),
        "of_true_bits": estimate_entropy(BinaryCode.from_dense(bits[n_train:])).summary(),
    }
