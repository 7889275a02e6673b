"""The sides of a comparison on a device: every one checked, then timed, one after the other."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from bae_fast.ops import registry
from bench import timing
from bench.device.cases import name_of
from bench.device.ceilings import level_of
from bench.device.deadlines import limit_of
from bench.device.job import Job
from bench.exact import WrongResultError
from bench.timing import Comparison


def compare(comparison: Comparison, job: Job, timed: bool) -> bool:
    """Fill the row of a job. False: the device no longer answers."""
    job.row["work"] = comparison.work
    if not all(_check(comparison, name, job) for name in comparison.sides):
        return False
    if timed and not all(_time(comparison, name, job) for name in comparison.sides):
        return False
    rival = next(iter(comparison.sides))
    if rival.split()[0] not in registry.IMPLS:
        timing.add_ratios(job.sides, rival)
    return True


def _check(comparison: Comparison, name: str, job: Job) -> bool:
    """Check one side, where an earlier worker has not. False: the device no longer answers."""
    if name in job.sides:
        return True
    job.note(name)
    begin, limit = time.perf_counter(), limit_of(timing.COMPILE_SECONDS, job.seconds_left())
    try:
        timing.verify(comparison, name, job.machine.device, max(int(limit.seconds), 1))
    except WrongResultError as error:
        late = isinstance(error.__cause__, TimeoutError) and not limit.own
        side = {"unavailable": limit.over} if late else timing.failure(name, error)
        job.sides[name] = side
        print(f"{name_of(job.case)}: {name}: {side}", flush=True)
        if not job.machine.answers():
            return False
        job.machine.release()
    else:
        job.sides[name] = {"first_seconds": time.perf_counter() - begin}
    return True


def _time(comparison: Comparison, name: str, job: Job) -> bool:
    """Time one side that was right. False: the device no longer answers."""
    if "first_seconds" not in job.sides[name] or "seconds" in job.sides[name]:
        return True
    job.note(name)
    try:
        found = _figures(comparison, name, job)
    except torch.OutOfMemoryError:
        job.sides[name] = {"unavailable": "out of memory"}
    except Exception as error:
        text = f"{type(error).__name__}: {timing.first_line(error)}"
        job.sides[name] = {"refused": text}
        return job.machine.answers()
    else:
        job.sides[name] |= found
    job.machine.release()
    return True


def _figures(comparison: Comparison, name: str, job: Job) -> dict[str, Any]:
    """Times of a side, what the host took to start it, its peak and its shares of the ceilings."""
    side, machine = comparison.sides[name], job.machine
    # a graph owns its memory
    peak = None if job.case["kind"] == "graph" else machine.peak(side)
    machine.starting.clear()  # the address of one that is gone may be another's
    times = timing.interleaved({name: side}, machine.plan.seconds, machine.clock)[name]
    found: dict[str, Any] = {
        "seconds": statistics.median(times), "least": min(times), "most": max(times),
        "rounds": len(times),
    }  # fmt: skip
    host = machine.starting.get(id(side.run))
    if host:
        found["host_seconds"] = min(host)
    if peak is not None:
        found["peak_bytes"] = peak
    ceiling = job.result.get("ceilings")
    if ceiling is not None:
        level = level_of(ceiling)
        found |= timing.shares(comparison.work, found["seconds"], name, ceiling, level)
    return found
