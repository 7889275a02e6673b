"""An autoencoder fitted so that the entropy of rows can be read off its code."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.metrics import fvu
from bae_fast.arguments import all_finite
from bae_fast.autoencoder import seeded
from bae_fast.codes import BinaryCode
from bae_fast.entropy.components import init_from_components_, rank
from bae_fast.entropy.estimate import EntropyEstimate, estimate_entropy
from bae_fast.entropy.synthetic import SyntheticSpec
from bae_fast.model import BinaryAutoencoder
from bae_fast.normalization import check_rows
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
    wide_from=0.0,
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
    progress: bool = False,
) -> BinaryAutoencoder:
    """Train a Binary Autoencoder on rows, from independent components or from random directions.

    Args:
        rows: raw ``[n, d]``, any floating dtype; trained on in float32.
        d_sae: number of features.
        config: the constants of the training; :data:`STARTS` has those of either start.
        start: "components" (see :func:`init_from_components_`; ``config.init`` should be "none")
            or "random" (``config.init`` decides).
        progress: show how far the training is.

    Raises:
        ValueError: an unknown start.
    """
    _of_start(start)
    rows = rows.float()
    with seeded(config.seed):
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
    Trainer(bae, rows, config).fit(progress=progress)
    return bae


def measure(bae: BinaryAutoencoder, rows: Tensor, *, bound: bool = False) -> dict[str, Any]:
    """FVU and the entropy estimates of the code of rows ``[n, d]``, for JSON.

    Args:
        bound: also give the bound of the autoregressive model.
    """
    rows = rows.to(bae.W_enc.dtype)
    with torch.no_grad():
        code = bae.encode(rows)
        error = fvu(rows, bae.decode(code))
    return {"fvu": error, **estimate_entropy(code, bound=bound).summary()}


@dataclasses.dataclass(frozen=True)
class RowsEntropy:
    """The entropy of rows, and the fit that it was read off.

    Attributes:
        bits: the tightest of the estimates of the chosen fit, in bits a row.
        fvu: FVU of held-out rows; where it is not near 0, the code does not tell their bits.
        d_sae: features of the chosen fit.
        estimate: all estimates, of held-out rows.
        model: the chosen fit.
    """

    bits: float
    fvu: float
    d_sae: int
    estimate: EntropyEstimate
    model: BinaryAutoencoder


# features over the dimensions that the rows span, of the fits that are made: too many loosen the
# bound, too few leave rows unexplained
EXPANSIONS = (1, 2)

# a fit is as good as the best if its FVU is above that one's by no more
_AS_GOOD = 0.005

_HELDOUT, _RANK_ROWS, _LEAST_ROWS, _LEAST_FEATURES = 4096, 16384, 40, 8


def rows_entropy(
    rows: Any,
    *,
    expansions: Sequence[int] = EXPANSIONS,
    config: TrainingConfig = TRAINING,
    heldout: int | None = None,
    progress: bool = False,
) -> RowsEntropy:
    """The entropy of rows of your own: the fits are chosen, made and compared here.

    One autoencoder is fitted from independent components for each expansion. Of those that explain
    the held-out rows as well as the best, the one with the lowest estimate is taken, as every
    estimate is an upper bound.

    Args:
        rows: ``[n, d]``, a NumPy array or a tensor of floating point, in random order, n >= 40.
        expansions: features over the dimensions that the rows span.
        config: the training's; a batch larger than the training rows becomes them.
        heldout: rows at the end that are not trained on but measured; None: a quarter of them, at
            most 4,096.
        progress: show how far each fit is.

    Raises:
        TypeError: rows that are neither, or not of floating point.
        ValueError: another shape, too few rows, numbers that are not finite, or no expansion.
    """
    if type(rows).__module__.partition(".")[0] == "numpy":
        rows = torch.from_numpy(rows)
    width = rows.shape[1] if isinstance(rows, Tensor) and rows.dim() == 2 else 1
    check_rows("rows", rows, width, least=_LEAST_ROWS)
    if not all_finite(rows):
        raise ValueError("rows must be finite; they hold NaN or Inf")
    if not expansions or min(expansions) < 1:
        raise ValueError(f"expansions must be integers of at least 1; got {list(expansions)}")
    if heldout is None:
        heldout = min(len(rows) // 4, _HELDOUT)
    if not 2 <= heldout <= len(rows) - 2:
        raise ValueError(f"heldout must lie in [2, {len(rows) - 2}]; got {heldout}")
    rows = rows.float()
    train, kept = rows[:-heldout], rows[-heldout:]
    config = dataclasses.replace(config, batch_size=min(config.batch_size, len(train)))
    spanned = rank(train[:_RANK_ROWS])
    found = []
    for d_sae in dict.fromkeys(max(e * spanned, _LEAST_FEATURES) for e in expansions):
        bae = fit_bae(train, d_sae, config, progress=progress).eval()
        with torch.no_grad():
            code = bae.encode(kept)
            estimate = estimate_entropy(code)
            found.append(
                RowsEntropy(estimate.chain, fvu(kept, bae.decode(code)), d_sae, estimate, bae)
            )
    best = min(one.fvu for one in found)
    return min((one for one in found if one.fvu <= best + _AS_GOOD), key=lambda one: one.bits)


def run_synthetic(
    spec: SyntheticSpec,
    *,
    expansion: int,
    seed: int,
    n_train: int,
    n_heldout: int,
    start: str = "components",
    steps: int | None = None,
    bound: bool = False,
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
        "estimate": measure(bae, x[n_train:], bound=bound),
        "of_true_bits": estimate_entropy(
            BinaryCode.from_dense(bits[n_train:]), bound=bound
        ).summary(),
    }
