"""``bae-fast train``: see :mod:`bae_fast.experiments.train`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import train


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("train", arguments, train.Config, train.run)
