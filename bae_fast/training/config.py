"""The constants of a training run that every objective shares, and checks of constants.

Those of one objective stand beside it, in a subclass of :class:`LoopConfig`. It also makes the
objective it belongs to, so the trainer asks nobody's type.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

from bae_fast.autoencoder import Autoencoder
from bae_fast.training.objective import Objective

if TYPE_CHECKING:
    from typing_extensions import Self

PRECISIONS = ("auto", "bfloat16", "float32")

# constants that settings leave out where they are off: a result, or a state, from before there was
# such a constant stays recognised
LEFT_OUT_WHERE_OFF: dict[str, float] = {"warmup_steps": 0, "clip_norm": 0.0}


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
