"""The tests that need a device, run by pytest in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from bench.checkout import ROOT
from bench.device import processes
from bench.device.deadlines import Limit

# of pytest-xdist: tests compile more than they compute
WORKERS = 8

# a line of pytest, alone or with xdist
FAILED = re.compile(r"(FAILED|ERROR) \S+::|::.* (FAILED|ERROR)\b")
# those of a result that are named
NAMED = 50


def run_tests(limit: Limit, alive: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The tests that need a device, whole; of those that time leaves out, how many were run."""
    done = processes.run_process(_command(), limit.seconds, alive=alive)
    last = (done.lines or ["no reason"])[-1].strip("= ")
    if done.status is None:
        passed = len(re.findall(r"\bPASSED\b", done.text))
        last = f"{limit.over}; {passed} tests had passed"
    failed = failures(done.lines)
    if failed:
        return {"refused": last, "failed": failed[:NAMED]}
    if done.status is None or (done.status == 0 and " passed" not in last):
        return {"unavailable": last}  # those that find no device are skipped
    return {"checked": last} if done.status == 0 else {"refused": last}


def _command() -> list[str]:
    (file,) = (ROOT / "tests").glob("**/test_triton_gpu.py")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "bench.checkout", "-o", "addopts="]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    return [*command, str(file)]


def failures(lines: list[str]) -> list[str]:
    """The names of tests that failed, each once, from what pytest said."""
    ends = [re.search(r"(\S+::\w+(?:\[.*?\])?)", x) for x in lines if FAILED.search(x)]
    return list(dict.fromkeys(found.group(1) for found in ends if found))
