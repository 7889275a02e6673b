"""One place where every error and every signal of a command ends, in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from bae_fast.cli.errors import DEBUG, describe, is_usage, one_line
from bae_fast.progress import say
from bae_fast.starting import INTERRUPTED, SIGNALS, end_at_once


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into exceptions, unless SIGINT is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise TerminatedError(f"signal {number}")

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGTERM, end)
        if before[signal.SIGINT] is end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_more() -> None:
    """Let a second Ctrl-C, by an impatient hand, not break into the end of the first."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def caught(name: str, run: Callable[[], int], *, debug: bool = False) -> int:
    """The exit status of a command, whose errors and interruptions are printed as one line.

    Args:
        name: the command's name.
        debug: also show where an error comes from; ``BAE_FAST_DEBUG=1`` does the same.
    """
    debug = debug or os.environ.get(DEBUG, "") not in ("", "0")
    with signals():
        try:
            return run()
        except SystemExit as error:  # --help, --print_config
            return error.code if isinstance(error.code, int) else 0
        except KeyboardInterrupt as error:
            _ignore_more()
            if debug:
                _trace()
            number = signal.SIGTERM if _is_termination(error) else signal.SIGINT
            text = one_line(error) if _said(error) else INTERRUPTED
            say(f"bae-fast {name}: {text}", error=True)
            return 128 + number
        except Exception as error:
            if debug:
                _trace()
            say(f"bae-fast {name}: {describe(error, debug=debug)}", error=True)
            return 2 if is_usage(error) else 1
        finally:
            _flush()


def _said(error: BaseException) -> bool:
    return type(error) is not KeyboardInterrupt and not isinstance(error, TerminatedError)


def _is_termination(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, TerminatedError) or getattr(error, "signal", 0) == signal.SIGTERM:
            return True
        error = error.__cause__ or error.__context__
    return False


def _trace() -> None:
    say(traceback.format_exc().rstrip(), error=True)


def _flush() -> None:
    """Write what is buffered; where that cannot be, keep Python from complaining at its end."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
