"""``bae-fast harvest``: see :mod:`bae_fast.experiments.harvest`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import harvest


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("harvest", arguments, harvest.Config, harvest.run)
