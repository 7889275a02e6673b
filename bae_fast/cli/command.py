"""What every command with a configuration does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bae_fast.cli.options import make_parser, read
from bae_fast.experiments.runs import Result
from bae_fast.progress import say


def run_experiment(
    name: str,
    arguments: list[str],
    config: type,
    run: Callable[[Any], Result],
    positional: tuple[str, ...] = (),
) -> int:
    """Read the options, run the experiment, print its report and its files.

    Args:
        name: the command's name.
        arguments: the command line after the name.
        config: the experiment's configuration.
        run: the experiment.
        positional: fields that are given by their place.
    """
    result = run(read(make_parser(name, config, positional), config, arguments))
    if result.text:  # of several processes one reports
        say("\n" + result.text)
    if result.files:
        first, *rest = result.files
        say(", ".join([str(first), *(path.name for path in rest)]))
    return 0
