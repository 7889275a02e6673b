"""What a training run minimises, as an object: the contract that every objective keeps.

The loop (:mod:`bae_fast.training.trainer`) owns the order of the rows, the optimizer and the log.
An objective owns the rest: how features start, the loss of a batch, what happens around an update,
what is done at the end, and the state all that needs. Those of this package are in
:mod:`bae_fast.training.binary` and :mod:`bae_fast.training.sparse`; a further one is a subclass of
:class:`Objective` and a configuration whose ``objective`` makes it, and touches no file here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from bae_fast.autoencoder import Autoencoder
from bae_fast.distributed import Mesh

# given n, that many raw rows drawn at random (all of them where there are fewer)
Sample = Callable[[int], Tensor]

# gives the context of a forward pass: autocast, or nothing
Precision = Callable[[], AbstractContextManager[Any]]


class Step(NamedTuple):
    """Where a run stands when a loss is asked for.

    Attributes:
        number: steps done before this one.
        done: share of all steps that they are.
        dead: bool ``[K]``, columns that were off in the last 200 steps.
    """

    number: int
    done: float
    dead: Tensor


class Loss(NamedTuple):
    """What an objective says of a batch.

    Attributes:
        total: ``[]``, to be minimised.
        parts: what the log shows, by name, each ``[]``; ``mse`` and ``entropy_bits`` always.
        counts: int64 ``[K]``, rows in which each column is on.
    """

    total: Tensor
    parts: dict[str, Tensor]
    counts: Tensor


class Objective(ABC):
    """One objective for one module.

    Attributes:
        model: the module that is trained.
        n_columns: columns K of its code, of which the loss counts the ones.
    """

    model: Autoencoder
    n_columns: int

    def spread(self, mesh: Mesh | None, micro_batches: int) -> None:
        """Told once, before :meth:`start`: the processes and the parts that a batch is cut into.

        Raises:
            ValueError: more than one of either, for an objective whose statistics are not pooled.
        """
        if micro_batches > 1 or (mesh is not None and mesh.world > 1):
            processes = 1 if mesh is None else mesh.world
            raise ValueError(
                f"micro_batches and the number of processes must be 1 for {type(self).__name__}, "
                f"whose loss is not made of parts; got {micro_batches} and {processes}"
            )

    @property
    def starts(self) -> bool:
        """Whether :meth:`start` sets the features, whatever they were."""
        return False

    def start(self, sample: Sample, generator: torch.Generator) -> None:  # noqa: B027
        """Prepare the module before the first step; draws come from the generator alone."""

    @abstractmethod
    def loss(self, x: Tensor, target: Tensor | None, step: Step) -> Loss:
        """The loss of raw rows ``[n, d_in]``; the target is None unless the run has targets."""

    def backward(self, x: Tensor, target: Tensor | None, step: Step, precision: Precision) -> Loss:
        """The loss of a batch, after its gradients have been added to the parameters.

        Args:
            x, target: raw rows of this process.
            precision: gives the context of a forward pass.
        """
        with precision():
            loss = self.loss(x, target, step)
        loss.total.backward()
        return loss

    def entropy(self, own: Tensor) -> Tensor:
        """H for the log, ``[]``, given the one of this process; a collective on several."""
        return own

    def look(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(reconstruction, ones in each column of this process) of raw rows, without gradient.

        The reconstruction is raw and of all features; None for a code that is not of bits.
        """
        return self.model.reconstruct(x), None

    def before_update(self) -> None:  # noqa: B027
        """Between the backward pass and the optimizer's step."""

    def after_update(  # noqa: B027
        self, x: Tensor, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator
    ) -> None:
        """After the optimizer's step; ``step`` is the number of steps done."""

    def forget(self) -> None:  # noqa: B027
        """The last batch is left out: nothing of it is remembered."""

    @property
    def finishes(self) -> bool:
        """Whether :meth:`finish` does anything: rows for it are drawn only then."""
        return True

    def finish(self, rows: Tensor) -> None:  # noqa: B027
        """After the last step, with all raw rows."""

    def state_dict(self) -> dict[str, Any]:
        """What the objective must know to go on exactly, beside the module: tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from :meth:`state_dict`."""


@runtime_checkable
class Capturable(Protocol):
    """An objective whose step can be replayed: its loss reads tensors, and numbers that stay.

    What :meth:`Objective.loss` does is ``loss_given`` followed by ``count``.
    """

    def against_capture(self, dtype: torch.dtype) -> str | None:
        """Why a step with products of ``dtype`` cannot be replayed, or None."""

    def constants(self, number: int) -> tuple[float, ...]:
        """Numbers of the host in the loss of step ``number``; with others it is captured anew."""

    def given(self) -> tuple[Tensor, ...]:
        """Tensors beside the batch that the loss of the next step reads, always of one shape."""

    def loss_given(
        self,
        x: Tensor,
        target: Tensor | None,
        given: tuple[Tensor, ...],
        constants: tuple[float, ...],
    ) -> Loss:
        """The loss of raw rows, which changes nothing."""

    def count(self, loss: Loss, n_rows: int) -> None:
        """Remember a batch for later losses, the bank and the revival."""
