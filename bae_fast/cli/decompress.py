"""``bae-fast decompress``: see :mod:`bae_fast.experiments.decompress`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import decompress


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("decompress", arguments, decompress.Config, decompress.run, ("file",))
