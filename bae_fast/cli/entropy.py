"""``bae-fast entropy``: see :mod:`bae_fast.experiments.entropy`."""

from __future__ import annotations

import importlib

from bae_fast.cli.command import run_experiment
from bae_fast.progress import say

PARTS = {
    "synthetic": "Estimate the entropy of sets of known entropy.",
    "layers": "Estimate it over a language model's layers and token positions.",
    "icl": "Estimate it at the last prompt token as demonstrations are added.",
    "rows": "Estimate it for a file of your own rows.",
}


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    if not arguments or arguments[0] not in PARTS:
        lines = [f"  {name:<9}  {text}" for name, text in PARTS.items()]
        usage = "\n".join(["usage: bae-fast entropy PART [options]", "", *lines])
        if arguments[:1] in (["-h"], ["--help"]):
            say(usage)
            return 0
        if arguments:
            said = f"PART must be one of {', '.join(PARTS)}; got {arguments[0]}"
            say(f"bae-fast entropy: {said}", error=True)
        else:
            say(usage)
        return 2
    part, *rest = arguments
    module = importlib.import_module(f"bae_fast.experiments.entropy.{part}")
    return run_experiment(f"entropy {part}", rest, module.Config, module.run)
