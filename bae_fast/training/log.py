"""The log of a run: a line of JSON for every few steps, that a resumed run goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bae_fast.files import append_text, write_text


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
