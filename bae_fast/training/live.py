"""Rows while the language model runs: nothing is written, and the trainer works meanwhile."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.lm.cache import MAX_NORM_RATIO
from bae_fast.lm.capture import Candidates, Capture
from bae_fast.lm.documents import TokenWindows, Windows
from bae_fast.lm.inputs import check_ids, check_length
from bae_fast.lm.loading import LanguageModel
from bae_fast.lm.shard_harvest import LIMIT_TOKENS
from bae_fast.training.buffer import Buffer
from bae_fast.training.supply import (
    Closing,
    Rows,
    check_state,
    rows_of_a_stream,
    stream_generator,
    streams_of,
)

# passes that wait for the trainer where the model has a device of its own
_AHEAD = 2
# how long a thread that waits for room looks away from being told to end, in seconds
_LOOK = 0.05


class _Item(NamedTuple):
    """Rows of one forward pass.

    Attributes:
        number: the number of the pass, among those of all streams.
        before, after: states of the text.
        x, ids: the rows that are kept.
    """

    number: int
    before: dict[str, Any]
    after: dict[str, Any]
    x: dict[str, Tensor]
    ids: Tensor


class _Stream:
    """The buffer of a stream, and passes that wait for room in it."""

    def __init__(self, buffer: Buffer, number: int) -> None:
        self.buffer = buffer
        self.waiting: deque[_Item] = deque()
        self.next = number  # the pass whose rows come next
        self.used = 0  # rows of it that are in the buffer already
        self.states: dict[int, dict[str, Any]] = {}  # of passes with rows in the buffer


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join()


class _Turn:
    """A lock that goes to whoever asks first, and that its holder may take again.

    A plain lock would let the thread, which gives it back and asks again at once, keep it.
    """

    def __init__(self) -> None:
        self._queue, self._lock = threading.Lock(), threading.Lock()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._holder != me:
            with self._queue:
                self._lock.acquire()
            self._holder = me
        self._depth += 1

    def __exit__(self, *_exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
            self._lock.release()


class LiveSupply(Closing):
    """Runs a language model over a text and gives out the rows of its modules.

    Every forward pass takes the next ``batch_size`` windows; pass g belongs to stream g mod V,
    whose buffer its rows go through, so that a batch holds rows of many texts. Where the text ends
    it begins again. After a resume the passes whose rows were in the buffers are run again, in
    their old batches, so the rows are the same ones to the bit on the same machine.

    On a GPU the model runs in a thread, ahead of the trainer by a bounded number of passes. On a
    CPU a pass and a training step share the same cores, and a thread gains nothing: there the model
    runs when rows are asked for. The rows are the same.

    Rows are dropped as :func:`bae_fast.lm.harvest_shards` drops them. Their numbers count on where
    the text begins again.

    Memory: ``buffer_rows`` rows of every hook, shared among the ranks, and the passes ahead: at
    most ``ahead`` and one for every stream of the rank.

    Example::

        with LiveSupply(lm, text, ["model.layers.11"]) as supply:
            x = supply.next(512).x["model.layers.11"]

    Attributes:
        limits: hook -> the largest norm that is kept; empty until the first rows are there.
    """

    def __init__(
        self,
        lm: LanguageModel,
        text: Windows | Tensor,
        hooks: Sequence[str],
        *,
        buffer_rows: int = 1 << 16,
        batch_size: int = 8,
        ahead: int | None = None,
        n_heldout: int = 0,
        drop_positions: int = 1,
        max_norm_ratio: float = MAX_NORM_RATIO,
        exclude_tokens: Iterable[int] | None = None,
        threads: int | None = None,
        seed: int = 0,
        streams: int = 8,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Prepare everything; the thread starts with the first batch.

        Args:
            lm: the model, in this process; other calls of it are not disturbed.
            text: token windows ``[n, context]``, or what reads them from documents.
            hooks: modules whose outputs are given out.
            buffer_rows: rows of all streams and all ranks that batches are drawn from.
            batch_size: windows a forward pass.
            ahead: passes that may wait for the trainer, beside those of a batch; 0: no thread, the
                model runs within :meth:`next`. None: 2, and 0 for a model on a CPU without
                ``threads``.
            n_heldout: windows at the beginning of the text that are held out.
            drop_positions, max_norm_ratio, exclude_tokens: see
                :func:`bae_fast.lm.harvest_shards`.
            threads: torch's number of threads in the model's thread, on a CPU, where some cores are
                left to the trainer; None: as many as the caller has.
            seed: the seed of the draws.
            streams, rank, world: see :class:`bae_fast.training.Supply`.

        Raises:
            ValueError: a number out of range, no such module, or a text without a window to
                train on.
        """
        self.streams, self.rank, self.world = streams, rank, world
        own = streams_of(streams, rank, world)
        for name, value, least in (
            ("buffer_rows", buffer_rows, streams),
            ("batch_size", batch_size, 1),
            ("ahead", 0 if ahead is None else ahead, 0),
            ("n_heldout", n_heldout, 0),
        ):
            check_int(name, value, least)
        # one for the thread, one for the caller's own passes between the thread's
        self.capture, self._side = (
            Capture(
                lm,
                hooks,
                exclude_tokens=exclude_tokens,
                drop_positions=drop_positions,
                max_norm_ratio=max_norm_ratio,
            )
            for _ in range(2)
        )
        self.text: Windows = TokenWindows(text) if isinstance(text, Tensor) else text
        if ahead is None:
            ahead = 0 if lm.device.type == "cpu" and threads is None else _AHEAD
        self.batch_size, self.ahead, self.n_heldout = batch_size, ahead, n_heldout
        self.threads, self.seed, self.buffer_rows = threads, seed, buffer_rows
        check_length(lm.model, self.text.context_size, "text")
        if drop_positions >= self.text.context_size:
            raise ValueError(
                f"drop_positions must be below context_size={self.text.context_size}; "
                f"got {drop_positions}"
            )
        self._begin = self.text.state_dict()
        self._read(n_heldout)
        self._start = self.text.state_dict()
        if not len(self.text.read(1)):
            raise ValueError(
                f"text must have a window behind the {n_heldout} that are held out; it has none"
            )
        self.text.load_state_dict(self._start)
        # one forward pass says how wide the rows are
        with self.capture.engine:
            probe = torch.zeros(1, drop_positions + 1, dtype=torch.int64)
            found = self.capture.engine.forward(probe)
        self.widths = {hook: out.shape[-1] for hook, out in found.items()}
        self._dtype = next(iter(found.values())).dtype
        self._streams = {v: self._stream(v) for v in own}
        self.limits: dict[str, float] = {}
        # the pass behind the last one that came, and the text before it
        self._known: tuple[int, dict[str, Any]] = (0, self._start)
        self._turn = _Turn()  # whoever has it may use the text and the model
        self._model = f"{lm.name} {lm.current_revision()}"  # reads every weight: once
        self._sampled: tuple[int, Rows] | None = None
        self._thread: threading.Thread | None = None
        self._made: Iterator[_Item] | None = None  # without a thread
        self._stop = threading.Event()
        self._closed = False

    def _stream(self, v: int) -> _Stream:
        capacity = self.buffer_rows // self.streams
        generator = stream_generator(self.seed, v)
        return _Stream(Buffer(capacity, self.widths, self._dtype, generator), v)

    def _read(self, n: int) -> Tensor:
        tokens = self.text.read(n)
        if len(tokens):
            check_ids(self.capture.lm.model, tokens, "text")
        return tokens

    # -- forward passes, in a thread or not ----------------------------------------------------

    def _ensure_thread(self, n_ahead: int) -> None:
        if self._thread is None:
            self._stop = threading.Event()
            self._credits = threading.Semaphore(n_ahead)
            self._granted = n_ahead
            self._queue: queue.Queue[_Item | BaseException] = queue.Queue()
            self._thread = threading.Thread(target=self._work, name="live-supply", daemon=True)
            self._thread.start()
            # a program that ends without close() must not end under the thread's feet
            self._at_exit = weakref.finalize(self, _end, self._stop, self._thread)
        while self._granted < n_ahead:
            self._granted += 1
            self._credits.release()

    def _work(self) -> None:
        try:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            with self.capture.engine:
                for item in self._passes(*self._known):
                    while not self._credits.acquire(timeout=_LOOK):
                        if self._stop.is_set():
                            return
                    self._queue.put(item)
        except BaseException as error:
            self._queue.put(error)

    def _passes(self, number: int, state: dict[str, Any]) -> Iterator[_Item]:
        """Forward passes from one on; those of other ranks' streams only as far as needed."""
        with self._turn:
            self.text.load_state_dict(state)
        # without limits, rows wait until enough norms are known
        waiting: list[tuple[int, dict[str, Any], dict[str, Any], Candidates]] = []
        collecting, seen = not self.limits, 0
        while not self._stop.is_set():
            own = self._streams.get(number % self.streams)
            wanted = own is not None and number >= own.next
            with self._turn:
                before, tokens, after = self._next_tokens()
                part = self.capture.candidates(tokens) if wanted or collecting else None
            seen += tokens.numel()
            if part is not None and collecting:
                waiting.append((number, before, after, part))
                if self._enough(seen):
                    self.limits = self._limits([entry[3] for entry in waiting])
                    for entry in waiting:
                        if entry[0] % self.streams in self._streams:
                            yield self._item(*entry)
                    collecting, waiting = False, []
            elif part is not None:
                yield self._item(number, before, after, part)
            number += 1

    def _enough(self, tokens: int) -> bool:
        """Whether so many tokens of the text's beginning are those whose norms set the limits."""
        whole = self.text.n_windows
        most = LIMIT_TOKENS if math.isfinite(self.capture.max_norm_ratio) else 1
        if whole is not None:
            most = min(most, (whole - self.n_heldout) * self.text.context_size)
        return tokens >= most

    def _next_tokens(self) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
        """The windows of a pass, with the states of the text before and after it."""
        before = self.text.state_dict()
        tokens = self._read(self.batch_size)
        if not len(tokens):
            self.text.load_state_dict(self._start)
            before = self.text.state_dict()
            tokens = self._read(self.batch_size)
        return before, tokens, self.text.state_dict()

    def _limits(self, parts: list[Candidates]) -> dict[str, float]:
        return {
            hook: self.capture.limit(torch.cat([part.norms[hook] for part in parts]))
            for hook in self.capture.hooks
        }

    def _item(
        self, number: int, before: dict[str, Any], after: dict[str, Any], part: Candidates
    ) -> _Item:
        keep, _ = part.kept(self.limits)
        ids = number * self.batch_size * self.text.context_size + part.places[keep]
        return _Item(number, before, after, {hook: x[keep] for hook, x in part.x.items()}, ids)

    # -- the caller --------------------------------------------------------------------------

    def _from_thread(self) -> _Item:
        """The next pass, or what ended the thread."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # for a second call
            raise RuntimeError(f"supply: the language model's thread ended: {item}") from item
        self._credits.release()
        return item

    def _from_here(self) -> _Item:
        """Run the model until the next pass is there; after an error the same pass comes again."""
        if self._made is None:
            self._made = self._passes(*self._known)
        try:
            with self.capture.engine:
                return next(self._made)
        except Exception as error:
            self._made = None
            raise RuntimeError(f"supply: the language model failed: {error}") from error
        except BaseException:
            self._made = None
            raise

    def _receive(self) -> None:
        item = self._from_thread() if self.ahead else self._from_here()
        self._known = (item.number + 1, item.after)
        self._streams[item.number % self.streams].waiting.append(item)

    def _fill(self) -> None:
        """Until all buffers are full."""
        empty = 0
        for stream in self._streams.values():
            buffer = stream.buffer
            while buffer.room:
                while not stream.waiting:
                    self._receive()
                item = stream.waiting[0]
                n = min(buffer.room, len(item.ids) - stream.used)
                part = slice(stream.used, stream.used + n)
                if n:
                    empty = 0
                    stream.states[item.number] = item.before
                    buffer.put({hook: x[part] for hook, x in item.x.items()}, item.ids[part])
                stream.used += n
                if stream.used == len(item.ids):
                    stream.waiting.popleft()
                    stream.next, stream.used = item.number + self.streams, 0
                    empty += not len(item.ids)
                    if empty > 10_000:
                        raise ValueError("text must hold text; 10,000 passes gave no row")

    def next(self, n: int) -> Rows:
        """See :meth:`bae_fast.training.Supply.next`.

        Raises:
            RuntimeError: the language model failed, for the reason that is its cause.
        """
        if self._closed:
            raise ValueError("supply must be open; close() was called")
        each = rows_of_a_stream(n, self.streams)
        capacity = self.buffer_rows // self.streams
        if each > capacity:
            raise ValueError(
                f"n, the rows of a batch, must be at most {capacity * self.streams:,} by "
                f"buffer_rows={self.buffer_rows:,}; got {n}"
            )
        total = each * len(self._streams)
        a_pass = self.batch_size * (self.text.context_size - self.capture.drop_positions)
        # a pass fills one stream, so that all streams' passes come due at nearly the same batch
        if self.ahead:
            self._ensure_thread(self.ahead + max(-(-total // a_pass), len(self._streams)))
        self._fill()
        x = {h: torch.empty(total, d, dtype=self._dtype) for h, d in self.widths.items()}
        ids = torch.empty(total, dtype=torch.int64)
        for i, stream in enumerate(self._streams.values()):
            part = slice(i * each, (i + 1) * each)
            stream.buffer.draw({hook: out[part] for hook, out in x.items()}, ids[part])
        return Rows(x, ids)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """See :meth:`bae_fast.training.Supply.pause`: the forward pass in hand is finished.

        Where a thread runs the model, the block can ask for no more rows than are there already.
        """
        with self._turn:
            yield

    @contextlib.contextmanager
    def _aside(self, state: dict[str, Any]) -> Iterator[None]:
        """Read elsewhere in the text, and run the model, between two passes of the thread."""
        with self._turn, self._side.engine:
            here = self.text.state_dict()
            self.text.load_state_dict(state)
            try:
                yield
            finally:
                self.text.load_state_dict(here)

    def _first_rows(self, n: int) -> Rows:
        """The first n rows of the text to train on that are kept."""
        if self._sampled is None or self._sampled[0] < n:
            parts: list[Candidates] = []
            limits, seen, found = dict(self.limits), 0, 0
            with self._aside(self._start):
                while True:
                    if not limits and self._enough(seen):
                        limits = self._limits(parts)
                        found = sum(int(part.kept(limits)[0].sum()) for part in parts)
                    tokens = self._read(self.batch_size) if not limits or found < n else None
                    if tokens is None or not len(tokens):
                        break
                    part = self._side.candidates(tokens)
                    offset = len(parts) * self.batch_size * self.text.context_size
                    parts.append(part._replace(places=part.places + offset))
                    seen += tokens.numel()
                    found += int(part.kept(limits)[0].sum()) if limits else 0
            self.limits = limits or self._limits(parts)
            kept = [(part, part.kept(self.limits)[0]) for part in parts]
            x = {h: torch.cat([part.x[h][keep] for part, keep in kept]) for h in self.widths}
            self._sampled = n, Rows(x, torch.cat([part.places[keep] for part, keep in kept]))
        return self._sampled[1]

    def sample(self, n: int, seed: int | torch.Generator) -> Rows:
        """See :meth:`bae_fast.training.Supply.sample`.

        A text cannot be read at random places: these are the first n rows to train on, in a random
        order. They are kept for the next call.
        """
        check_int("n", n, 1)
        if not isinstance(seed, torch.Generator):
            seed = torch.Generator().manual_seed(seed)
        rows = self._first_rows(n)
        picked = torch.randperm(min(n, len(rows.ids)), generator=seed)
        return Rows({hook: x[picked] for hook, x in rows.x.items()}, rows.ids[picked])

    def heldout(self) -> Iterator[Rows]:
        """See :meth:`bae_fast.training.Supply.heldout`; their numbers are below zero."""
        if not self.n_heldout:
            return
        length = self.text.context_size
        if not self.limits:
            self._first_rows(1)
        state, done = self._begin, 0
        while done < self.n_heldout:
            with self._aside(state):
                tokens = self._read(min(self.batch_size, self.n_heldout - done))
                part = self._side.candidates(tokens)
                state = self.text.state_dict()
            keep, _ = part.kept(self.limits)
            ids = (done - self.n_heldout) * length + part.places[keep]
            yield Rows({hook: x[keep] for hook, x in part.x.items()}, ids)
            done += len(tokens)

    # -- the state ---------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """See :meth:`bae_fast.training.Supply.identity`."""
        capture = self.capture
        return {
            "model": self._model,
            "hooks": self.widths,
            "text": self.text.identity(),
            "context_size": self.text.context_size,
            "batch_size": self.batch_size,
            "n_heldout": self.n_heldout,
            "dropped": [capture.drop_positions, capture.max_norm_ratio, capture.exclude_tokens],
            "buffer_rows": self.buffer_rows,
            "seed": self.seed,
        }

    def _passes_of(self, ids: Tensor) -> Tensor:
        return ids // (self.batch_size * self.text.context_size)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`bae_fast.training.Supply.state_dict`."""
        streams: dict[int, Any] = {}
        for v, stream in self._streams.items():
            buffer = stream.buffer.state_dict()
            held = set(self._passes_of(torch.cat([buffer["now"], buffer["coming"]])).tolist())
            stream.states = {g: state for g, state in stream.states.items() if g in held}
            number, text = self._known
            if stream.waiting:
                number, text = stream.waiting[0].number, stream.waiting[0].before
            streams[v] = {
                "buffer": buffer,
                "next": stream.next,
                "used": stream.used,
                "passes": dict(stream.states),
                "from": number,
                "text": text,
                "limits": dict(self.limits),
            }
        return {"identity": self.identity(), "n_streams": self.streams, "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`bae_fast.training.Supply.load_state_dict`; runs the buffers' passes again.

        Raises:
            ValueError: also a text that is not the one it was.
        """
        found = check_state(state, self)
        self._end_thread()
        self.limits = dict(next(iter(found.values()))["limits"])
        begin: list[tuple[int, dict[str, Any]]] = []
        with self._aside(self._start):
            for v, own in found.items():
                stream = self._streams[v] = self._stream(v)
                stream.next, stream.used = own["next"], own["used"]
                stream.states = dict(own["passes"])
                begin.append((own["from"], own["text"]))
                ids = stream.buffer.load_state_dict(own["buffer"])
                self._run_again(stream, ids)
        self._known = min(begin, key=lambda pair: pair[0])

    def _run_again(self, stream: _Stream, ids: Tensor) -> None:
        """Fill a buffer's places with the rows of these numbers."""
        numbers = self._passes_of(ids)
        for number, before in sorted(stream.states.items()):
            slots = (numbers == number).nonzero().flatten()
            if not len(slots):
                continue
            self.text.load_state_dict(before)
            item = self._item(
                number, before, before, self._side.candidates(self._read(self.batch_size))
            )
            at = torch.searchsorted(item.ids, ids[slots])
            found = item.ids[at[at < len(item.ids)]]
            if not torch.equal(found, ids[slots]):
                raise ValueError(
                    f"state must be of the same text and model; pass {number} gives other rows now"
                )
            for hook, x in item.x.items():
                stream.buffer.x[hook][slots] = x[at]

    def _end_thread(self) -> None:
        self._made = None
        if self._thread is not None:
            self._at_exit()
            self._thread = None

    def close(self) -> None:
        """See :meth:`bae_fast.training.Supply.close`: the thread ends behind its forward pass."""
        self._closed = True
        self._end_thread()
