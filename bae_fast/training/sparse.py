"""The objective that an autoencoder brings along, such as those of :mod:`bae_fast.baselines`.

The constants of the loop are all that it has.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.distributed import Mesh
from bae_fast.statistics import entropy_bits
from bae_fast.training.binary import TrainingConfig
from bae_fast.training.config import LoopConfig
from bae_fast.training.objective import Loss, Objective, Precision, Step
from bae_fast.training.pool import Pool, Poolable

# the constants of the Binary Autoencoder's objective where it has no part in a run
_OFF: dict[str, Any] = {
    "entropy_weight": 0.0,
    "init": "none",
    "bank_batches": 0,
    "multilinear": False,
    "revive_every": 0,
    "refit": False,
}


@dataclasses.dataclass(frozen=True)
class SparseConfig(LoopConfig):
    """The constants of a run whose objective the module brings along, such as a baseline's.

    The defaults are Adam as the papers of the baselines have it.
    """

    def objective(self, model: Autoencoder) -> Objective:
        """:class:`SparseObjective`."""
        return SparseObjective(model, self)

    def settings(self) -> dict[str, Any]:
        """The constants as JSON values.

        Files of results name a run by all constants of both objectives, those of the Binary
        Autoencoder's being off: a result that was kept stays recognised.
        """
        return {**TrainingConfig(**_OFF).settings(), **super().settings()}


@runtime_checkable
class Trainable(Protocol):
    """An autoencoder that brings its own objective, such as those of :mod:`bae_fast.baselines`.

    It is also an :class:`bae_fast.autoencoder.Autoencoder`; whatever a step changes besides
    parameters lies in its buffers, so that runs resume exactly.
    """

    def training_loss(
        self, x: Tensor, target: Tensor | None, *, dead: Tensor, done: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss ``[]``, its parts by name with ``mse``, rows in which each feature is on ``[F]``).

        Args:
            x, target: raw rows; the target is None unless the trainer has targets.
            dead: bool ``[F]``, features that were off for the last 200 steps.
            done: share of the steps done.
        """

    def before_update(self) -> None:
        """Between the backward pass and the optimizer's step."""

    def after_update(self) -> None:
        """After the optimizer's step, to put back what the parameters must satisfy."""

    def finish(self, x: Tensor) -> None:
        """After the last step, with all raw rows."""


class SparseObjective(Objective):
    """The objective that a :class:`Trainable` brings along."""

    def __init__(self, model: Autoencoder, config: LoopConfig) -> None:
        """Wrap a module.

        Raises:
            TypeError: the module lacks a method of :class:`Trainable`.
        """
        if not isinstance(model, Trainable):
            wanted = ("training_loss", "before_update", "after_update", "finish")
            lacking = ", ".join(name for name in wanted if not hasattr(model, name))
            raise TypeError(
                f"model must have training_loss, before_update, after_update and finish for "
                f"{type(config).__name__}; got {type(model).__name__}, which lacks {lacking}"
            )
        self.model: Autoencoder = cast(Autoencoder, model)
        self.trainable: Trainable = model
        self.n_columns = self.model.d_sae
        self.pool: Pool | None = None

    def spread(self, mesh: Mesh | None, micro_batches: int) -> None:
        name = type(self.model).__name__
        if micro_batches > 1:
            raise ValueError(
                f"micro_batches must be 1 for {name}, whose loss needs the whole batch at once; "
                f"got {micro_batches}"
            )
        if mesh is None or mesh.world == 1:
            return
        if mesh.feature > 1:
            raise ValueError(
                f"feature must be 1 for {name}: only the features of a BinaryAutoencoder can be "
                f"divided among processes; got {mesh.feature}"
            )
        if not isinstance(self.model, Poolable):
            raise ValueError(
                f"data must be 1 for {name}, which has no method pooled (see "
                f"bae_fast.training.Poolable); got {mesh.data}"
            )
        self.pool = Pool(mesh)

    def backward(self, x: Tensor, target: Tensor | None, step: Step, precision: Precision) -> Loss:
        """As the loss of the rows of all processes: gradients are this one's part of it."""
        if self.pool is None:
            return super().backward(x, target, step, precision)
        pool = self.pool
        with cast(Poolable, self.trainable).pooled(pool), precision():
            total, parts, counts = self.trainable.training_loss(
                x, target, dead=step.dead, done=step.done
            )
        (total / pool.parts).backward()
        others = {name: value for name, value in parts.items() if name != "mse"}
        found = {"mse": parts["mse"] / pool.parts}  # the log adds the processes' up
        if others:
            means = pool.mean(torch.stack([v.double() for v in others.values()]), "parts")
            found |= dict(zip(others, means.unbind(), strict=True))
        n_rows = torch.full_like(counts[:1].sum(), len(x) * pool.parts)
        found["entropy_bits"] = entropy_bits(counts, n_rows)
        return Loss(total / pool.parts, found, counts)

    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        total, parts, counts = self.trainable.training_loss(
            x, target, dead=step.dead, done=step.done
        )
        n_rows = torch.full_like(counts[:1].sum(), len(x))
        return Loss(total, {**parts, "entropy_bits": entropy_bits(counts, n_rows)}, counts)

    def before_update(self) -> None:
        self.trainable.before_update()

    def after_update(
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        self.trainable.after_update()

    def finish(self, rows: Tensor) -> None:
        self.trainable.finish(rows)
