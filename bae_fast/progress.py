"""What a long run says while it works: lines, seconds of its stages, how far a step has come."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

# without a terminal: seconds before the first line, least seconds between two, and the share of
# the time gone by that lies between two, so that a night's log stays short
_FIRST_LINE = 2.0
_BETWEEN_LINES = 10.0
_SHARE_BETWEEN = 0.05


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

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print the name, run the block, print its seconds."""
        say(f"== {name}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        say(f"   {self.seconds[name]:.1f} s")


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
    total: int, *, what: str, unit: str, initial: int = 0, show: bool = True
) -> Iterator[Any]:
    """A bar with ``update(n)`` and ``set_postfix(**values)``; the same without effect if not shown.

    Where standard error is no terminal, or tqdm is missing, plain lines take its place: one after
    two seconds, then one every ten seconds or more.

    Args:
        total: units until done, of which ``initial`` are.
        what, unit: said beside the bar.
        show: False: nothing is shown.
    """
    if not show:
        yield _NoBar()
        return
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
            ) as bar:
                yield bar
            return
    yield _Lines(total, what, unit, initial)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
