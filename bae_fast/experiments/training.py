"""Options of a Binary Autoencoder's training, and the module that is trained."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bae_fast.autoencoder import seeded
from bae_fast.experiments.data import pick_device
from bae_fast.experiments.metric import check_metric, error_metric
from bae_fast.experiments.runs import ConfigError, check_at_least, check_one_of
from bae_fast.model import BinaryAutoencoder
from bae_fast.ops.registry import Request, check_impl, reasons_against
from bae_fast.progress import Stages
from bae_fast.training import PRESETS, Trainer, TrainingConfig

if TYPE_CHECKING:
    from bae_fast.lm import ActivationCache


@dataclasses.dataclass(frozen=True)
class Training:
    """How a Binary Autoencoder is trained; what is None is the preset's.

    Attributes:
        preset: The constants that hold where no option sets another: sparse is this package's
            recipe, paper the released program's.
        expansion: The number of features over the width of a row, F / d.
        d_sae: The number of features, F, in place of the expansion.
        metric: The unit in which each dimension's error is measured: none is the same for all,
            std the standard deviation, robust a scale that outliers do not move, sensitivity how
            little the language model's next token depends on the dimension, and fisher the same
            for all directions, a matrix. A power may follow, as in std^0.5.
        impl: The implementation of the layer; auto takes the fastest that runs here.
        steps: The number of optimizer steps.
        batch_size: The number of rows in a step.
        lr: The learning rate of Adam.
        betas: The two decay rates of Adam.
        eps: The epsilon of Adam.
        decoder_lr_scale: The decoder's learning rate is the learning rate times this.
        decay_from: The learning rate falls to zero as a cosine after this share of the steps.
        entropy_weight: The weight of the code's entropy in the loss, a_e.
        covariance_weight: The weight of the covariance of the bits in the loss, a_c.
        entropy_from: The entropy has no weight before this share of the steps.
        init: How features start: rows is along rows of the data, density is at random with a
            given share of ones, none leaves the module as it is.
        density: The share of ones at the start, up to the width of wide_from.
        wide_from: The number of features a dimension, F / d, beyond which the density and both
            shares of the revival fall as 1 / F, so that a row starts with no more ones than there;
            0 keeps them for every width.
        decoder_norm: The norm of the decoder's rows at the start, for init rows.
        bank_batches: The number of past batches that are counted together with each batch.
        multilinear: Bits get exact differences of the error instead of slopes.
        revive_every: Dead features are revived every so many steps; 0 revives none.
        revive_until: Revival ends after this share of the steps.
        dead_below: A feature is dead if it was on in less than this share of the rows.
        revive_quantile: Revived features fire on rows whose error lies above this quantile.
        revive_decoder_scale: The norm of a revived feature's decoder row, in usual norms.
        refit: The decoder is replaced by its least-squares optimum at the end.
        precision: The precision of the products; auto is bfloat16 where it is native.
        seed: The seed of every random draw.
        warmup_steps: The learning rate rises from zero over so many steps.
        clip_norm: The largest norm of the gradients, to which longer ones are shortened; 0 is none.
    """

    preset: Literal["sparse", "paper"] = "sparse"
    expansion: int = 4
    d_sae: int | None = None
    metric: str = "none"
    impl: str = "auto"
    steps: int = 2000
    batch_size: int | None = None
    lr: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    decoder_lr_scale: float | None = None
    decay_from: float | None = None
    entropy_weight: float | None = None
    covariance_weight: float | None = None
    entropy_from: float | None = None
    init: Literal["rows", "density", "none"] | None = None
    density: float | None = None
    wide_from: float | None = None
    decoder_norm: float | None = None
    bank_batches: int | None = None
    multilinear: bool | None = None
    revive_every: int | None = None
    revive_until: float | None = None
    dead_below: float | None = None
    revive_quantile: float | None = None
    revive_decoder_scale: float | None = None
    refit: bool | None = None
    precision: Literal["auto", "bfloat16", "float32"] | None = None
    seed: int = 0
    warmup_steps: int | None = None
    clip_norm: float | None = None


def training_config(config: Training) -> TrainingConfig:
    """The preset's constants with what the configuration overrides.

    Raises:
        ValueError: naming the field.
    """
    check_one_of("preset", config.preset, PRESETS)
    # how a step is started is no option of a command until a device has shown it
    names = {field.name for field in dataclasses.fields(TrainingConfig)} - {"cuda_graph"}
    values = {name: getattr(config, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    if isinstance(config.betas, list):  # of a file of jobs
        given["betas"] = tuple(config.betas)
    return dataclasses.replace(PRESETS[config.preset], **given)


def check(config: Any) -> TrainingConfig:
    """Find what would fail later, before anything slow has run.

    Args:
        config: a :class:`Training` with a device.

    Raises:
        ValueError: naming the field.
    """
    constants = training_config(config)
    check_at_least(config, 1, "expansion")
    if config.d_sae is not None:
        check_at_least(config, 1, "d_sae")
    check_metric(config)
    device = torch.device(pick_device(config))
    impl = check_impl(config.impl)
    if impl not in ("auto", "reference"):
        reasons = reasons_against(impl, Request(device.type, torch.float32))
        if reasons:
            raise ConfigError("impl", f"{impl} cannot run here: {'; '.join(reasons)}")
    return constants


def features_of(config: Training, d_in: int) -> int:
    """The number of features, F, for rows of a width."""
    return config.expansion * d_in if config.d_sae is None else config.d_sae


def new_autoencoder(
    config: Any,
    rows: Tensor,
    metadata: dict[str, Any],
    stages: Stages,
    cache: ActivationCache | None = None,
) -> BinaryAutoencoder:
    """A module with a :class:`Training`'s random weights, normalised for the rows.

    Args:
        rows: those that are trained on, the first of the cache's.
        cache: the harvest that they are of; None for rows of a file.
    """
    metric = error_metric(config, rows, stages, cache, len(rows) - 1)
    d_in, device = rows.shape[1], pick_device(config)
    with seeded(config.seed, device):
        bae = BinaryAutoencoder(
            d_in,
            features_of(config, d_in),
            preset=config.preset,
            impl=config.impl,
            metadata=metadata,
            device=device,
        )
    return bae.fit_normalization_(rows, metric=metric)


def estimate_seconds(trainer: Trainer) -> float:
    """About how many seconds training will take, from a few passes over real rows."""
    bae: Any = trainer.model
    config = trainer.config
    rows = trainer.rows[: config.batch_size].to(trainer.device)
    rows = rows if trainer.bfloat16 else rows.to(bae.W_enc.dtype)
    times = []
    bae.train()
    for _ in range(4):
        start = time.perf_counter()
        with trainer.autocast():
            out = bae(
                rows,
                covariance=config.covariance_weight > 0,
                multilinear=config.multilinear,
            )
            loss = bae.mse(out, rows)
        loss.backward()
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    bae.zero_grad(set_to_none=True)
    return min(times) * config.steps * 1.25  # the optimizer and the bookkeeping
