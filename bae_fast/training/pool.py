"""Sums over the rows of all processes, for losses that are not means over rows alone.

A process has a part of a batch's rows and all features. Most terms of a loss are means over rows,
whose parts may be added up; what is not (the largest values of a batch, a ratio of two means) asks
the pool.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from bae_fast.distributed import Mesh


class Largest(NamedTuple):
    """This process's part of the largest values of a batch.

    Attributes:
        indices: int64 ``[m]``, where they are among this process's values.
        values: ``[m]``, differentiable.
        least: ``[]``, the smallest of all that were kept, on any process; constant.
    """

    indices: Tensor
    values: Tensor
    least: Tensor


class Pool:
    """The processes along "data" as one batch; all of them call the same methods in one order.

    Attributes:
        parts: how many processes have rows, each as many.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        """None: this process alone, which sends nothing."""
        self._mesh = mesh
        self.parts = 1 if mesh is None else mesh.data

    def sum(self, own: Tensor, what: str) -> Tensor:
        """The sum over processes, constant."""
        own = own.detach()
        if self._mesh is None or self.parts == 1:
            return own
        return self._mesh.sum_(own.clone(), "data", what)

    def mean(self, own: Tensor, what: str) -> Tensor:
        """The mean over rows, given that of this process's rows; constant."""
        return self.sum(own, what) / self.parts

    def largest(self, own: Tensor, n: int, what: str) -> Largest:
        """The ``n`` largest values of all processes.

        Args:
            own: ``[m]``, as many on every process.
            n: at most m times ``parts``.
        """
        top = own.topk(min(n, own.numel()))
        if self._mesh is None or self.parts == 1:
            return Largest(top.indices, top.values, top.values[-1].detach())
        # every process picks among the same values in the same order, so none is counted twice
        every = self._mesh.gather(top.values.detach(), "data", what)
        best = every.topk(n)
        places = best.indices - self._mesh.data_rank * len(top.values)
        places = places[(places >= 0) & (places < len(top.values))]
        return Largest(top.indices[places], top.values[places], best.values[-1])


@runtime_checkable
class Poolable(Protocol):
    """A :class:`bae_fast.training.Trainable` whose loss can be a part of a larger batch's."""

    def pooled(self, pool: Pool) -> AbstractContextManager[None]:
        """A context in which ``training_loss`` is of this process's part of a batch.

        Inside, the loss and its parts are means over this process's rows, such that their means
        over processes are those of the whole batch; counts are of the whole batch.
        """


ALONE = Pool()
