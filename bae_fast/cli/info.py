"""``bae-fast info``: versions, devices, and which backends run here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from bae_fast.info import info


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, SIMD level, backends and why not")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    found = info()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"bae_fast {found['bae_fast']}, Python {found['python']}")
    packages = found["packages"].items()
    print("packages  " + ", ".join(f"{name} {version or '(none)'}" for name, version in packages))
    cpu = found["cpu"]
    print(f"cpu       {cpu['machine']}, {cpu['simd']}, {cpu['threads']} threads")
    print("cuda      " + (", ".join(found["cuda_devices"]) or "no device"))
    print("backends")
    for name, state in found["backends"].items():
        print(f"  {name:<10}{state}")
    return 0
