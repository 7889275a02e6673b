"""The process that runs the cases, and leaves ``device.json`` whole after every one."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from bae_fast.files import read_json, write_json
from bench import timing
from bench.device.cases import Plan, Row, cases, name_of
from bench.device.chip import clocks
from bench.device.deadlines import Expected
from bench.device.job import Job
from bench.device.machine import Machine
from bench.device.parts import run_case
from bench.device.report import line

# exit status of a worker whose device no longer answers
DEAD = 75


def work(
    path: Path,
    impls: list[str],
    device: str,
    plan: Plan,
    until: float,
    only: Collection[str] = (),
) -> int:
    """Run every case that ``path`` does not hold yet, until a time.

    Args:
        until: of the system's clock.
        only: kinds of cases; without any all are run.

    Returns:
        The exit status.
    """
    result = read_json(path)
    machine = Machine(device, plan)
    gc.freeze()  # what is imported: else every collection goes through all of it
    expected = Expected(plan, result["rows"])
    done = {name_of(row["case"]) for row in result["rows"]}
    for case in cases(plan, impls, device):
        if name_of(case) in done or (only and case["kind"] not in only):
            continue
        left, needed = until - time.time(), expected.seconds(case)
        if needed > left or left < 1:
            reason = f"{left:.0f} s left, {needed:.0f} expected"
            result["skipped"].append({"case": case, "reason": reason})
            continue
        # with what an earlier worker left of this case when it ended
        row: Row = {"case": case, "sides": dict(result["ended"].get(name_of(case), {}))}
        note = functools.partial(_note, path, result, row)
        job = Job(case, row, result, impls, machine, note, lambda: until - time.time())
        if not _run(job, path):
            return DEAD
        expected.learn(row)
        machine.forget()
    result["complete"] = not (result["skipped"] or only)
    result["clocks_after"] = clocks()
    write_json(path, result)
    return 0


def _note(path: Path, result: dict[str, Any], row: Row, side: str) -> None:
    """Say in the file which side of a case is at work: whoever watches sees a new time too."""
    result["running"] = {**row, "side": side}
    write_json(path, result)


def _run(job: Job, path: Path) -> bool:
    """Run a case and keep its row. False: the device no longer answers."""
    begin, result, row = time.time(), job.result, job.row
    alive = True
    try:
        job.note("")
        alive = run_case(job)
    except Exception as error:  # building a case failed: most likely its memory
        row["unavailable"] = (
            "out of memory"
            if isinstance(error, torch.OutOfMemoryError)
            else f"{type(error).__name__}: {timing.first_line(error)}"
        )
        alive = job.machine.answers()
        print(f"{name_of(job.case)}: {row['unavailable']}", flush=True)
    row["wall_seconds"] = time.time() - begin
    result["running"] = None
    if not alive and settled(row["sides"]):  # the next worker does the other sides
        result["ended"][name_of(job.case)] = settled(row["sides"])
        write_json(path, result)
        return False
    result["rows"].append(row)
    write_json(path, result)
    print(line(row), flush=True)
    return alive


def settled(sides: dict[str, Any]) -> dict[str, Any]:
    """Sides of an interrupted case that need no further call."""
    ends = ("refused", "unavailable", "seconds", "checked")
    return {name: side for name, side in sides.items() if any(end in side for end in ends)}
