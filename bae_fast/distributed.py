"""Codes of several processes as one, and the grid of processes that a training run is spread over.

A :class:`Mesh` has two axes. Ranks along "data" have rows of their own; ranks along "feature" have
the same rows and features of their own. Rank (a, b) stands at place a R_f + b of the world.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.codes import BinaryCode
from bae_fast.packing import WORD_BITS

# how long a rank waits for the others in one collective before it gives up
TIMEOUT_SECONDS = 300.0


def _gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of every rank, in rank order; rank r has ``sizes[r]`` of them."""
    # all_gather wants equal shapes: ranks with fewer rows send zeros after them
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def all_gather_code(code: BinaryCode, group: dist.ProcessGroup | None = None) -> BinaryCode:
    """Rows of all ranks of ``group``, in rank order: the same code on every rank.

    A collective: every rank of the group calls it. Ranks may have different numbers of rows (none
    included) and leading dimensions; the result has one, ``[N, K]``. Row masks are kept: where
    any rank has one, the result has one, and rows of ranks without are kept. Words travel packed,
    K/8 bytes a row; sizes are read back, which synchronises a GPU.

    With the pooled statistics each rank's loss is a part of the loss of the whole batch: summed
    over ranks, the gradients of entropy and covariance equal those of one process with all rows
    (added undivided on every rank). :class:`torch.nn.parallel.DistributedDataParallel` and FSDP
    average gradients over R ranks: there multiply these two terms by R; a mean over the rank's
    own rows, such as :meth:`bae_fast.BinaryAutoencoder.mse`, needs no factor where ranks are
    equal::

        stats = all_gather_code(bae.encode(x)).statistics(covariance=True)
        out = bae(x, stats=stats)

    Args:
        code: the code of this rank's rows, on a device that the group's backend can send from.
        group: None: the default group.

    Raises:
        RuntimeError: torch.distributed has no process group yet.
        TypeError: code is not a BinaryCode.
        ValueError: this process is not in ``group``, or ranks differ in columns or bits a
            feature (on every rank).
    """
    if not isinstance(code, BinaryCode):
        raise TypeError(f"code must be a BinaryCode; got {type(code).__name__}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("all_gather_code needs torch.distributed.init_process_group() before")
    if dist.get_rank(group) < 0:
        raise ValueError("group must contain this process")
    flat = code.flatten()
    facts = torch.tensor(
        [len(flat), flat.n_columns, flat.n_bits, flat.row_mask is not None],
        dtype=torch.int64,
        device=flat.device,
    )
    received = [torch.empty_like(facts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, facts, group=group)
    sizes, columns, bits, masked = (
        list(fact) for fact in zip(*(part.tolist() for part in received), strict=True)
    )
    if len(set(columns)) > 1 or len(set(bits)) > 1:
        raise ValueError(
            f"code must have the same columns and n_bits on every rank; "
            f"got columns {columns}, n_bits {bits}"
        )
    words = _gather_rows(flat.words, sizes, group)
    mask = None
    if any(masked):
        kept = torch.ones(len(flat), dtype=torch.uint8, device=flat.device)
        if flat.row_mask is not None:
            kept = flat.row_mask.to(torch.uint8)
        mask = _gather_rows(kept, sizes, group).bool()
    return BinaryCode(words, flat.n_columns, n_bits=flat.n_bits, row_mask=mask, trusted=True)


# -- the grid of a training run ----------------------------------------------------------------


class CollectiveError(RuntimeError):
    """A collective that did not end: its text names the collective and the step."""


class Mesh:
    """The processes of a training run as a grid of R_d x R_f ranks, and what they send.

    Every method that sends is a collective: all ranks of the axis call it, in the same order. What
    a rank sends is given a sum over its axis of ring algorithms: an all-reduce of S bytes over R
    ranks sends 2 S (R-1)/R, a gather of S bytes in all S (R-1)/R.

    Attributes:
        data, feature: R_d and R_f.
        data_rank, feature_rank: a and b.
        step: what errors say of when they happened; the trainer sets it.
    """

    def __init__(
        self,
        data: int = 1,
        feature: int = 1,
        *,
        device_type: str = "cpu",
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        """Make the process groups of both axes.

        Args:
            data, feature: R_d and R_f; their product is the number of processes.
            device_type: where tensors are sent from, "cpu" (gloo) or "cuda" (nccl).
            timeout: seconds that a rank waits in one collective.

        Raises:
            RuntimeError: torch.distributed has no process group yet.
            ValueError: a number below 1, or a product other than the number of processes.
        """
        for name, value in (("data", data), ("feature", feature)):
            check_int(name, value, 1)
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("Mesh needs torch.distributed.init_process_group() before")
        world = dist.get_world_size()
        if data * feature != world:
            raise ValueError(
                f"data x feature must be the number of processes, {world}; got {data} x {feature}"
            )
        from torch.distributed.device_mesh import DeviceMesh

        self.data, self.feature = data, feature
        self.timeout, self.step = timeout, 0
        self.data_rank, self.feature_rank = divmod(dist.get_rank(), feature)
        grid = torch.arange(world).view(data, feature)
        self._groups: dict[str, Any] = {}
        # every rank makes every group, as torch.distributed asks
        for axis, lines in (("data", grid.t()), ("feature", grid), ("world", grid.view(1, -1))):
            for line in lines.tolist():
                group = dist.new_group(line, timeout=datetime.timedelta(seconds=timeout))
                if dist.get_rank() in line:
                    self._groups[axis] = group
        self.device_mesh = DeviceMesh.from_group(
            [self._groups["data"], self._groups["feature"]],
            device_type,
            mesh=grid,
            mesh_dim_names=("data", "feature"),
        )

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.data * self.feature

    @property
    def is_first(self) -> bool:
        """Whether this is rank (0, 0), which writes logs and results."""
        return self.data_rank == 0 and self.feature_rank == 0

    def size(self, axis: str) -> int:
        """Ranks of an axis: "data", "feature" or "world"."""
        return {"data": self.data, "feature": self.feature, "world": self.world}[axis]

    def columns(self, n_columns: int) -> slice:
        """This rank's columns of n_columns.

        Raises:
            ValueError: columns that are no multiple of 32 R_f, so that words would be cut.
        """
        each, rest = divmod(n_columns, self.feature)
        if self.feature > 1 and (rest or each % WORD_BITS):
            raise ValueError(
                f"the columns must be a multiple of {WORD_BITS * self.feature} for "
                f"{self.feature} processes along feature; got {n_columns}"
            )
        return slice(self.feature_rank * each, (self.feature_rank + 1) * each)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise CollectiveError(
                f"{what} did not end at step {self.step} (timeout {self.timeout:g} s): {first}"
            ) from error

    def sum_(self, tensor: Tensor, axis: str, what: str) -> Tensor:
        """Sum a tensor over an axis in place; returns it. Every rank has the same bits after."""
        if self.size(axis) > 1:
            with self._named(f"sum of {what} over {axis}"):
                dist.all_reduce(tensor, group=self._groups[axis])
        return tensor

    def gather(self, tensor: Tensor, axis: str, what: str, dim: int = 0) -> Tensor:
        """Tensors of one shape of all ranks of an axis, one behind the other along ``dim``."""
        if self.size(axis) == 1:
            return tensor
        tensor = tensor.contiguous()
        received = [torch.empty_like(tensor) for _ in range(self.size(axis))]
        with self._named(f"gather of {what} over {axis}"):
            dist.all_gather(received, tensor, group=self._groups[axis])
        return torch.cat(received, dim=dim)

    def gather_objects(self, value: Any, axis: str, what: str) -> list[Any]:
        """A value of every rank of an axis, by rank."""
        if self.size(axis) == 1:
            return [value]
        received: list[Any] = [None] * self.size(axis)
        with self._named(f"gather of {what} over {axis}"):
            dist.all_gather_object(received, value, group=self._groups[axis])
        return received

    def gather_words(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of all columns, of this rank's rows and of the rows of all ranks.

        Args:
            words: int32 ``[n, W_f]``, own rows in own columns, which fill their words.

        Returns:
            ``[n, R_f W_f]`` and ``[R_d n, R_f W_f]``.
        """
        own = self.gather(words, "feature", "codes", dim=1)
        return own, self.gather(own, "data", "codes")

    def sum_reconstructions(self, partial: Tensor) -> Tensor:
        """Sum over "feature" of what each rank's decoder rows give, differentiable.

        The gradient of the sum, which every rank of the axis computes for itself from the same
        reconstruction, is the gradient of each part: backward sends nothing.
        """
        if self.feature == 1:
            return partial
        summed: Tensor = _SumOverFeature.apply(partial, self)
        return summed


class _SumOverFeature(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, mesh: Mesh) -> Tensor:
        return mesh.sum_(partial.clone(), "feature", "reconstructions")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
