"""``bae-fast compare``: see :mod:`bae_fast.experiments.compare`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import compare


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("compare", arguments, compare.Config, compare.run)
