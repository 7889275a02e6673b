"""``bae-fast compress``: see :mod:`bae_fast.experiments.compress`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import compress


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("compress", arguments, compress.Config, compress.run)
