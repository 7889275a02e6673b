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
from bae_fast.starting import INTERRUPTED, SIGNALS, end_at_once, forget_interruption


class TerminatedError(KeyboardInterrupt):
    """SIGTERM or another signal that ends a process, which ends a run as Ctrl-C does.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(f"signal {int(number)}")
        self.signal = number


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Turn signals that end a process into exceptions, but those that are ignored (``nohup``)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise TerminatedError(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler in (signal.SIG_DFL, end_at_once):
                handling = signal.default_int_handler if number == signal.SIGINT else end
                signal.signal(number, handling)
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
            forget_interruption()
            if debug:
                _trace()
            text = one_line(error) if _said(error) else INTERRUPTED
            say(f"bae-fast {name}: {text}", error=True)
            return 128 + _number(error)
        except BaseException as error:  # a library in Rust panics by one that is no Exception
            if debug:
                _trace()
            say(f"bae-fast {name}: {describe(error, debug=debug)}", error=True)
            return 2 if is_usage(error) else 1
        finally:
            _flush()


def _said(error: BaseException) -> bool:
    return type(error) is not KeyboardInterrupt and not isinstance(error, TerminatedError)


def _number(error: BaseException | None) -> int:
    """The signal that an interruption comes from."""
    while error is not None:
        number = getattr(error, "signal", None)
        if isinstance(number, int):
            return int(number)
        error = error.__cause__ or error.__context__
    return int(signal.SIGINT)


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
