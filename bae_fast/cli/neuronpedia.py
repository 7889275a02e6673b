"""``bae-fast neuronpedia``: see :mod:`bae_fast.experiments.neuronpedia`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import neuronpedia


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("neuronpedia", arguments, neuronpedia.Config, neuronpedia.run)
