"""Errors as one line for the user of a command."""

from __future__ import annotations

import re

DEBUG = "BAE_FAST_DEBUG"

# characters of a line; what a file holds may be part of it
_LONGEST = 2000

# kinds whose text is written for a user; of others the kind is part of what is said
_CLEAR = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def describe(error: BaseException, *, debug: bool = False) -> str:
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


# what jsonargparse says of a value of another type, and of one that is none of several types
_EXPECTED = re.compile(r": Expected an? (?P<kinds>.+)\. Got value: (?P<value>.*)")
_NO_KIND = re.compile(
    r": Does not validate against any of the Union subtypes Subtypes: \[(?P<kinds>.+?)\] Errors: "
    r".* Given value: (?P<value>.*)"
)
_WORDS = {"int": "a whole number", "float": "a number", "Path": "a path", "NoneType": "null"}


def _option(line: str) -> str:
    """'Parser key "batch_size": ...' -> '--batch-size must be a whole number; got 1.5'."""
    head, mark, rest = line.partition('Parser key "')
    if not mark:
        return line
    key, _, rest = rest.partition('"')
    found = _EXPECTED.fullmatch(rest) or _NO_KIND.fullmatch(rest)
    if found is not None:
        names = re.findall(r"<class '(\w+)'>", found["kinds"])
        kinds = [_WORDS[name] for name in names if name in _WORDS]
        for choices in re.findall(r"Literal\[(.+?)\]", found["kinds"]):
            kinds.insert(0, "one of " + choices.replace("'", ""))
        if kinds:
            rest = f" must be {' or '.join(kinds)}; got {found['value']}"
    return f"{head}--{key.replace('_', '-')}{rest}"


def one_line(error: BaseException) -> str:
    """An error's text on one line, which ends where it is longer than anybody reads."""
    line = " ".join(str(error).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
