"""``bae-fast push``: see :mod:`bae_fast.experiments.push`."""

from __future__ import annotations

from bae_fast.cli.command import run_experiment
from bae_fast.experiments import push


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    return run_experiment("push", arguments, push.Config, push.run, ("folder", "repo"))
