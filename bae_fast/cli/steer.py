"""``bae-fast steer``: see :mod:`bae_fast.experiments.steer`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import steer


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("steer", arguments, steer.Config, steer.run)
