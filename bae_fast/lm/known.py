"""What follows from files alone, kept so that large files are read through once.

    $XDG_CACHE_HOME/bae_fast/digests/<key>.json   the files as they were, and the value

A value holds as long as every file has the size, the inode, and the times of modification and of
status change it had, to the nanosecond. The last of these times cannot be set by a program, so it
gives away a file that was written anew with its old time put back. A clock that ticks coarsely
leaves one gap: a file that changes twice in a tick. So a value is kept only if its files had been
at rest for longer than that before they were read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from bae_fast.files import cache_folder, file_digest, read_json, write_json

# seconds without a change; the coarsest times of files in use are two seconds apart
AT_REST = 5.0


def content_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, hexadecimal, read once for as long as it is not written.

    Raises:
        OSError: the file cannot be read.
    """
    known = Known("SHA-256", [path])
    digest = known.value()
    if digest is None:
        digest = file_digest(path)
        known.keep(digest)
    return digest


class Known:
    """A value that follows from files and from nothing else but what is named beside them."""

    def __init__(self, kind: str, files: Iterable[str | os.PathLike[str]], *facts: str) -> None:
        """Look at the files; this comes before they are read.

        Args:
            kind: what the value is.
            files: that it follows from.
            facts: whatever else it follows from, such as a dtype or a library's version.

        Raises:
            OSError: a file is not there.
        """
        self._files = [os.path.abspath(file) for file in files]
        self._state = self._now()
        changed = max((max(times[1:3]) for times in self._state), default=0)
        self._at_rest = changed + AT_REST * 1e9 < time.time_ns()
        key = hashlib.sha256(json.dumps([kind, self._files, facts]).encode()).hexdigest()[:32]
        self._path: Path | None = None
        with contextlib.suppress(OSError):  # without a home nothing is kept
            self._path = cache_folder("digests") / f"{key}.json"

    def _now(self) -> list[list[int]]:
        stats = [os.stat(file) for file in self._files]
        return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for s in stats]

    def value(self) -> str | None:
        """The value that was kept of these very files; None: there is none."""
        if self._path is None:
            return None
        try:
            held = read_json(self._path)
        except (OSError, ValueError):  # never kept, or damaged
            return None
        value = held.get("value")
        if held.get("files") != self._state or not isinstance(value, str):
            return None
        return value

    def keep(self, value: str) -> None:
        """Keep a value, unless the files may have changed while it was made of them."""
        if self._path is None or not self._at_rest or self._now() != self._state:
            return
        held = {"of": self._files, "files": self._state, "value": value}
        with contextlib.suppress(OSError):  # a folder that cannot be written costs time alone
            write_json(self._path, held)
