"""Errors as one line for the user of a command."""

from __future__ import annotations

DEBUG = "BAE_FAST_DEBUG"

# characters of a line; what a file holds may be part of it
_LONGEST = 2000

# kinds whose text is written for a user; of others the kind is part of what is said
_CLEAR = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def describe(error: Exception, *, debug: bool = False) -> str:
    """An error as one line; options are named as they are typed."""
    field, text = getattr(error, "field", None), getattr(error, "text", None)
    if field is not None and text is not None:
        return " ".join(f"--{field.replace('_', '-')} {text}".split())
    line = one_line(error)
    if is_usage(error):
        return f"{_option(line)} (see --help)"
    if isinstance(error, MemoryError):
        return f"out of memory: {line}" if line else "out of memory"
    if isinstance(error, _CLEAR) and line and not isinstance(error, (UnicodeError, RecursionError)):
        return line
    more = "" if debug else f" ({DEBUG}=1 or --debug shows where)"
    return f"{type(error).__name__}: {line}{more}"


def is_usage(error: BaseException) -> bool:
    """Whether options could not be read."""
    return type(error).__name__ in ("ArgumentError", "ArgumentTypeError")


def _option(line: str) -> str:
    """'Parser key "batch_size": ...' -> '--batch-size: ...'."""
    head, mark, rest = line.partition('Parser key "')
    if not mark:
        return line
    key, _, rest = rest.partition('"')
    return f"{head}--{key.replace('_', '-')}{rest}"


def one_line(error: BaseException) -> str:
    """An error's text on one line, which ends where it is longer than anybody reads."""
    line = " ".join(str(error).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
