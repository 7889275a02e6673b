"""What a signal does to a command that is still importing its libraries, and to one that is done.

Imports take seconds. Nothing has run by then, so the process ends at once, in one line. Once the
command itself runs, `bae_fast.cli.net` turns signals into exceptions.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import FrameType

from bae_fast.waiting import is_command

# Ctrl-C, what batch systems send before they kill (SLURM's --signal and others' limits name one of
# the last three), and a terminal or connection that is gone: each would end a process at once
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
INTERRUPTED = "interrupted; the last results are as they were"


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler of a signal: say one line and end with 128 and its number."""
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    line = f"{f'bae-fast {name}'.strip()}: {INTERRUPTED}\n"
    try:
        os.write(2, line.encode("ascii", "replace"))
    finally:
        os._exit(128 + number)


def let_signals_end_commands() -> None:
    """Let a signal end a command while it starts, unless the user has it ignored."""
    if not is_command() or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_once)
    atexit.register(_end_undisturbed)


def _end_undisturbed() -> None:
    """Let no signal speak of an interruption once all is done: what is left is Python's own end,
    which takes a part of a second."""
    for number in SIGNALS:
        if signal.getsignal(number) is end_at_once:
            signal.signal(number, signal.SIG_IGN)


def forget_interruption() -> None:
    """Let ``python -m`` end with a command's own status after an interruption that was caught.

    Where a KeyboardInterrupt leaves code that is run from text, as some libraries run theirs,
    CPython takes it for one that nobody catches: it sets a flag (`unhandled_keyboard_interrupt` in
    `Python/pythonrun.c`), and at the end of ``python -m`` a flag that is set ends the process by
    SIGINT. Nothing in Python reads or clears it, except that code which is run from text clears it
    as it begins. So a text of no code is run.
    """
    exec("")
