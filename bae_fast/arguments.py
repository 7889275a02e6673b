"""Checks of arguments that many modules ask for in the same words."""

from __future__ import annotations

from typing import Any


def check_int(name: str, value: Any, least: int) -> None:
    """Raise ValueError, naming the argument, unless its value is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}; got {value!r}")
