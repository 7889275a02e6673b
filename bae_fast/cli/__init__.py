"""The command ``bae-fast`` and its subcommands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bae_fast._version import __version__
from bae_fast.cli import compare, compress, demo, entropy, info, interpret, match, steer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors a user can mend are one line on stderr and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="bae-fast", description="Binary Autoencoder for interpreting language models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (demo, compare, interpret, match, steer, compress, entropy, info):
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"bae-fast {arguments.command}: {error}", file=sys.stderr)
        return 1
