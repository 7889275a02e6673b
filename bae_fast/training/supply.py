"""Where a run's rows come from: the protocol that the trainer asks, and rows held in memory.

The order of rows is global. A run has V logical streams, each with an order and a generator of its
own, and a batch of N rows takes N / V rows of every stream, stream by stream. A rank serves whole
streams, so the batches of a run do not depend on the number of its processes, as long as that
number divides V.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.spacing import even_numbers

# bytes of rows, evenly spaced, by which a resumed run knows its rows again
_FINGERPRINT_BYTES = 64 * 2**20

# held-out rows are given out so many at a time
HELDOUT_BLOCK = 4096


class Rows(NamedTuple):
    """Rows of one batch: the states of every hook at the same tokens.

    Attributes:
        x: hook -> raw hidden states ``[n, d]``, in the dtype they were kept in. All hooks have the
            same n, and row i of each belongs to the same token.
        ids: int64 ``[n]``, which rows of all these are: the same number is the same row.
    """

    x: dict[str, Tensor]
    ids: Tensor


@runtime_checkable
class Supply(Protocol):
    """Rows for training, in an order that a state can bring back.

    Attributes:
        widths: hook -> d.
        streams: V, the number of logical streams.
        rank, world: which share of every batch is given out here, of how many.
    """

    widths: dict[str, int]
    streams: int
    rank: int
    world: int

    def next(self, n: int) -> Rows:
        """The next batch's rows.

        Args:
            n: rows of the whole batch, over all ranks: a multiple of ``streams``.

        Returns:
            This rank's n / world rows: those of its streams, in their order. The batches of all
            ranks, one behind the other by rank, are the batch of a single process.

        Raises:
            ValueError: n is no multiple of the number of streams, or more than there is.
        """

    def sample(self, n: int, seed: int | torch.Generator) -> Rows:
        """At most n training rows drawn at random, for the start, normalisation and the refit.

        The order of batches does not move. The draw depends on the seed and not on the rank, so
        ranks that want rows of their own take seeds of their own.

        Args:
            n: at least 1. Where there are fewer rows, all of them come.
            seed: a number, or a generator, which the draw moves.

        Raises:
            ValueError: n is no int of at least 1.
        """

    def heldout(self) -> Iterator[Rows]:
        """All held-out rows in their order, in blocks; the same on every rank. May be empty."""

    def pause(self) -> AbstractContextManager[None]:
        """A block in which the supply uses neither the processor nor the language model.

        A supply that works in the background finishes the forward pass in hand first.
        """

    def identity(self) -> dict[str, Any]:
        """What the rows are, JSON values: a state fits a supply of the same identity only."""

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, by the rows given out and not by those fetched ahead; a copy.

        It holds tensors and plain values, ``streams`` among them: number of a stream -> its state,
        for this rank's streams. :func:`merge_states` makes one state of those of all ranks.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, of any number of ranks.

        Raises:
            ValueError: the state of other rows or of another number of streams, or one without a
                stream of this rank; nothing is changed then.
        """

    def close(self) -> None:
        """End what works in the background and close files. A second call does nothing."""


_Self = TypeVar("_Self", bound="Closing")


class Closing:
    """What is closed at the end of a ``with`` block."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End what works in the background and close files."""
        raise NotImplementedError


# -- streams -----------------------------------------------------------------------------------


def streams_of(streams: int, rank: int, world: int) -> range:
    """The numbers of the streams that a rank serves.

    Raises:
        ValueError: a number below 1, a rank out of range, or ranks that do not divide the streams.
    """
    for name, value in (("streams", streams), ("world", world)):
        check_int(name, value, 1)
    check_int("rank", rank, 0, world - 1)
    if streams % world:
        raise ValueError(
            f"world must divide the number of streams, {streams}, so that a rank serves whole "
            f"streams; got {world}"
        )
    each = streams // world
    return range(rank * each, (rank + 1) * each)


def rows_of_a_stream(n: int, streams: int) -> int:
    """Rows that a batch of n takes of each stream.

    Raises:
        ValueError: n is not a positive multiple of the number of streams.
    """
    if not isinstance(n, int) or n < 1 or n % streams:
        raise ValueError(f"n must be a positive multiple of the {streams} streams; got {n!r}")
    return n // streams


def stream_generator(seed: int, stream: int) -> torch.Generator:
    """A generator of a stream's own. That of stream 0 is ``manual_seed(seed)``."""
    if stream:
        text = f"{seed} {stream}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those of all ranks.

    Raises:
        ValueError: no state, states that do not belong together, or streams that are missing.
    """
    if not states:
        raise ValueError("states must hold at least one state; got none")
    merged = {name: value for name, value in states[0].items() if name != "streams"}
    streams: dict[int, Any] = {}
    for state in states:
        if (state["identity"], state["n_streams"]) != (merged["identity"], merged["n_streams"]):
            raise ValueError(
                "states must be of one supply; got some of "
                f"{merged['n_streams']} streams of {merged['identity']} and of "
                f"{state['n_streams']} streams of {state['identity']}"
            )
        streams.update(state["streams"])
    lacking = sorted(set(range(merged["n_streams"])) - set(streams))
    if lacking:
        raise ValueError(f"states must hold every stream; missing are {lacking}")
    return {**merged, "streams": dict(sorted(streams.items()))}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs between what a state belongs to and what is here; "" where nothing does."""
    return ", ".join(
        f"{name} {theirs.get(name)!r} (here {ours.get(name)!r})"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    )


def check_state(state: Mapping[str, Any], supply: Supply) -> dict[int, Any]:
    """The states of a supply's own streams.

    Raises:
        ValueError: see :meth:`Supply.load_state_dict`.
    """
    lacking = sorted({"identity", "n_streams", "streams"} - set(state))
    if lacking:
        raise ValueError(
            f"state must be what state_dict of a supply gave; it lacks {', '.join(lacking)}"
        )
    differing = differences(state["identity"], supply.identity())
    if differing:
        raise ValueError(f"state must be of the same rows; it is of {differing}")
    if state["n_streams"] != supply.streams:
        raise ValueError(
            f"state must be of {supply.streams} streams; it is of {state['n_streams']}"
        )
    own = streams_of(supply.streams, supply.rank, supply.world)
    absent = [stream for stream in own if stream not in state["streams"]]
    if absent:
        raise ValueError(
            f"state must hold the streams {list(own)}; it lacks {absent} (merge_states makes one "
            "state of those of all ranks)"
        )
    return {stream: state["streams"][stream] for stream in own}


# -- rows in memory ----------------------------------------------------------------------------


class MemorySupply(Closing):
    """Rows held in memory, or memory-mapped, in a random order that is drawn anew every epoch.

    Stream v has the v-th of V equal ranges of the rows. What is left of a stream's order when it
    is shorter than the stream's part of a batch is dropped, and a new order begins.

    Example::

        supply = MemorySupply(rows, seed=0)
        batch = supply.next(512).x["rows"]

    Attributes:
        rows: hook -> ``[n, d]``.
    """

    def __init__(
        self,
        rows: Tensor | Mapping[str, Tensor],
        *,
        heldout: Tensor | Mapping[str, Tensor] | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        streams: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Take the rows as they are.

        Args:
            rows: ``[n, d]`` of each hook, row by row of the same tokens, on any device; one tensor
                is the hook "rows".
            heldout: rows that nothing is trained on, of the same hooks.
            seed: the seed of the order.
            generator: draws the order of a single stream in place of one made from the seed.
            streams, rank, world: see :class:`Supply`.

        Raises:
            TypeError: a hook's rows are no tensor.
            ValueError: no hook, rows that are no matrix or of unlike length, fewer rows than
                streams, held-out rows of other hooks or widths, a generator for several streams,
                or ranks that do not divide the streams.
        """
        self.rows = _hooks("rows", rows)
        self._heldout = {} if heldout is None else _hooks("heldout", heldout)
        self.widths = {hook: x.shape[1] for hook, x in self.rows.items()}
        if self._heldout and {h: x.shape[1] for h, x in self._heldout.items()} != self.widths:
            raise ValueError(
                f"heldout must have the hooks and widths of rows, {self.widths}; got "
                f"{ {h: x.shape[1] for h, x in self._heldout.items()} }"
            )
        self.streams, self.rank, self.world = streams, rank, world
        self.n_rows = len(next(iter(self.rows.values())))
        own = streams_of(streams, rank, world)
        if self.n_rows < streams:
            raise ValueError(f"rows must be at least one a stream, {streams}; got {self.n_rows}")
        if generator is not None and streams > 1:
            raise ValueError(f"generator must be None for several streams; got {streams} streams")
        self._generators = {v: generator or stream_generator(seed, v) for v in own}
        self._orders = {v: torch.empty(0, dtype=torch.int64, device="cpu") for v in own}
        self._identity: dict[str, Any] | None = None

    def _range(self, stream: int) -> tuple[int, int]:
        return (
            stream * self.n_rows // self.streams,
            (stream + 1) * self.n_rows // self.streams,
        )

    def next(self, n: int) -> Rows:
        each = rows_of_a_stream(n, self.streams)
        most = self.n_rows // self.streams
        if each > most:
            raise ValueError(
                f"n, the rows of a batch, must be at most {most * self.streams:,}, the rows of "
                f"{self.streams} streams; got {n}"
            )
        picked = []
        for stream, order in self._orders.items():
            if len(order) < each:
                start, stop = self._range(stream)
                generator = self._generators[stream]
                order = torch.randperm(stop - start, generator=generator, device="cpu")
                if start:
                    order += start
            picked.append(order[:each])
            self._orders[stream] = order[each:]
        return self._take(torch.cat(picked) if len(picked) > 1 else picked[0])

    def _take(self, ids: Tensor) -> Rows:
        # half the time of x[ids] for rows of half precision on a CPU
        taken = {hook: x.index_select(0, ids.to(x.device)) for hook, x in self.rows.items()}
        return Rows(taken, ids)

    def sample(self, n: int, seed: int | torch.Generator) -> Rows:
        check_int("n", n, 1)
        if not isinstance(seed, torch.Generator):
            seed = torch.Generator().manual_seed(seed)
        return self._take(torch.randperm(self.n_rows, generator=seed, device="cpu")[:n])

    def heldout(self) -> Iterator[Rows]:
        n = len(next(iter(self._heldout.values()))) if self._heldout else 0
        for start in range(0, n, HELDOUT_BLOCK):
            ids = torch.arange(start, min(start + HELDOUT_BLOCK, n), device="cpu")
            yield Rows(
                {hook: x[start : start + HELDOUT_BLOCK] for hook, x in self._heldout.items()},
                ids + self.n_rows,
            )

    def pause(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def identity(self) -> dict[str, Any]:
        if self._identity is None:
            self._identity = {hook: fingerprint(x) for hook, x in self.rows.items()}
        return dict(self._identity)

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self.identity(),
            "n_streams": self.streams,
            "streams": {
                stream: {
                    "order": order.clone(),
                    "generator": self._generators[stream].get_state(),
                }
                for stream, order in self._orders.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for stream, own in check_state(state, self).items():
            self._orders[stream] = own["order"].cpu().clone()
            self._generators[stream].set_state(own["generator"].cpu())

    def close(self) -> None:
        """Nothing works in the background."""


def _hooks(name: str, rows: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows by hook, checked."""
    if isinstance(rows, Tensor):
        rows = {"rows": rows}
    if not isinstance(rows, Mapping) or not rows:
        raise ValueError(
            f"{name} must be a tensor, or tensors by hook; got {type(rows).__name__} "
            f"{'of none' if isinstance(rows, Mapping) else ''}".rstrip()
        )
    found = {}
    for hook, x in rows.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{hook!r}] must be a tensor; got {type(x).__name__}")
        if x.dim() != 2 or not len(x) or not x.is_floating_point():
            raise ValueError(
                f"{name}[{hook!r}] must be floating point of shape [n, d] with n >= 1; got "
                f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
            )
        found[hook] = x.detach()
    lengths = {hook: len(x) for hook, x in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name} must have as many rows of every hook; got {lengths}")
    return found


def fingerprint(rows: Tensor) -> str:
    """Shape and dtype of rows, and a digest of at most 64 MiB of them, evenly spaced."""
    size = max(rows.shape[1] * rows.element_size(), 1)
    kept = min(len(rows), max(_FINGERPRINT_BYTES // size, 1))
    data = rows[even_numbers(len(rows), kept, rows.device)].cpu().contiguous().view(torch.uint8)
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
    return f"{list(rows.shape)} {str(rows.dtype).removeprefix('torch.')} {digest}"
