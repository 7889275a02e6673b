"""A GPU: every operator and kernel checked against float64, then timed, in one command.

The options of that command, and the order in which it starts other processes.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bae_fast.files import read_json, write_json
from bench.checkout import ROOT
from bench.device.cases import FULL, IMPLS, KINDS, TINY, Plan
from bench.device.chip import chip, reasons_against
from bench.device.compiling import compile_ahead, compile_part
from bench.device.deadlines import COMPILING, SECONDS, SPARE
from bench.device.report import RESULTS, refusals, report
from bench.device.resume import resumed
from bench.device.sanitizer import check_small
from bench.device.watching import watch
from bench.device.worker import work
from bench.exact import WrongResultError

# of the keys of device.json
SCHEMA = 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench device", description=(__doc__ or "").splitlines()[0]
    )
    found.add_argument(
        "--out", type=Path, default=RESULTS, help="The folder of device.json and device.png."
    )
    found.add_argument(
        "--seconds", type=float, default=SECONDS, help="The seconds that the whole may take (540)."
    )
    found.add_argument("--impl", nargs="+", default=list(IMPLS), help="The backends (triton cuda).")
    found.add_argument(
        "--resume", type=Path, help="A folder whose device.json is gone on with; --out may be it."
    )
    found.add_argument(
        "--only", nargs="+", default=[], metavar="KIND",
        help=f"The kinds of cases that are run ({' '.join(map(repr, KINDS))}).",
    )  # fmt: skip
    found.add_argument("--report-only", action="store_true", help="Only draw device.json.")
    hidden: dict[str, dict[str, Any]] = {
        "--device": {"default": "cuda", "choices": ["cuda", "cpu"]},  # for tests of this program
        "--tiny": {"action": "store_true"},
        "--worker": {"action": "store_true"},
        "--small": {"action": "store_true"},  # under a checker
        "--compile": {"default": ""},
        "--until": {"type": float, "default": 0.0},
    }
    for name, more in hidden.items():
        found.add_argument(name, help=argparse.SUPPRESS, **more)
    return found


def main(
    arguments: list[str],
    environment: Callable[[], dict[str, Any]] = dict,
    readme: Path = ROOT / "README.md",
    command: tuple[str, ...] = (sys.executable, "-m", "bench", "device"),
) -> int:
    """See the package. ``command`` starts the worker.

    Returns:
        The exit status.
    """
    options = parser().parse_args(arguments)
    if options.report_only:
        report(options.out, readme)
        return 0
    if options.device == "cuda" and not (torch.cuda.is_available() and torch.version.cuda):
        print("python -m bench device needs an NVIDIA GPU; torch sees none", file=sys.stderr)
        return 2
    unknown = [kind for kind in options.only if kind not in KINDS]
    if unknown:
        print(f"--only must be of {', '.join(KINDS)}; got {unknown[0]!r}", file=sys.stderr)
        return 2
    plan = TINY if options.tiny else FULL
    if options.small or options.compile or options.worker:
        return _part(options, plan)
    return _whole(options, environment, readme, command)


def _part(options: argparse.Namespace, plan: Plan) -> int:
    """What a command that another one has started does."""
    if options.small:
        return _small(options.impl, options.device)
    if options.compile:
        compile_part(options.compile, options.impl, options.device, plan)
        return 0
    path = options.out / "device.json"
    return work(path, options.impl, options.device, plan, options.until, options.only)


def _small(impls: list[str], device: str) -> int:
    """The small checks, under a checker."""
    for impl in impls:
        try:
            check_small(impl, device)
        except WrongResultError as error:
            print(f"refused: {impl}: {error}", file=sys.stderr)
            return 1
    return 0


def _whole(
    options: argparse.Namespace,
    environment: Callable[[], dict[str, Any]],
    readme: Path,
    command: tuple[str, ...],
) -> int:
    """The command itself: what it starts from, the cases, the report."""
    begin, path = time.time(), options.out / "device.json"
    reasons = {name: reasons_against(name, options.device) for name in options.impl}
    impls = [name for name, reason in reasons.items() if not reason]
    result = {
        "schema": SCHEMA,
        "environment": environment() | {"device": chip(options.device)},
        "impls": {name: reason or "available" for name, reason in reasons.items()},
        "seconds": options.seconds, "complete": False, "running": None,
        "rows": [], "skipped": [], "ended": {},
    }  # fmt: skip
    if options.resume is not None:
        try:
            result = resumed(read_json(options.resume / "device.json"), result)
        except (OSError, ValueError) as error:
            print(f"--resume: {error}", file=sys.stderr)
            return 2
    write_json(path, result)
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: {reason}", flush=True)
    if not impls:
        return 1

    until = begin + options.seconds - SPARE
    _measure(options, impls, command, until)
    result = read_json(path)
    result["spent"] = result.get("spent", 0.0) + time.time() - begin
    write_json(path, result)
    return _report(options.out, readme, result)


def _measure(
    options: argparse.Namespace, impls: list[str], command: tuple[str, ...], until: float
) -> None:
    """Compile ahead where nothing was measured before, then start the worker and watch it."""
    path, more = options.out / "device.json", ["--device", options.device]
    more += [*(["--tiny"] if options.tiny else []), "--impl", *impls]
    result = read_json(path)
    if set(impls) & set(IMPLS) and not result["rows"]:
        seconds = min(COMPILING, (until - time.time()) / 3)
        result["compiled_seconds"] = compile_ahead([*command, *more], seconds)
        write_json(path, result)
    more += ["--worker", "--out", str(options.out.resolve())]
    more += ["--only", *options.only] if options.only else []
    watch([*command, *more], path, until - time.time())


def _report(folder: Path, readme: Path, result: dict[str, Any]) -> int:
    """Tables, plot and what was refused; the exit status."""
    try:
        report(folder, readme)
    except Exception:  # what was measured is in the file
        traceback.print_exc()
    wrong = refusals(result)
    for text in wrong:
        print(f"refused: {text}", file=sys.stderr)
    return 1 if wrong else 0
