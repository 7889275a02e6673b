"""``bae-fast serve``: see :mod:`bae_fast.experiments.serve`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import serve


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("serve", arguments, serve.Config, serve.run, ("folder",))
