"""Signals while a run is at work, which wait until the work in hand is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bae_fast.starting import SIGNALS


@contextlib.contextmanager
def first_signals(
    ours: Callable[[signal.Signals, Any], bool], note: Callable[[int, Any], None]
) -> Iterator[dict[signal.Signals, Any]]:
    """Note the first signal of each kind in the block; a second goes to the handler from before.

    Outside the main thread, which alone may take signals, nothing is noted.

    Args:
        ours: whether a signal with such a handler is taken.
        note: is given its number and the frame that it came in.

    Yields:
        The handlers from before, by signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def first(number: int, frame: Any) -> None:
        note(number, frame)
        signal.signal(number, before[signal.Signals(number)])

    taken = [number for number, handler in before.items() if ours(number, handler)]
    for number in taken:
        signal.signal(number, first)
    try:
        yield before
    finally:
        for number in taken:
            signal.signal(number, before[number])
