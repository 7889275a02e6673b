"""Processes that end: with all that they have started, and when their time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.checkout import ROOT
from bench.device.deadlines import SIGN


def below(pid: int) -> list[int]:
    """A process and all that it and they have started: Linux's tree."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            # behind the name, which may hold anything: state, parent
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(
                int(path.parent.name)
            )
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process with all that it has started: a checker's program would go on."""
    if process.poll() is not None:
        return  # its number may be another's by now
    for pid in below(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Ended(NamedTuple):
    """What a process said, and its status; None where its time was up."""

    status: int | None
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def run_process(
    command: list[str],
    seconds: float,
    variables: Mapping[str, str] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command for so long at most; what it started ends with it.

    Args:
        variables: of its environment, beside those that are there.
        alive: called again and again while it runs.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, env=os.environ | dict(variables or {}), cwd=ROOT, stdout=said, stderr=said
        )
        try:
            status = _status(process, time.monotonic() + max(seconds, 1.0), alive)
        finally:
            end(process)
            process.wait()
        said.seek(0)
        return Ended(status, said.read())


def _status(process: subprocess.Popen[Any], until: float, alive: Callable[[], None]) -> int | None:
    """A process's status; None where it has not ended by then."""
    while (left := until - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, SIGN))
        alive()
    return None
