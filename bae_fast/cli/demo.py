"""``bae-fast demo``: see :mod:`bae_fast.experiments.demo`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import demo


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("demo", arguments, demo.Config, demo.run)
