"""The constants of a training run: those of the loop, and those of each objective beside them.

A configuration also makes the objective it belongs to, so the trainer asks nobody's type.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

from bae_fast.training.recipe import MAX_REFIT_FEATURES

if TYPE_CHECKING:
    from typing_extensions import Self

    from bae_fast.autoencoder import Autoencoder
    from bae_fast.training.objective import Objective

PRECISIONS = ("auto", "bfloat16", "float32")
STARTS = ("rows", "density", "none")

# constants that settings leave out where they are off: a result, or a state, from before there was
# such a constant stays recognised
LEFT_OUT_WHERE_OFF: dict[str, float] = {"warmup_steps": 0, "clip_norm": 0.0}

# features a dimension beyond which a dictionary is wide, see TrainingConfig
WIDE_FROM = 16.0


def check_integers(config: object, least: dict[str, int]) -> None:
    """Raise ValueError unless each named constant is an int of at least its bound, below 2^63."""
    for name, bound in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an int; got {value!r}")
        if value < bound:
            raise ValueError(f"{name} must be at least {bound}; got {value}")
        if value >= 2**63:
            raise ValueError(f"{name} must be below 2^63; got {value}")


def check_bounds(config: object, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError unless each named constant is a finite number between its bounds."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and low <= value <= min(high, sys.float_info.max)):
            if high == math.inf:
                raise ValueError(f"{name} must be finite and not negative; got {value!r}")
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {value!r}")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The constants of the loop, which every objective shares.

    Attributes:
        steps: optimizer steps.
        batch_size: rows a step, N.
        lr, betas, eps: learning rate, decay rates and epsilon of Adam.
        decoder_lr_scale: the learning rate of W_dec is lr times this.
        decay_from: share of the steps after which the learning rate falls to zero as a cosine;
            1 keeps it constant.
        precision: "bfloat16" (autocast), "float32", or "auto" (bfloat16 where it is native).
        seed: the seed of the draws of rows, of the start and of the revival.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        clip_norm: the largest norm of all gradients together, to which a longer one is shortened;
            0: no limit.
        cuda_graph: replay each step from a CUDA graph (:class:`bae_fast.training.CapturedStep`).
            Where the device, the backend or another constant does not allow it, the trainer warns
            with the reason and runs steps as they are. Learning rates are then float32. Not run on
            a device yet, and off unless it is asked for.

    Raises:
        ValueError: a constant of another type or out of its range.
    """

    steps: int = 2000
    batch_size: int = 512
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoder_lr_scale: float = 1.0
    decay_from: float = 0.2
    precision: str = "auto"
    seed: int = 0
    warmup_steps: int = 0
    clip_norm: float = 0.0
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        check_integers(self, {"steps": 1, "batch_size": 1, "seed": 0, "warmup_steps": 0})
        positive = (0.0, math.inf)
        check_bounds(
            self,
            {"lr": positive, "eps": positive, "decoder_lr_scale": positive,
             "decay_from": (0.0, 1.0), "clip_norm": positive},
        )  # fmt: skip
        if not isinstance(self.cuda_graph, bool):
            raise ValueError(f"cuda_graph must be a bool; got {self.cuda_graph!r}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive; got {self.lr}")
        try:
            whole = len(self.betas) == 2 and all(0 <= float(beta) < 1 for beta in self.betas)
        except (TypeError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"betas must be two numbers in [0, 1); got {self.betas!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be auto, bfloat16 or float32; got {self.precision!r}")

    def for_sizes(self, d_in: int, d_sae: int) -> Self:
        """The constants that hold for rows of that width and that many features."""
        return self

    def going_on(self) -> Self:
        """The constants of the same objective for a module that it has trained: what belongs to a
        start or to an end is off."""
        return self

    def objective(self, model: Autoencoder) -> Objective:
        """The objective that these constants belong to, for a module.

        Raises:
            TypeError: the module lacks what the objective needs.
            ValueError: a constant that does not fit the module.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The constants as JSON values: what tells this run from another in files of results."""
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        del values["cuda_graph"]  # how a step is started, not what it computes
        for name, off in LEFT_OUT_WHERE_OFF.items():
            if values[name] == off:
                del values[name]
        return values


@dataclasses.dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """The constants of a Binary Autoencoder's training run.

    The loss is mse (mean over rows and dimensions, normalised units) + a_e H + a_c D.

    Attributes:
        steps, batch_size, lr, betas, eps, decoder_lr_scale, decay_from, precision, seed,
            warmup_steps, clip_norm, cuda_graph: see :class:`LoopConfig`.
        entropy_weight, covariance_weight: a_e and a_c.
        entropy_from: share of the steps before which a_e is zero (step schedule).
        init: "rows" (features start along rows of the data), "density" (random weights, bits on
            in ``density`` of the rows) or "none" (as the module is).
        density: share of ones at the start, for up to ``wide_from`` d features.
        wide_from: features a dimension, F / d, beyond which a dictionary is wide. The shares of
            rows that belong to one feature (``density``, ``dead_below`` and
            1 - ``revive_quantile``) are then multiplied by ``wide_from`` d / F, so that a row
            starts with as many ones as at F = ``wide_from`` d, by default 0.32 d; see
            :meth:`for_sizes`. 0: they hold for any F.
        decoder_norm: norm of the decoder's rows at the start, for ``init="rows"``.
        bank_batches: past batches counted together with each batch by the entropy and the
            covariance.
        multilinear: pass exact differences of the error to the bits instead of slopes, see
            :func:`bae_fast.binary_autoencoder`.
        revive_every: steps between revivals of dead features (0: never), until
            ``revive_until`` of the steps.
        dead_below: a feature is dead if fewer than this share of rows had it since last time.
        revive_quantile, revive_decoder_scale: see :func:`bae_fast.training.revive_`.
        refit: replace the decoder by its least-squares optimum at the end. After 2,000 steps of
            the demo it lowers the FVU by 0.0003, after 200 by 0.015. ``Trainer`` takes at most
            262,144 rows for it, evenly spread.
    """

    lr: float = 4e-3
    betas: tuple[float, float] = (0.7, 0.9)
    eps: float = 1e-12
    decoder_lr_scale: float = 2.0
    entropy_weight: float = 1.5e-4
    covariance_weight: float = 0.0
    entropy_from: float = 0.0
    init: str = "rows"
    density: float = 0.02
    wide_from: float = WIDE_FROM
    decoder_norm: float = 1.44
    bank_batches: int = 32
    multilinear: bool = True
    revive_every: int = 50
    revive_until: float = 0.9
    dead_below: float = 3e-4
    revive_quantile: float = 0.99
    revive_decoder_scale: float = 0.3
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, {"bank_batches": 0, "revive_every": 0})
        positive, share = (0.0, math.inf), (0.0, 1.0)
        check_bounds(
            self,
            {
                "entropy_weight": positive,
                "covariance_weight": positive,
                "decoder_norm": positive,
                "entropy_from": share,
                "density": share,
                "wide_from": positive,
                "revive_until": share,
                "dead_below": share,
                "revive_quantile": share,
                "revive_decoder_scale": positive,
            },
        )
        if self.init not in STARTS:
            raise ValueError(f"init must be rows, density or none; got {self.init!r}")

    def for_sizes(self, d_in: int, d_sae: int) -> Self:
        """The constants with the shares of a dictionary of that width, and ``wide_from`` 0.

        Up to ``wide_from`` d_in features nothing else differs.

        Args:
            d_in: width of the rows.
            d_sae: features of the whole dictionary, over all processes.
        """
        scale = 1.0
        if self.wide_from:
            scale = min(1.0, self.wide_from * d_in / d_sae)
        if scale == 1.0:  # 1 - (1 - quantile) would be rounded
            return dataclasses.replace(self, wide_from=0.0)
        return dataclasses.replace(
            self,
            wide_from=0.0,
            density=scale * self.density,
            dead_below=scale * self.dead_below,
            revive_quantile=1 - scale * (1 - self.revive_quantile),
        )

    def going_on(self) -> Self:
        return dataclasses.replace(self, entropy_from=0.0, init="none", revive_every=0, refit=False)

    def settings(self) -> dict[str, Any]:
        values = super().settings()
        if self.wide_from in (0.0, WIDE_FROM):  # as without the constant, see for_sizes
            del values["wide_from"]
        return values

    def check_size(self, d_sae: int) -> None:
        """Raise ValueError where the refit cannot serve that many features."""
        if self.refit and d_sae > MAX_REFIT_FEATURES:
            raise ValueError(
                f"refit must be False for d_sae > {MAX_REFIT_FEATURES}, as it solves an F x F "
                f"system; got d_sae={d_sae}"
            )

    def objective(self, model: Autoencoder) -> Objective:
        """:class:`bae_fast.training.BinaryObjective`."""
        from bae_fast.training.binary import BinaryObjective

        return BinaryObjective(model, self)


@dataclasses.dataclass(frozen=True)
class SparseConfig(LoopConfig):
    """The constants of a run whose objective the module brings along, such as a baseline's.

    The defaults are Adam as the papers of the baselines have it.
    """

    def objective(self, model: Autoencoder) -> Objective:
        """:class:`bae_fast.training.SparseObjective`."""
        from bae_fast.training.sparse import SparseObjective

        return SparseObjective(model, self)

    def settings(self) -> dict[str, Any]:
        """The constants as JSON values.

        Files of results name a run by all constants of both objectives, those of the Binary
        Autoencoder's being off: a result that was kept stays recognised.
        """
        return {**TrainingConfig(**_OFF).settings(), **super().settings()}


# the constants of the Binary Autoencoder's objective where it has no part in a run
_OFF: dict[str, Any] = {
    "entropy_weight": 0.0,
    "init": "none",
    "bank_batches": 0,
    "multilinear": False,
    "revive_every": 0,
    "refit": False,
}

PRESETS: dict[str, TrainingConfig] = {
    "sparse": TrainingConfig(),
    # the released program's README: Adam 5e-4, a_e = a_c = 1e-7, entropy from a quarter on
    "paper": TrainingConfig(
        lr=5e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        decoder_lr_scale=1.0,
        decay_from=1.0,
        entropy_weight=1e-7,
        covariance_weight=1e-7,
        entropy_from=0.25,
        init="none",
        bank_batches=0,
        multilinear=False,
        revive_every=0,
        refit=False,
        precision="float32",
    ),
}
