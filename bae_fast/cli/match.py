"""``bae-fast match``: see :mod:`bae_fast.experiments.match`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import match


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("match", arguments, match.Config, match.run, ("folders",))
