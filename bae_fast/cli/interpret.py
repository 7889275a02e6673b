"""``bae-fast interpret``: see :mod:`bae_fast.experiments.interpret`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import interpret


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("interpret", arguments, interpret.Config, interpret.run)
