"""The log of a run: a line of JSON for every few steps, that a resumed run goes on with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bae_fast.files import append_text, first_line, write_text
from bae_fast.progress import say


def append_line(log: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON to a log; its folder must be there."""
    append_text(log, json.dumps(line) + "\n")


def drop_later_lines(log: Path, step: int) -> None:
    """Keep the lines of a log up to a step: those after it are about to be written again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            known = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue  # cut off while it was written
        if known:
            kept.append(line + "\n")
    write_text(log, "".join(kept))


class Failures:
    """What of a run's numbers could not be written: a run does not end for it."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    @contextlib.contextmanager
    def going_on(self, what: str, errors: type[Exception]) -> Iterator[None]:
        """Go on after such an error, and say so on standard error the first time."""
        try:
            yield
        except errors as error:
            if what not in self._said:
                self._said.add(what)
                say(f"note: {what} failed: {first_line(error)}; the run goes on", error=True)
