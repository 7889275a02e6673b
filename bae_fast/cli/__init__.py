"""The command ``bae-fast``: finds the subcommand, reads its options, runs it, prints its report."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from bae_fast._version import __version__
from bae_fast.cli.net import caught
from bae_fast.progress import say

# subcommand -> what it does; the file of that name has ``run(arguments) -> int``
COMMANDS = {
    "demo": "Train on a language model's hidden states and show what was learned.",
    "harvest": "Keep hidden states of several modules in shards on disk, more than memory holds.",
    "compare": "Train sparse autoencoders beside the binary one; write a table and a plot.",
    "train": "Train autoencoders on hidden states, on one process or many.",
    "evaluate": "Evaluate the autoencoders of a training run.",
    "interpret": "Name features by a judge and score the names.",
    "serve": "Serve the page of features with a live prompt, to a browser on this machine.",
    "push": "Put saved autoencoders on the Hugging Face Hub, with a model card.",
    "match": "Show which features of two saved autoencoders are the same.",
    "neuronpedia": "Write features in the format that Neuronpedia imports.",
    "steer": "Find features that differ between two sets of prompts, and steer by them.",
    "compress": "Write hidden states as a file of codes, near the entropy of the code.",
    "decompress": "Read a file of codes.",
    "entropy": "Estimate the entropy of sets of vectors.",
    "info": "Show versions, the SIMD level, the backends and why one is missing.",
}


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bae-fast [--version] [--debug] COMMAND [options]",
            "",
            "Binary Autoencoder for interpreting language models.",
            "",
            *lines,
            "",
            "bae-fast COMMAND --help lists a command's options. --debug, or the environment's",
            "BAE_FAST_DEBUG=1, shows where an error comes from.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Every error is one line on standard error.

    Returns:
        The exit status: 0, 1 for an error, 2 for options that cannot be read, 128 and the number
        of the signal for an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [one for one in arguments if one != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        say(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        say(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        say(f"bae-fast: COMMAND must be one of {', '.join(COMMANDS)}; got {name}", error=True)
        return 2
    return caught(name, lambda: _run(name, rest), debug=debug)


def _run(name: str, arguments: list[str]) -> int:
    return int(importlib.import_module(f"bae_fast.cli.{name}").run(arguments))
