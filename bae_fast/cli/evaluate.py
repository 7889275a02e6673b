"""``bae-fast evaluate``: see :mod:`bae_fast.experiments.evaluate`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import evaluate


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("evaluate", arguments, evaluate.Config, evaluate.run, ("folder",))
