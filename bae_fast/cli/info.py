"""``bae-fast info``: versions, devices, and which backends run here.

It needs no package beside torch.
"""

from __future__ import annotations

import argparse
import json
from typing import NoReturn

from bae_fast.info import info
from bae_fast.progress import say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End in one line, as the other commands do."""
        say(f"{self.prog}: {message} (see --help)", error=True)
        raise SystemExit(2)


def run(arguments: list[str]) -> int:
    """Run the command on the arguments after its name; the exit status."""
    parser = _Parser(
        prog="bae-fast info", description="Show versions, the SIMD level, and the backends."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    as_json = parser.parse_args(arguments).json
    values = info()
    if as_json:
        say(json.dumps(values, indent=2))
        return 0
    packages = values["packages"].items()
    cpu = values["cpu"]
    say(f"bae_fast {values['bae_fast']}, Python {values['python']}")
    say("packages  " + ", ".join(f"{name} {version or '(none)'}" for name, version in packages))
    say(
        f"cpu       {cpu['machine']}, {cpu['simd']}, {cpu['threads']} threads, waiting policy "
        f"{cpu['wait_policy']}"
    )
    say("cuda      " + (", ".join(values["cuda_devices"]) or "no device"))
    say("backends")
    for name, state in values["backends"].items():
        say(f"  {name:<10}{state}")
    return 0
