"""What a long run says while it works: lines, seconds of its stages, how far a step has come.

A stage of a command shows its progress by itself. Loops over rows, windows or features say how far
they have come by :func:`tracked`; a stage without such a loop, or between two, says how long it has
worked. Outside of a stage, as in a program of one's own, both are silent.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

# without a terminal: seconds before the first line, least seconds between two, and the share of
# the time gone by that lies between two, so that a night's log stays short
_FIRST_LINE = 2.0
_BETWEEN_LINES = 10.0
_SHARE_BETWEEN = 0.05

_T = TypeVar("_T")


class _Step:
    """The stage that is under way, and the number of bars that are shown in it."""

    def __init__(self, name: str) -> None:
        self.name, self.bars = name, 0


_STEP: ContextVar[_Step | None] = ContextVar("step", default=None)


def say(text: str = "", *, error: bool = False) -> None:
    """Print a line on standard output (or standard error) and never raise.

    A stream that is closed, full or gone gets nothing; characters its encoding lacks become
    question marks. Results lie in files: what is printed must not cost them.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
            _say_once(
                f"note: ? stands for characters that {encoding} lacks (PYTHONIOENCODING=utf-8)"
            )
    except (OSError, ValueError, LookupError):  # a closed pipe, a full disk, a closed stream
        return


@functools.cache
def _say_once(text: str) -> None:
    say(text, error=True)


class Stages:
    """Seconds of each stage of a run, printed as it ends.

    Attributes:
        seconds: seconds by the name of the stage.
    """

    def __init__(self, progress: bool = True) -> None:
        """With ``progress``, stages show how far they have come."""
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print the name, run the block, print its seconds."""
        say(f"== {name}")
        start = time.perf_counter()
        with _under_way(name) if self._progress else contextlib.nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start
        say(f"   {self.seconds[name]:.1f} s")


@contextlib.contextmanager
def _under_way(name: str) -> Iterator[None]:
    """Let loops show their progress under this name; where none does, say how long it takes."""
    step, ended = _Step(name), threading.Event()
    thread = threading.Thread(target=_beat, args=(step, ended), name="progress", daemon=True)
    before = _STEP.set(step)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _STEP.reset(before)


def _beat(step: _Step, ended: threading.Event) -> None:
    start, wait = time.monotonic(), _FIRST_LINE
    while not ended.wait(wait):
        seconds = time.monotonic() - start
        if not step.bars:
            say(f"{step.name}: {seconds:,.0f} s so far", error=True)
        wait = max(_BETWEEN_LINES, _SHARE_BETWEEN * seconds)


def tracked(
    items: Iterable[_T], total: int, unit: str, *, by: int | Callable[[_T], int] = 1
) -> Iterator[_T]:
    """The items of a loop, whose progress is shown where a stage is under way.

    A loop inside of one that is shown is silent.

    Args:
        items: what the loop is over.
        total: units until done.
        unit: said beside the bar, such as "rows".
        by: units that an item is, or a function of it.
    """
    step = _STEP.get()
    if step is None or step.bars:
        yield from items
        return
    done = 0
    with progress_bar(total, what=step.name, unit=unit, late=True) as bar:
        for item in items:
            yield item
            n = min(by if isinstance(by, int) else by(item), total - done)
            done += n
            bar.update(n)


class _NoBar:
    def update(self, n: int) -> None:
        pass

    def set_postfix(self, **values: str) -> None:
        pass


class _Lines:
    """Plain lines every so often, for a log file."""

    def __init__(self, total: int, what: str, unit: str, initial: int) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._first = self._done = initial
        self._start = time.monotonic()
        self._next = self._start + _FIRST_LINE
        self._postfix = ""

    def update(self, n: int) -> None:
        self._done += n
        now = time.monotonic()
        if now < self._next or self._done >= self._total:
            return
        seconds = now - self._start
        self._next = now + max(_BETWEEN_LINES, _SHARE_BETWEEN * seconds)
        new = self._done - self._first
        left = f", about {seconds / new * (self._total - self._done):,.0f} s left" if new else ""
        say(
            f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, "
            f"{seconds:,.0f} s{left}{self._postfix}",
            error=True,
        )

    def set_postfix(self, **values: str) -> None:
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())


@contextlib.contextmanager
def progress_bar(
    total: int,
    *,
    what: str,
    unit: str,
    initial: int = 0,
    show: bool = True,
    late: bool = False,
) -> Iterator[Any]:
    """A bar with ``update(n)`` and ``set_postfix(**values)``; the same without effect if not shown.

    Where standard error is no terminal, or tqdm is missing, plain lines take its place: one after
    two seconds, then one every ten seconds or more.

    Args:
        total: units until done, of which ``initial`` are.
        what, unit: said beside the bar.
        show: False: nothing is shown.
        late: a bar comes after two seconds and goes at its end, as lines do by themselves.
    """
    if not show:
        yield _NoBar()
        return
    step = _STEP.get()
    if step is not None:
        step.bars += 1
    try:
        with _bar(total, what, unit, initial, late) as bar:
            yield bar
    finally:
        if step is not None:
            step.bars -= 1


@contextlib.contextmanager
def _bar(total: int, what: str, unit: str, initial: int, late: bool) -> Iterator[Any]:
    if _is_terminal():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            with tqdm(
                total=total,
                initial=initial,
                desc=what,
                unit=unit,
                unit_scale=total >= 10_000,
                delay=_FIRST_LINE if late else 0,
                leave=not late,
            ) as bar:
                yield bar
            return
    yield _Lines(total, what, unit, initial)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
