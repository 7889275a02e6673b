"""What every command with a configuration does."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from bae_fast.cli.options import JSON, make_parser, read
from bae_fast.experiments.runs import ConfigError, Result, check_out
from bae_fast.progress import say

# jsonargparse goes through what a YAML file gives an option of several values as if it were a list
_NO_LIST = (
    "does not support item assignment",
    "object is not iterable",
    "dictionary changed size during iteration",
)


def run_experiment(
    name: str,
    arguments: list[str],
    config: type,
    run: Callable[[Any], Result],
    positional: tuple[str, ...] = (),
) -> int:
    """Read the options, run the experiment, print its report and its files.

    With ``--json`` standard output gets the result as one line of JSON and nothing else: what the
    experiment says meanwhile goes to standard error.

    Args:
        name: the command's name.
        arguments: the command line after the name.
        config: the experiment's configuration.
        run: the experiment.
        positional: fields that are given by their place.
    """
    as_json = JSON in arguments
    parser = make_parser(name, config, positional)
    try:
        settings = read(parser, config, [one for one in arguments if one != JSON])
    except BrokenPipeError:  # of --help or --print_config, whose reader has seen enough
        return 0
    except UnicodeDecodeError as error:
        raise ConfigError("config", f"must name a YAML file in UTF-8; {error}") from error
    except Exception as error:
        if not any(text in str(error) for text in _NO_LIST):
            raise
        raise ConfigError(
            "config", "must give an option of several values a list of them, as in text: [a, b]"
        ) from error
    check_out(settings)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = run(settings)
    if as_json:
        if result.text:  # of several processes one reports
            files = list(map(str, result.files))
            _write(json.dumps({"values": plain(result.values), "files": files}))
        return 0
    if result.text:
        say("\n" + result.text)
    if result.files:
        first, *rest = result.files
        say(", ".join([str(first), *(path.name for path in rest)]))
    return 0


def _write(line: str) -> None:
    """A line on standard output that a program reads, which must not be lost without a word.

    Raises:
        OSError: it cannot be written, but for a reader that has gone.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        print(line, flush=True)
    except BrokenPipeError:
        return
    except OSError as error:
        raise OSError(error.errno, f"the result cannot be printed: {error.strerror}") from error


def plain(value: Any) -> Any:
    """JSON values, with null where a number is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
