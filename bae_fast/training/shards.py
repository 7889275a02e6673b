"""Rows on disk, shuffled as they are read: more than memory holds, each once an epoch."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.lm.shards import BLOCK_ROWS, ShardedCache
from bae_fast.training.buffer import Buffer, distinct
from bae_fast.training.supply import (
    Closing,
    Rows,
    check_state,
    rows_of_a_stream,
    stream_generator,
    streams_of,
)

# a sample of n rows is spread over so many blocks at least
_SAMPLE_BLOCKS = 4096


class _Stream:
    """The order of one stream: its blocks in a new order every epoch, and the buffer behind them.

    Stream v of V has the blocks v, v + V, v + 2V and so on.
    """

    def __init__(self, supply: ShardSupply, number: int, capacity: int) -> None:
        self.cache, self.seed, self.number = supply.cache, supply.seed, number
        self.blocks = torch.arange(number, supply.n_blocks, supply.streams)
        self.n_train = supply.n_train
        self.buffer = Buffer(
            min(capacity, int(supply.sizes[self.blocks].sum())),
            supply.widths,
            supply.cache.dtype,
            stream_generator(supply.seed, number),
        )
        self._goto(0, 0, 0)

    def _range(self, block: int) -> range:
        rows = self.cache.block_range(block)
        return range(rows.start, min(rows.stop, self.n_train))

    def _goto(self, epoch: int, at: int, used: int) -> None:
        """Read on in an epoch: ``at`` blocks of its order are used up, and rows of the next."""
        self.epoch, self.at, self.used = epoch, at, used
        # an order of its own for each epoch, so that none must be replayed
        generator = stream_generator(self.seed, self.number + 1_000_003 * (epoch + 1))
        self.order = self.blocks[torch.randperm(len(self.blocks), generator=generator)]
        self.rows: dict[str, Tensor] | None = None

    def fill(self) -> None:
        """Read until the buffer is full."""
        buffer = self.buffer
        while buffer.room:
            block = int(self.order[self.at])
            rows = self._range(block)
            if self.rows is None:
                self.rows = self.cache.read_block(block)
            n = min(buffer.room, len(rows) - self.used)
            part = slice(self.used, self.used + n)
            ids = torch.arange(rows.start + self.used, rows.start + self.used + n)
            buffer.put(
                {hook: x[part] for hook, x in self.rows.items()},
                ids,
                coming=self.epoch > buffer.turns,
            )
            self.used += n
            if self.used == len(rows):
                self.at, self.used, self.rows = self.at + 1, 0, None
                if self.at == len(self.order):
                    self._goto(self.epoch + 1, 0, 0)

    def state_dict(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "at": self.at, "used": self.used}
        return {**place, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._goto(state["epoch"], state["at"], state["used"])
        ids = self.buffer.load_state_dict(state["buffer"])
        order = ids.argsort()
        blocks, counts = self.cache.blocks_of(ids[order]).unique_consecutive(return_counts=True)
        for block, slots in zip(blocks.tolist(), order.split(counts.tolist()), strict=True):
            read = self.cache.read_block(block)
            at = ids[slots] - self.cache.block_range(block).start
            for hook, x in read.items():
                self.buffer.x[hook][slots] = x[at]


class ShardSupply(Closing):
    """Rows of a :class:`bae_fast.lm.ShardedCache` of any size.

    Blocks of 256 rows are read in an order that is drawn anew every epoch, and go through a buffer
    of ``buffer_rows`` rows from which batches are drawn at random. Every row comes once an epoch of
    its stream, and shares a batch of N with at most 256 N / ``buffer_rows`` rows of its block, in
    the mean. What is read is checked against the sums that the harvest wrote. Reading goes on in a
    thread while the caller works.

    Memory: ``buffer_rows`` rows of every hook, shared among the ranks, and a block a stream.

    Example::

        supply = ShardSupply("cache/l11", buffer_rows=1 << 18)
        x = supply.next(4096).x["model.layers.11"]

    Attributes:
        cache: what is read.
        n_train: rows to train on; those behind are held out, or left out between the two.
        n_blocks: blocks that they lie in.
        sizes: int64 ``[n_blocks]``, rows of each to train on.
    """

    def __init__(
        self,
        cache: ShardedCache | str | Path,
        *,
        buffer_rows: int = 1 << 20,
        n_heldout: int = 4096,
        seed: int = 0,
        streams: int = 8,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Open a finished cache; the first batch fills the buffer.

        Args:
            cache: see :func:`bae_fast.lm.harvest_shards`.
            buffer_rows: rows of all streams and all ranks that batches are drawn from.
            n_heldout: rows held out at the end, 0: none; see
                :meth:`bae_fast.lm.ShardedCache.split`.
            seed: the seed of the order.
            streams, rank, world: see :class:`bae_fast.training.Supply`.

        Raises:
            ValueError: no finished cache, damaged files, fewer blocks than streams, a buffer
                smaller than the streams, or ranks that do not divide the streams.
        """
        self.cache = cache if isinstance(cache, ShardedCache) else ShardedCache(cache)
        self.widths, self.seed = self.cache.widths, seed
        self.streams, self.rank, self.world = streams, rank, world
        own = streams_of(streams, rank, world)
        check_int("buffer_rows", buffer_rows, streams)  # one a stream
        if n_heldout == 0:
            self.n_train, self._held = self.cache.n_rows, range(0)
        else:
            split = self.cache.split(n_heldout)
            self.n_train, self._held = split.train.stop, split.heldout
        self.buffer_rows = buffer_rows
        last = torch.tensor([self.n_train - 1])
        self.n_blocks = int(self.cache.blocks_of(last)) + 1
        if self.n_blocks < streams:
            raise ValueError(
                f"streams must be at most the number of blocks of {BLOCK_ROWS} rows, "
                f"{self.n_blocks}; got {streams}"
            )
        self.sizes = self.cache.block_sizes[: self.n_blocks].clone()
        self.sizes[-1] = self.n_train - self.cache.block_range(self.n_blocks - 1).start
        self._streams = {v: _Stream(self, v, buffer_rows // streams) for v in own}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="supply")
        self._filling: Future[None] | None = None
        self._closed = False

    def _fill(self) -> None:
        for stream in self._streams.values():
            stream.fill()

    def _wait(self) -> None:
        """Until the buffers are full, or the error that came while they were filled."""
        if self._closed:
            raise ValueError("supply must be open; close() was called")
        if self._filling is None:
            self._filling = self._pool.submit(self._fill)
        self._filling.result()

    def next(self, n: int) -> Rows:
        """See :meth:`bae_fast.training.Supply.next`.

        Raises:
            ValueError: also a file that is not the one that was written, named.
        """
        each = rows_of_a_stream(n, self.streams)
        least = min(stream.buffer.capacity for stream in self._streams.values())
        if each > least:
            raise ValueError(
                f"n, the rows of a batch, must be at most {least * self.streams:,}, {least:,} rows "
                f"a stream, by buffer_rows={self.buffer_rows:,} and the rows there are; got {n}"
            )
        self._wait()
        total = each * len(self._streams)
        x = {h: torch.empty(total, d, dtype=self.cache.dtype) for h, d in self.widths.items()}
        ids = torch.empty(total, dtype=torch.int64)
        for i, stream in enumerate(self._streams.values()):
            part = slice(i * each, (i + 1) * each)
            stream.buffer.draw({hook: out[part] for hook, out in x.items()}, ids[part])
        self._filling = self._pool.submit(self._fill)
        return Rows(x, ids)

    def sample(self, n: int, seed: int | torch.Generator) -> Rows:
        """See :meth:`bae_fast.training.Supply.sample`.

        The rows come from at least 4,096 blocks, where there are as many, and are read there.
        """
        check_int("n", n, 1)
        if not isinstance(seed, torch.Generator):
            seed = torch.Generator().manual_seed(seed)
        each = -(-n // min(_SAMPLE_BLOCKS, self.n_blocks))
        while each < BLOCK_ROWS and int(self.sizes.clamp(max=each).sum()) < min(n, self.n_train):
            each += 1  # some blocks are shorter
        parts: list[tuple[dict[str, Tensor], Tensor]] = []
        found = 0
        for block in torch.randperm(self.n_blocks, generator=seed).tolist():
            rows = self.cache.block_range(block)
            there = min(rows.stop, self.n_train) - rows.start
            at = distinct(there, min(each, there, n - found), seed)
            read = self.cache.read_block(block)
            parts.append(({hook: x[at] for hook, x in read.items()}, rows.start + at))
            found += len(at)
            if found == n:
                break
        mixed = torch.randperm(found, generator=seed)
        ids = torch.cat([ids for _, ids in parts])[mixed]
        return Rows({h: torch.cat([x[h] for x, _ in parts])[mixed] for h in self.widths}, ids)

    def heldout(self) -> Iterator[Rows]:
        """See :meth:`bae_fast.training.Supply.heldout`."""
        if not len(self._held):
            return
        first = int(self.cache.blocks_of(torch.tensor([self._held.start])))
        for block in range(first, self.cache.n_blocks):
            rows = self.cache.block_range(block)
            start = max(rows.start, self._held.start)
            read = self.cache.read_block(block)
            yield Rows(
                {hook: x[start - rows.start :] for hook, x in read.items()},
                torch.arange(start, rows.stop),
            )

    def pause(self) -> AbstractContextManager[None]:
        """See :meth:`bae_fast.training.Supply.pause`."""
        if self._filling is not None:
            self._filling.exception()
        return contextlib.nullcontext()

    def identity(self) -> dict[str, Any]:
        """See :meth:`bae_fast.training.Supply.identity`."""
        manifest = self.cache.manifest
        return {
            "rows": [self.n_train, self.cache.n_rows],
            "hooks": self.widths,
            "model": f"{manifest['model_name']} {manifest['model_revision']}",
            "shards": hashlib.sha256(json.dumps(manifest["shards"]).encode()).hexdigest()[:16],
            "buffer_rows": self.buffer_rows,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`bae_fast.training.Supply.state_dict`; 8 bytes a row of the buffer."""
        self._wait()
        return {
            "identity": self.identity(),
            "n_streams": self.streams,
            "streams": {v: stream.state_dict() for v, stream in self._streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`bae_fast.training.Supply.load_state_dict`; reads the buffer's rows again."""
        found = check_state(state, self)
        if self._filling is not None:
            self._filling.exception()
        for v, own in found.items():
            self._streams[v].load_state_dict(own)
        self._filling = None

    def close(self) -> None:
        """See :meth:`bae_fast.training.Supply.close`."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self.cache.close()
