"""The process that watches the worker, and starts another where it ends or hangs."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from bae_fast.files import read_json, write_json
from bench.checkout import ROOT
from bench.device.cases import name_of
from bench.device.deadlines import STALL, TIME_UP
from bench.device.processes import end
from bench.device.worker import DEAD, settled


def watch(command: list[str], path: Path, seconds: float) -> None:
    """Run the worker until it is done or time is up, again where it ends before."""
    until = time.time() + seconds
    fruitless = 0
    while time.time() < until - 2:
        before = len(read_json(path)["rows"])
        status, reason = _worker([*command, "--until", str(until - 1)], path, until)
        if status == 0:
            return
        result = read_json(path)
        running = _blame(result, reason)
        useful = running or status == DEAD or len(result["rows"]) > before
        fruitless = 0 if useful else fruitless + 1
        if fruitless > 1:
            result["error"] = reason
        write_json(path, result)
        if fruitless > 1:
            return


def _worker(command: list[str], path: Path, until: float) -> tuple[int, str]:
    """Run a worker until it ends, says nothing for too long or time is up: its status, and why."""
    process = subprocess.Popen(command, cwd=ROOT)
    begin, reason = time.time(), ""
    try:
        while process.poll() is None and not reason:
            time.sleep(0.2)
            silent = time.time() - max(begin, path.stat().st_mtime)
            if time.time() > until:
                reason = TIME_UP
            elif silent > STALL:
                reason = f"no answer within {STALL:.0f} s"
    finally:
        end(process)
        status = process.wait()
    return status, reason or f"its process ended with status {status}"


def _blame(result: dict[str, Any], reason: str) -> bool:
    """Note why the side at work has no result; whether one was at work."""
    running = result.get("running")
    result["running"] = None
    if not running:
        return False
    case, side = running["case"], running["side"]
    row: dict[str, Any] = {"case": case, "sides": {}, "wall_seconds": 0.0}
    if not side:
        result["rows"].append(row | {"unavailable": reason})
        return True
    key = "unavailable" if reason == TIME_UP else "refused"
    sides = {**settled(running["sides"]), side: {key: reason}}
    result["ended"][name_of(case)] = sides
    if reason == TIME_UP:
        result["rows"].append(row | {"sides": sides})
    print(f"{name_of(case)}: {side}: {reason}", flush=True)
    return True
