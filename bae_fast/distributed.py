"""Codes of several processes as one: for statistics that are pooled over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from bae_fast.codes import BinaryCode


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
    return BinaryCode(words, flat.n_columns, n_bits=flat.n_bits, row_mask=mask)
