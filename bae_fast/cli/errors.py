"""Errors as one line for the user of a command."""

from __future__ import annotations

import re

from bae_fast.files import out_of_memory

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
        line = _option(line)
        for theirs, ours in _SENTENCES:
            line = re.sub(f"^{theirs}$", ours, line)
        return f"{line} (see --help)"
    if out_of_memory(error):
        return f"out of memory: {line}" if line else "out of memory"
    if isinstance(error, _CLEAR) and line and not isinstance(error, (UnicodeError, RecursionError)):
        return line
    more = "" if debug else f" ({DEBUG}=1 or --debug shows where)"
    return f"{type(error).__name__}: {line}{more}"


def is_usage(error: BaseException) -> bool:
    """Whether options could not be read."""
    return type(error).__name__ in ("ArgumentError", "ArgumentTypeError")


# what jsonargparse says of a value of another type, and of one that is none of several types
_EXPECTED = re.compile(r"(?P<place>[^:]*): Expected an? (?P<kinds>.+)\. Got value: (?P<value>.*)")
_NO_KIND = re.compile(
    r"(?P<place>[^:]*): Does not validate against any of the Union subtypes "
    r"Subtypes: \[(?P<kinds>.+?)\] Errors: .* Given value: (?P<value>.*)"
)
# and of what is no path, see bae_fast.cli.options
_NO_PATH = re.compile(
    r"(?P<place>[^:]*): .*?Not of type GivenPath: (?P<got>got .*?)( - Expected .*)?"
)
# and of a file of options, or of an option without its value: the house's words for the parser's
_SENTENCES = (
    (r"Unexpected config: ?(.*)", r"--config must name a YAML file of options; got '\1'"),
    (r"Problems parsing config: (.*)", r"--config must name a YAML file; \1"),
    (r"--config: File does not exist: (.*)", r"--config must name a YAML file; \1 does not exist"),
    (r"--config: Path is not a file: (.*)", r"--config must name a YAML file; \1 is none"),
    (r"Option '(.*)' is not accepted", r"--config must hold options of this command; got '\1'"),
    (
        r"(--[^:]*): 'utf-8' codec can't encode.*",
        r"\1 must be UTF-8; PYTHONUTF8=1 reads it in every locale",
    ),
    (r"Value not boolean: (.*)\.", r"--config must set a switch to true or false; got \1"),
    (r"argument (--\S+): expected .*argument", r"\1 must have a value; got none"),
)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "GivenPath": "a path",
    "NoneType": "null",
}


def _option(line: str) -> str:
    """'Parser key "batch_size": ...' -> '--batch-size must be a whole number; got 1.5'."""
    head, mark, rest = line.partition('Parser key "')
    if not mark:
        return line
    key, _, rest = rest.partition('"')
    no_path = _NO_PATH.fullmatch(rest)
    if no_path is not None:
        return f"{head}--{key.replace('_', '-')}{no_path['place']} must be a path; {no_path['got']}"
    found = _EXPECTED.fullmatch(rest) or _NO_KIND.fullmatch(rest)
    if found is not None:
        names = re.findall(r"<class '(\w+)'>", found["kinds"])
        kinds = [_WORDS[name] for name in names if name in _WORDS]
        for choices in re.findall(r"Literal\[(.+?)\]", found["kinds"]):
            kinds.insert(0, "one of " + choices.replace("'", ""))
        if kinds:
            rest = f"{found['place']} must be {' or '.join(kinds)}; got {found['value']}"
    return f"{head}--{key.replace('_', '-')}{rest}"


def one_line(error: BaseException) -> str:
    """An error's text on one line, which ends where it is longer than anybody reads."""
    line = " ".join(str(error).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
